"""Classifiers, and the alignment of their classes by label name.

This is the only file that imports AutoModel*. Weights are read from safetensors, or from older
`pytorch_model.bin` files with weights_only=True. Nothing foreign is unpickled.
"""

import pickle
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from sead_dist.config.schema import TeacherConfig
from sead_dist.config.yaml_text import to_flow
from sead_dist.data.kinds import align_name
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import RunError, UserError, is_panic, reading, reason, rejection
from sead_dist.models.hidden_states import body_of
from sead_dist.models.loaded import (
    Loaded,
    first_few,
    head_names,
    pooler_names,
    reject_gaps,
    reject_leftovers,
    wrapper_prefix,
)
from sead_dist.models.pretrained import COPY, Checkpoint, locate, weight_files
from sead_dist.runtime.files import folder_aside

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_generic(names: Sequence[str]) -> bool:
    """Whether the names are LABEL_0, LABEL_1, ..., which do not name the classes."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def width(task: TaskSpec) -> int:
    """How many logits a model gives per text row."""
    return len(task.task_kind.outputs(task))


def by_example(logits: torch.Tensor, choices: int) -> torch.Tensor:
    """logits_BC of B examples, from the logits of their text rows. Shape [B, C] stays as it is. [B
    x K, 1] becomes [B, K], where an example has a text row for each of K choices."""
    return logits.reshape(len(logits) // choices, choices * logits.shape[-1])


def label_names(config: PretrainedConfig) -> list[str]:
    """The names of a model's classes in its own order, by id2label. A name that is missing, or that
    has another number in label2id, gets a remark in brackets. With the remark it is not a label of
    a task."""
    numbers, names = config.label2id or {}, []
    for index in range(config.num_labels):
        name = str(config.id2label.get(index, f"without a name ({index})"))
        other = numbers.get(name, index)
        names.append(name if other == index else f"{name} (label2id: {other})")
    return names


def align_classes(
    task: TaskSpec,
    model: str,
    names: Sequence[str],
    labels: Sequence[str] | str | None,
    fix: str | None = None,
    given: str | None = None,
) -> list[int]:
    """For each task class, the column of the model's own logits: order_C with
    logits_task = logits_model[:, order_C]. (Invariant 4; our own rule.)

    names: the model's label names. labels: the names that the configuration gives instead, or
    "task_order". fix: the line that corrects the configuration, which the error shows. given: how
    the configuration gave the labels. Both are by default those of a teacher's entry. Raises
    UserError with `fix`.
    """
    entry = to_flow({"path": model, "labels": list(task.labels)})
    fix = fix or f"{entry} or labels: task_order"
    if len(names) != width(task):
        raise UserError(
            f"{model} has num_labels={len(names)} but task {task.name} needs {width(task)}"
            + (f" ({', '.join(task.labels)})" if task.task_kind.head_of_labels else "")
            + "; give a model fine-tuned for this task"
        )
    if not task.task_kind.head_of_labels or labels == "task_order":
        return list(range(len(names)))
    used = list(labels) if labels is not None else list(names)
    if labels is None and is_generic(names):
        raise UserError(
            f"{model} names its classes {', '.join(names)}, which does not show their order; "
            f"give the order that it was trained with: {fix}"
        )
    found = [align_name(task, name) for name in used]
    wrong = [name for name, index in zip(used, found, strict=True) if index is None]
    if wrong or sorted(index for index in found if index is not None) != list(range(len(names))):
        reason = (
            f"{wrong[0]!r} is not a label of" if wrong else "they do not name exactly the labels of"
        )
        whose = f"{model} names its classes {', '.join(used)}"
        what_to_do = "leave it out if it was trained for another task, else give"
        if labels is not None:
            whose, what_to_do = given or f"{model}, labels: {to_flow(used)}", "give"
        raise UserError(
            f"{whose}: {reason} task {task.name}, whose labels are {', '.join(task.labels)}; "
            f"{what_to_do} the task's label for each of its classes, in its own order: {fix}"
        )
    return [found.index(index) for index in range(len(names))]


def check_problem_type(task: TaskSpec, name: str, config: PretrainedConfig) -> None:
    """Raises UserError for a model whose config gives its logits another meaning than the task
    does: scores, or sigmoids of classes that do not exclude each other."""
    own, wanted = config.problem_type, task.task_kind.problem_type
    if own is None or wanted is None or own == wanted:
        return
    raise UserError(
        f"{name} has problem_type={own} in its config.json, but task {task.name} needs {wanted}; "
        f"leave it out, or correct problem_type if it was trained as {wanted}"
    )


def load_classifier(
    checkpoint: Checkpoint, dtype: str = "fp32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A sequence classifier as it was fine-tuned. Raises UserError where a weight is missing or has
    another shape, and where the files hold more of a classifier than the model takes."""
    model, loaded = read_classifier(checkpoint, dtype, trust_remote_code)
    reject_no_head(checkpoint, head_names(model) & loaded.missing)
    reject_gaps(checkpoint.name, model, loaded, set())
    reject_leftovers(checkpoint.name, model, loaded.unused)
    return model


def reject_no_head(checkpoint: Checkpoint, missing: Collection[str]) -> None:
    """Raises UserError where weights of the head are missing."""
    if missing:
        raise UserError(
            f"{checkpoint.name} lacks the weights {', '.join(sorted(missing)[:3])}, so it was "
            "never fine-tuned to classify; fine-tune it first (sead-dist finetune)"
        )


def load_start(
    checkpoint: Checkpoint, trust_remote_code: bool, on_meta: bool = False, **changes: Any
) -> tuple[PreTrainedModel, Loaded]:
    """A classifier to train from, in fp32. Its head is new where the files have none. changes:
    fields of its config (num_labels, ...). on_meta: load no weights, and only see whether they fit.

    Only the head may be new, and the pooler where the files lack all of it. Raises UserError where
    any other weight would be new.
    """
    if on_meta:
        changes["device_map"] = "meta"
    model, loaded = read_classifier(checkpoint, "fp32", trust_remote_code, **changes)
    pooler = pooler_names(model)
    allowed = head_names(model) | (pooler if pooler <= loaded.missing else set())
    reject_gaps(f"start {checkpoint.name}", model, loaded, allowed)
    return model, loaded


def read_classifier(
    checkpoint: Checkpoint, dtype: str, trust_remote_code: bool, **given: Any
) -> tuple[PreTrainedModel, Loaded]:
    """A classifier with the weights of its files, and a record of what was loaded. Known prefixes
    are taken off the names in the files. Weights that the files lack are drawn from torch's
    generator."""
    before = torch.get_rng_state()
    model, loaded = _read(checkpoint, dtype, trust_remote_code, given)
    body = body_of(model)
    prefix = wrapper_prefix(loaded, body[0] if body is not None else "")
    if prefix is None:
        return model, loaded
    # new weights must be those that files without a prefix would give
    torch.set_rng_state(before)
    pattern = f"^{re.escape(prefix)}"
    given = {**given, "key_mapping": {pattern: ""}}
    model, loaded = _read(checkpoint, dtype, trust_remote_code, given)
    # else save_pretrained would put the prefix back
    model._weight_conversions = [
        one for one in model._weight_conversions if one.source_patterns != [pattern]
    ]
    return model, replace(loaded, prefix=prefix)


def _read(
    checkpoint: Checkpoint, dtype: str, trust_remote_code: bool, given: Mapping[str, Any]
) -> tuple[PreTrainedModel, Loaded]:
    files = weight_files(checkpoint)
    name = f"{checkpoint.name}: its weights"
    with reading(checkpoint.folder, COPY, name):
        try:
            model, notes = AutoModelForSequenceClassification.from_pretrained(
                checkpoint.folder,
                dtype=DTYPES[dtype],
                use_safetensors=files[0].suffix == ".safetensors",
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **given,
            )
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{name} cannot be read: {files[0].name} holds more than "
                f"tensors{f' ({asked[1]})' if asked else ''}, and code in it is never run; "
                "save it again as model.safetensors where you trust it"
            ) from error
    mismatched = sorted(
        (name, tuple(theirs), tuple(ours)) for name, theirs, ours in notes["mismatched_keys"]
    )
    return model, Loaded(
        len(model.state_dict()),
        frozenset(notes["missing_keys"]),
        tuple(mismatched),
        frozenset(notes["unexpected_keys"]),
    )


def load_plain(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that plain Transformers loads from a folder. Raises UserError where it cannot be
    loaded or lacks weights."""
    try:
        model, notes = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        # the callers give the fix, which is not to copy the folder again
        raise rejection(f"plain Transformers cannot load it ({reason(error)})", error) from error
    if notes["missing_keys"] or notes["mismatched_keys"]:
        lacking = {*notes["missing_keys"], *(name for name, *_ in notes["mismatched_keys"])}
        raise UserError(f"plain Transformers does not find the tensors {first_few(lacking)} in it")
    return model.eval()


def build_teacher(
    entry: TeacherConfig, dtype: str, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """A teacher in eval mode, without gradients, in its dtype on its device."""
    checkpoint = locate(entry.path, entry.revision)
    return frozen(load_classifier(checkpoint, dtype, trust_remote_code).to(device))


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode, without gradients, in memory of its own."""
    for parameter in model.parameters():
        # results depend, to the bit, on the alignment of weights, and those mapped from a file lie
        # at any address
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def new_classifier(
    config: PretrainedConfig, trust_remote_code: bool = False, dtype: str = "fp32"
) -> PreTrainedModel:
    """A sequence classifier of this shape with new weights, from torch's seed.

    Raises UserError for a shape that no model can have.
    """
    try:
        return AutoModelForSequenceClassification.from_config(
            config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a bad value may raise any exception
        raise rejection(
            f"a {config.model_type} of this shape cannot be built: {reason(error)}; correct its "
            "sizes",
            error,
        ) from error


def outline(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `new_classifier` gives, on the meta device: its parts without weights."""
    with torch.device("meta"):
        return new_classifier(config, trust_remote_code)


def head_weights(model: PreTrainedModel) -> list[str]:
    """The names of the weights that classify, apart from the encoder's."""
    head = head_names(model)
    return [name for name, _ in model.named_parameters() if name in head]


def write_weights(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write model.safetensors and config.json to `folder`."""
    model.save_pretrained(folder, state_dict=dict(weights), safe_serialization=True)


def save_model(
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    save_words: Callable[[Path], None],
    folder: Path,
) -> None:
    """Write model.safetensors, the config with label names, and the tokeniser, as Transformers
    reads them.

    weights: the whole state of the model, which itself may hold only a part. save_words: writes the
    tokeniser into a folder. The files are written to a folder beside `folder`, which is then
    renamed. Raises RunError when that fails.
    """
    try:
        # a finished run deletes its checkpoints, so its model must be on the disk before that
        with folder_aside(folder) as aside:
            write_weights(model, weights, aside)
            save_words(aside)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the model cannot be written to {folder}: {error}; free space or fix the folder, "
            "then give the same command again"
        ) from error


def unshared(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state with one name for each shared tensor (safetensors holds each once)."""
    seen: set[int] = set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state
