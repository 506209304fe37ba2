"""`sead-dist export`: a finished model as an ONNX file, compared with PyTorch, and timed.

torch's exporter traces the model once. The numbers of rows and of tokens stay variable. The written
file is loaded again and compared with PyTorch on every official split of the task. No other file
imports onnxruntime; the extra `onnx` installs it.

Shapes: B examples, C classes (task order), R text rows (all choices of B examples), L tokens.
"""

import logging
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sead_dist.config.sections import Labels
from sead_dist.data.examples import metric_names
from sead_dist.data.order import Split, make_batch
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import RunError, UserError
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.sequence_classifier import label_names
from sead_dist.reporting.report import write_report
from sead_dist.reporting.run_files import onnx_rows
from sead_dist.runs.prediction import (
    data_of,
    data_option,
    in_task_order,
    load_answerer,
    task_of,
)
from sead_dist.runs.without_gold import load_to_score
from sead_dist.runtime.distributed import World
from sead_dist.runtime.files import folder_aside
from sead_dist.runtime.run_log import tell, tell_table, write_json
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.training.evaluation import EvalResult, evaluate

NEEDED = ("onnx", "onnxscript", "onnxruntime")
# colour codes in the exporter's messages
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# The largest allowed differences between an fp32 file and PyTorch. That of logits is relative to
# the largest logit (at least 1), that of metrics is absolute. Sums in another order cause about a
# hundredth of it.
LOGIT_TOLERANCE = 1e-4
METRIC_TOLERANCE = 1e-4
BATCHES = (1, 32)
# Each round times one forward of every model. Rounds end once the first two numbers (rounds,
# seconds) are both reached, or after the third (rounds).
TIMED_ROUNDS, TIMED_S, MOST_ROUNDS = 5, 3.0, 50
# inputs [R, L] by name -> logits_RC
Run = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Original:
    """The PyTorch model, its task, and the official splits.

    weights: the folder of its files. order_C: for each class of the task, the column of the model's
    own logits.
    """

    model: PreTrainedModel
    inputs: ModelInputs
    weights: Path
    task: TaskSpec
    order_C: list[int]
    splits: list[Split]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            logits_RC: torch.Tensor = self.model(**inputs).logits
        return logits_RC

    def score(self, run: Run) -> list[EvalResult]:
        """The result of the model `run` on every official split."""

        def forward(inputs: dict[str, torch.Tensor], choices: int) -> torch.Tensor:
            return in_task_order(run(inputs), choices, self.order_C)

        alone = World(0, 1, torch.device("cpu"))
        return [evaluate(self.task, self.model, forward, s, alone, step=0) for s in self.splits]


def export_onnx(
    name: str,
    quantized: bool,
    output: str | None,
    task_name: str | None,
    data: str | None,
    labels: Labels,
) -> None:
    """Write `name` (a run directory or model folder) as ONNX into OUTPUT (default: NAME/onnx).

    Files: model.onnx, the tokeniser, config.json with the label names, and export.json with the
    measurements; with `quantized` also model_int8.onnx. In NAME/onnx of a run, the run's card is
    written again with a link. Raises UserError before any work. Raises RunError, and writes
    nothing, where the fp32 file differs from PyTorch.
    """
    check_installed()
    folder = output_folder(name, output)
    quiet_libraries(World(0, 1, torch.device("cpu")))
    original = load_original(name, task_name, data, labels)
    try:
        with folder_aside(folder) as aside:
            record = write_and_measure(original, aside, quantized)
    except OSError as error:
        raise RunError(f"--output {folder} cannot be written: {error.strerror}") from error
    title = f"{record['task']}, CPU, threads: {record['threads']}"
    tell_table(title, *onnx_rows(record))
    tell(f"written to {folder}")
    if folder == Path(name) / "onnx" and (Path(name) / "run_summary.json").is_file():
        write_report(Path(name))
        tell(f"the model card has a link to it: {Path(name) / 'README.md'}")


def output_folder(name: str, output: str | None) -> Path:
    """The folder of the export's files.

    Raises UserError for a folder that holds other files, RunError for one that is not writable.
    """
    if output is None and not Path(name).is_dir():
        raise UserError(
            f"{name} does not exist here; give an existing run or model folder; for a model of "
            "the hub also give --output DIR"
        )
    folder = Path(output) if output is not None else Path(name) / "onnx"
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"--output {folder} is the working folder or holds it; give a new folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "export.json").is_file():
        raise UserError(f"--output {folder} holds other files than an export; give a new folder")
    if not folder.parent.is_dir():
        what = "is not a folder" if folder.parent.exists() else "does not exist"
        raise UserError(f"--output {folder}: {folder.parent} {what}; make it or give another")
    if not os.access(folder.parent, os.W_OK):
        raise RunError(f"--output {folder}: folder {folder.parent} is not writable; give another")
    return folder


def load_original(name: str, task_name: str | None, data: str | None, labels: Labels) -> Original:
    """The model on the CPU in fp32, with its task's official splits."""
    task = task_of(name, task_name)
    source = data_of(name, task_name, data)
    with data_option():
        names = [split for split in task.splits if split != "train"]
        sets = [load_to_score(name, task, source, split) for split in names]
    found = load_answerer(name, task, labels, torch.device("cpu"), sets[0])
    splits = [found.inputs.split(examples) for examples in sets]
    return Original(found.model, found.inputs, found.folder, task, found.order_C, splits)


def write_and_measure(original: Original, folder: Path, quantized: bool) -> dict[str, Any]:
    """Write all files of the export. Returns the content of export.json."""
    threads = torch.get_num_threads()
    write_onnx(original.model, batch_inputs(original.splits[0], 2), folder / "model.onnx")
    original.model.config.save_pretrained(folder)
    original.inputs.save_alone(folder)
    runs: dict[str, Run] = {
        "PyTorch": original.run,
        "ONNX": open_onnx(folder / "model.onnx", threads),
    }
    results = {name: original.score(run) for name, run in runs.items()}
    for before, after in zip(results["PyTorch"], results["ONNX"], strict=True):
        reject_difference(before, after)
    if quantized:
        quantize(folder / "model.onnx", folder / "model_int8.onnx")
        runs["ONNX int8"] = open_onnx(folder / "model_int8.onnx", threads)
        results["ONNX int8"] = original.score(runs["ONNX int8"])
    sizes = {
        "PyTorch": file_bytes(original.weights, "*.safetensors"),
        "ONNX": file_bytes(folder, "model.onnx*"),
        "ONNX int8": file_bytes(folder, "model_int8.onnx*"),
    }
    batches = {size: batch_inputs(original.splits[0], size) for size in BATCHES}
    timed = {str(size): latencies(runs, inputs) for size, inputs in batches.items()}
    models = [
        measured(
            name,
            sizes[name],
            results[name],
            None if name == "PyTorch" else results["PyTorch"],
            {size: ms[name] for size, ms in timed.items()},
        )
        for name in runs
    ]
    record = {
        "task": original.task.name,
        "metric": metric_names(original.task, original.splits[0].examples)[0],
        "labels": label_names(original.model.config),
        "rows": {split.examples.split: len(split) for split in original.splits},
        "max_length": original.inputs.max_length,
        "tolerance": {"logits": LOGIT_TOLERANCE, "metrics": METRIC_TOLERANCE},
        "threads": threads,
        "machine": platform.machine(),
        "latency_tokens": {str(n): of["input_ids"].shape[1] for n, of in batches.items()},
        "versions": {package: metadata.version(package) for package in ("torch", *NEEDED)},
        "models": models,
    }
    write_json(folder / "export.json", record)
    return record


def file_bytes(folder: Path, pattern: str) -> int:
    """Bytes of a folder's files of this pattern."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


def batch_inputs(split: Split, size: int) -> dict[str, torch.Tensor]:
    """Inputs [R, L] of `size` examples of medium length. A short split's examples are repeated."""
    by_length_B = np.argsort(split.tokens.lengths_B(), kind="stable")
    start = max(0, (len(by_length_B) - size) // 2)
    return make_batch(split, np.take(by_length_B, range(start, start + size), mode="wrap")).inputs


def reject_difference(before: EvalResult, after: EvalResult) -> None:
    """Raises RunError where logits or metrics of the fp32 file differ too much from PyTorch's."""
    scale = max(1.0, float(np.abs(before.logits_BC).max()))
    difference = largest_difference(before, after)
    if not difference <= LOGIT_TOLERANCE * scale:
        raise RunError(
            f"the ONNX file differs from PyTorch by {difference:.3g} in a logit of {before.split}; "
            f"at most {LOGIT_TOLERANCE * scale:.3g} is allowed; nothing was written; use the "
            "PyTorch model, or other versions of torch and onnxruntime"
        )
    for metric, value in before.metrics.items():
        if not abs(value - after.metrics[metric]) <= METRIC_TOLERANCE:
            raise RunError(
                f"the ONNX file has {metric} {after.metrics[metric]:.4f} on {before.split}, "
                f"PyTorch has {value:.4f}; at most {METRIC_TOLERANCE:g} of difference is allowed; "
                "nothing was written; use the PyTorch model, or other versions of torch and "
                "onnxruntime"
            )


def largest_difference(before: EvalResult, after: EvalResult) -> float:
    """The largest absolute difference between logits."""
    return float(np.abs(before.logits_BC - after.logits_BC).max())


def agreement(before: EvalResult, after: EvalResult) -> float | None:
    """The share of examples with the same predicted class; None for regression."""
    if before.logits_BC.shape[1] == 1:
        return None
    return float((before.logits_BC.argmax(1) == after.logits_BC.argmax(1)).mean())


def measured(
    name: str,
    size: int,
    results: Sequence[EvalResult],
    original: Sequence[EvalResult] | None,
    latency_ms: dict[str, float],
) -> dict[str, Any]:
    """One model's entry in export.json.

    metrics, largest_difference and agreement are by split name. The last two compare with the
    original, and are None for the original itself. Agreement is None for regression.
    """
    pairs = None if original is None else list(zip(original, results, strict=True))
    return {
        "name": name,
        "bytes": size,
        "metrics": {result.split: result.metrics for result in results},
        "largest_difference": None
        if pairs is None
        else {b.split: largest_difference(b, a) for b, a in pairs},
        "agreement": None if pairs is None else {b.split: agreement(b, a) for b, a in pairs},
        "latency_ms": latency_ms,
    }


def latencies(runs: Mapping[str, Run], inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The median time of one forward of each model, in ms.

    The models alternate, so that other load of the machine affects all of them alike. The first
    forward of each model is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(inputs)
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= TIMED_ROUNDS and time.perf_counter() - began > TIMED_S:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run(inputs)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(taken), 3) for name, taken in times.items()}


def check_installed() -> None:
    """Raises UserError where the extra `onnx` is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(
            f"export needs the package {missing[0]}; install the extra: "
            "pip install 'sead-dist[onnx]'"
        )


class _Logits(torch.nn.Module):
    """The model in the form that the exporter needs: positional tensors in, one tensor out."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def write_onnx(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write `model` (fp32, in eval mode) to `path`.

    The file's inputs have the names of `inputs`. Each is int64 [batch, sequence], and both axes are
    variable. Its output is `logits` [batch, C]. inputs: example tensors of at least two rows and
    two tokens, since the exporter takes an axis of length one as fixed. Raises RunError for a model
    that the exporter cannot trace.
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
            assert program is not None  # only an export without dynamo returns None
            program.save(path)
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        said = COLOUR.sub("", str(error).splitlines()[0])
        raise RunError(
            f"a {model.config.model_type} cannot be exported: {said}; use the PyTorch model"
        ) from error


def quantize(source: Path, target: Path) -> None:
    """Write `source` with 8-bit weights, with one scale for each output channel.

    Activations are quantised while the model runs (onnxruntime's dynamic quantisation).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def open_onnx(path: Path, threads: int) -> Run:
    """A function that runs the file on the CPU: inputs int64 [R, L] -> logits_RC, float32."""
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
    """Suppress the exporter's and the quantiser's warnings on packages, axis names and steps.

    None of these matters here.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
