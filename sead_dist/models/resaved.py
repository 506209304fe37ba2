"""Checks of a saved student: plain Transformers must get its logits from it (invariant 11)."""

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from sead_dist.data.order import Split, make_batch
from sead_dist.errors import RunError, UserError
from sead_dist.models.sequence_classifier import load_plain, unshared, write_weights
from sead_dist.runtime.files import TRIAL, put_folder

# allowed share of the largest logit (at least 1); autocast rounds every product
CLOSE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}


def one_row(split: Split) -> dict[str, torch.Tensor]:
    """The model inputs of the split's first example, unpadded where it is one text row."""
    return make_batch(split, np.array([0])).inputs


def eval_logits(model: nn.Module, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The logits of `forward` in eval mode, moved to the CPU. Generators keep their state."""
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)  # some attention draws
        logits_RC = forward().float().cpu()
    model.train(was_training)
    return logits_RC


def plain_logits(model: PreTrainedModel, row: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """logits_RC of the model's own forward, as Transformers calls it."""
    on_device = {name: tensor.to(model.device) for name, tensor in row.items()}
    return eval_logits(model, lambda: model(**on_device).logits)


def difference(one_RC: torch.Tensor, other_RC: torch.Tensor) -> float:
    """The largest difference between logits, as a share of the largest logit (at least 1)."""
    if one_RC.shape != other_RC.shape:
        return math.inf
    # a NaN in both does not differ; training reports it
    one_RC, other_RC = one_RC.double().nan_to_num(), other_RC.double().nan_to_num()
    return float((one_RC - other_RC).abs().max() / one_RC.abs().max().clamp(min=1.0))


def check_saving(
    model: PreTrainedModel, row: Mapping[str, torch.Tensor], folder: Path, trust_remote_code: bool
) -> None:
    """Save the student in a folder of its own in `folder`, read it back and compare the logits of
    the row. This is done before training. No file stays. It costs one save, one load and two
    forwards of a row.

    Raises UserError where the two differ.
    """
    kind = model.config.model_type
    fix = "give a student of another kind, or the whole model (leave student.layers out)"
    for left in folder.glob(f"{TRIAL}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=TRIAL, dir=folder) as aside:
            own = dict(vars(model.config))
            write_weights(model, unshared(model), Path(aside))
            vars(model.config).clear()  # saving notes dtype and class in it
            vars(model.config).update(own)
            again = load_plain(Path(aside), trust_remote_code)
            off = difference(plain_logits(model, row), plain_logits(again.float(), row))
            del again  # its weights may be mapped from the folder
    except UserError as error:
        raise UserError(f"the student ({kind}), saved before training: {error}; {fix}") from None
    except (OSError, SafetensorError, RunError) as error:
        raise RunError(
            f"the student cannot be saved in {folder}: {error}; free space, raise the limit "
            "(ulimit -f) or give another output_dir"
        ) from None
    if not off <= CLOSE["fp32"]:
        raise UserError(
            f"the student ({kind}), saved before training and read by plain Transformers, gives "
            f"other logits for the first row (by {off:.2g} of the largest); {fix}"
        )


def check_saved(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    trained_RC: torch.Tensor,
    row: Mapping[str, torch.Tensor],
    precision: str,
    trust_remote_code: bool,
) -> None:
    """Read the finished student by plain Transformers. Check that every weight is as it was
    trained, and that the logits of the row are the same up to the rounding of `precision`.

    Raises RunError where they differ.
    """
    try:
        again = load_plain(folder, trust_remote_code).float()
    except UserError as error:
        reject(folder, str(error))
    state = again.state_dict()
    other = [
        name
        for name, tensor in weights.items()
        if name not in state or not torch.equal(state[name].float(), tensor.float().cpu())
    ]
    if other:
        reject(folder, f"{other[0]} differs in it")
    off = difference(trained_RC, plain_logits(again, row))
    if not off <= CLOSE[precision]:
        reject(
            folder,
            "read by plain Transformers it gives other logits for the first row "
            f"(by {off:.2g} of the largest)",
        )


def reject(folder: Path, reason: str) -> NoReturn:
    """Rename the model's folder, so that nothing uses it as the run's model. Raises RunError."""
    aside = folder.with_name(f"{folder.name}.rejected")
    put_folder(folder, aside)
    raise RunError(
        f"the saved model is not what was trained: {reason}; it is now {aside}, and the last "
        "checkpoint is intact; fix the disk or change the version of Transformers, then give the "
        "same command again"
    )
