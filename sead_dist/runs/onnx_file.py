"""A classifier as an ONNX file: written, quantised, and run by onnxruntime.

torch's exporter traces the model once and leaves the number of rows and of tokens open. The only
file that imports onnxruntime; the extra `onnx` brings it.

Shapes: R text rows, L tokens, C classes (of the model, in its own order).
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sead_dist.errors import RunError, UserError

NEEDED = ("onnx", "onnxscript", "onnxruntime")
# what the exporter writes for terminals
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Run = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def check_installed() -> None:
    """Raises UserError where the extra `onnx` is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(
            f"export needs the package {missing[0]}; install the extra: "
            "pip install 'sead-dist[onnx]'"
        )


class _Logits(torch.nn.Module):
    """The model as the exporter wants it: tensors in, in this order, and one tensor out."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def write_onnx(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write `model` (fp32, in eval mode) to `path`: inputs named and typed as `inputs`, each
    int64 [batch, sequence] with both open; output `logits` [batch, C].

    inputs: an example of at least two rows and two tokens; an axis of one would be taken for fixed.
    Raises RunError for a model that the exporter cannot trace.
    """
    names = tuple(inputs)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    try:
        with _quiet():
            program = torch.onnx.export(
                _Logits(model, names).eval(),
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(names),
                output_names=["logits"],
                dynamic_shapes=(tuple({0: batch, 1: sequence} for _ in names),),
                verbose=False,
            )
            assert program is not None  # None is for exports without dynamo
            program.save(path)
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        said = COLOUR.sub("", str(error).splitlines()[0])
        raise RunError(
            f"a {model.config.model_type} cannot be exported: {said}; use the PyTorch model"
        ) from error


def quantize(source: Path, target: Path) -> None:
    """Write `source` with 8-bit weights, a scale for each output channel; activations are
    quantised as they come (onnxruntime's dynamic quantisation)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def open_onnx(path: Path, threads: int) -> Run:
    """The file at work on the CPU: inputs int64 [R, L] -> logits_RC, float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = [given.name for given in session.get_inputs()]

    def run(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        (logits_RC,) = session.run(None, {name: inputs[name].numpy() for name in wanted})
        return torch.from_numpy(logits_RC)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantiser warn of packages, axis names and steps that do not matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
