"""The student at its start: a checkpoint, chosen layers of one, or a new shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sead_dist.config import StudentConfig, TeacherConfig
from sead_dist.configfiles import config_folder
from sead_dist.errors import UserError
from sead_dist.internals import layer_stack
from sead_dist.models import align_classes, label_names, load_classifier, new_classifier, outline
from sead_dist.pretrained import (
    TOKENIZER_FILES,
    Checkpoint,
    check_vocabulary,
    load_model_config,
    load_tokenizer,
    locate,
    weight_files,
)
from sead_dist.tasks import TaskSpec
from sead_dist.yamltext import parse_yaml


def student_tokenizer(student: StudentConfig, teachers: Sequence[TeacherConfig]) -> Checkpoint:
    """Where the student's tokeniser comes from: its own entry, its start, else a teacher."""
    sources = [student.tokenizer, student.path, *(teacher.path for teacher in teachers)]
    source = next((source for source in sources if source is not None), None)
    if source is None:
        raise UserError(
            "a student of a shape needs a tokeniser; set student.tokenizer=FOLDER, or give teachers"
        )
    return locate(source, marks=TOKENIZER_FILES)


def _shape_config(shape: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    named = config_folder() / "students" / f"{shape}.yaml"
    path = named if named.is_file() else Path(shape)
    if not path.is_file():
        known = sorted(file.stem for file in (config_folder() / "students").glob("*.yaml"))
        raise UserError(f"{shape} is no shape of a model; known: {', '.join(known)}, or a file")
    fields = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(fields, Mapping) or "model_type" not in fields:
        raise UserError(
            f"student.shape={shape} does not say model_type; it must hold the fields of a "
            "Transformers config, such as model_type: bert and hidden_size: 256"
        )
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **fields}
    try:
        config = AutoConfig.for_model(**fields)
        outline(config)
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"student.shape={shape}: {str(error).splitlines()[0]}") from None
    return config


def check_start(student: StudentConfig, trust_remote_code: bool) -> None:
    """Raises UserError for a start that is not there, before anything long depends on it."""
    tokenizer = load_tokenizer(student_tokenizer(student, []))
    if student.shape is not None:
        _shape_config(student.shape, tokenizer)
    elif student.path is not None:
        checkpoint = locate(student.path)
        weight_files(checkpoint)
        config = load_model_config(checkpoint, trust_remote_code)
        check_vocabulary(checkpoint.name, tokenizer, config)


def _keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Keep these layers (0 is the first), in this order."""
    stack = layer_stack(model)
    if stack is None:
        kind = model.config.model_type
        raise UserError(f"student.layers: no stack of layers found in a {kind}")
    if not layers or any(layer not in range(len(stack)) for layer in layers):
        raise UserError(
            f"student.layers={list(layers)} must be chosen from 0..{len(stack) - 1}, at least one"
        )
    kept = [stack[layer] for layer in layers]
    del stack[:]
    stack.extend(kept)
    model.config.num_hidden_layers = len(kept)


def _place_head_in_task_order(model: PreTrainedModel, order_C: Sequence[int]) -> None:
    """A student that already has a head answers in the task's class order from now on."""
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    final = next(m for m in reversed(heads) if m.out_features == len(order_C))
    with torch.no_grad():
        final.weight.copy_(final.weight[list(order_C)].clone())
        if final.bias is not None:
            final.bias.copy_(final.bias[list(order_C)].clone())


def build_student(
    student: StudentConfig,
    task: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The student at its start, fp32, on CPU: the same weights on every rank for one seed.

    A head that came with the checkpoint is kept when its label names align with the task's, and
    made anew (from the seed) otherwise.
    """
    names = list(task.labels) if task.kind == "classification" else ["score"]
    changes: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if task.kind == "regression":
        changes["problem_type"] = "regression"
    torch.manual_seed(seed)
    if student.shape is not None:
        config = _shape_config(student.shape, tokenizer)
        config.update(changes)
        model = new_classifier(config)
    elif student.path is not None:
        checkpoint = locate(student.path)
        own = load_model_config(checkpoint, trust_remote_code)
        model = _start_from(checkpoint, own, task, changes, trust_remote_code)
        if student.layers is not None:
            _keep_layers(model, student.layers)
    else:
        raise UserError("no student is set; give student=DIR, a hub id, or student.shape=NAME")
    check_vocabulary(student.path or student.shape or "the student", tokenizer, model.config)
    return model.float()


def _start_from(
    checkpoint: Checkpoint,
    own: PretrainedConfig,
    task: TaskSpec,
    changes: dict[str, Any],
    trust_remote_code: bool,
) -> PreTrainedModel:
    order_C: list[int] | None = None
    if own.num_labels == changes["num_labels"]:
        try:
            order_C = align_classes(task, checkpoint.name, label_names(own), None)
        except UserError:
            order_C = None
    model = load_classifier(
        checkpoint,
        "fp32",
        trust_remote_code,
        ignore_mismatched_sizes=True,
        **changes,
    )
    if order_C is None:
        _renew_head(model)
    else:
        _place_head_in_task_order(model, order_C)
    return model


def _renew_head(model: PreTrainedModel) -> None:
    """A head whose classes are unknown is worth nothing: draw it anew."""
    body = getattr(model, model.base_model_prefix, None)
    inside = {id(module) for module in body.modules()} if body is not None else set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module) not in inside:
            module.weight.data.normal_(0.0, getattr(model.config, "initializer_range", 0.02))
            if module.bias is not None:
                module.bias.data.zero_()
