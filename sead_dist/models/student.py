"""The student at its start: a checkpoint, chosen layers of one, or a new shape."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sead_dist.config.load import config_folder
from sead_dist.config.schema import StudentConfig, TeacherConfig
from sead_dist.config.yaml_text import read_yaml
from sead_dist.data.task_files import TaskSpec
from sead_dist.errors import UserError, reading
from sead_dist.models.hidden_states import layer_stack
from sead_dist.models.loaded import final_layer, head_names
from sead_dist.models.pretrained import (
    TOKENIZER_FILES,
    Checkpoint,
    check_vocabulary,
    load_model_config,
    load_tokenizer,
    locate,
    setting_hash,
    weights_hash,
)
from sead_dist.models.sequence_classifier import (
    align_classes,
    label_names,
    load_start,
    new_classifier,
    outline,
)

# Version of the rules by which a start becomes a student: which weights are new, how they are
# drawn. (2: the bias of a new head of scores began at 0.)
START_RULES = 3
# whose layers lie in one list and know nothing of their place in it; tables of relative positions
# and what follows the first layer (DeBERTa-v2's convolution) lie beside it and stay
CUT_KINDS = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet"),
    *("deberta", "deberta-v2", "rembert"),
)
# what modules call the number of layers, and a layer and its parts their place among them
COUNTS = {"n_layers", "num_layers", "num_hidden_layers"}
NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number"}


def start_hash(student: StudentConfig, teachers: Sequence[TeacherConfig]) -> str:
    """Of the files that decide the student's weights before the first step, and its tokeniser.

    Raises UserError where they are not there.
    """
    digest = hashlib.sha256(setting_hash(student_tokenizer(student, teachers)).encode())
    if student.shape is not None:
        with reading(_shape_file(student.shape), "give a YAML file"):
            digest.update(_shape_file(student.shape).read_bytes())
    elif student.path is not None:
        checkpoint = locate(student.path)
        digest.update(f"{weights_hash(checkpoint)} {setting_hash(checkpoint)}".encode())
    return digest.hexdigest()


def student_tokenizer(student: StudentConfig, teachers: Sequence[TeacherConfig]) -> Checkpoint:
    """Where the student's tokeniser comes from: its own entry, its start, else a teacher."""
    models = [teacher.path for teacher in teachers if teacher.is_model]
    sources = [student.tokenizer, student.path, *models]
    source = next((source for source in sources if source is not None), None)
    if source is None:
        raise UserError(
            "a student of a shape needs a tokeniser; set student.tokenizer=FOLDER, or give teachers"
        )
    return locate(source, marks=TOKENIZER_FILES)


def _shape_file(shape: str) -> Path:
    named = config_folder() / "students" / f"{shape}.yaml"
    path = named if named.is_file() else Path(shape)
    if not path.is_file():
        known = sorted(file.stem for file in (config_folder() / "students").glob("*.yaml"))
        raise UserError(f"{shape} is no shape of a model; known: {', '.join(known)}, or a file")
    return path


def _shape_config(shape: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    path = _shape_file(shape)
    fields = read_yaml(path)
    if not isinstance(fields, Mapping) or "model_type" not in fields:
        raise UserError(
            f"student.shape={shape} does not say model_type; it must hold the fields of a "
            "Transformers config, such as model_type: bert and hidden_size: 256"
        )
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **fields}
    try:
        with reading(str(path), "see the fields of a Transformers config"):
            config = AutoConfig.for_model(**fields)
            outline(config)
    except UserError as error:
        raise UserError(f"student.shape={shape}: {error}") from error
    return config


def check_start(student: StudentConfig, trust_remote_code: bool) -> None:
    """Raises UserError for a start that is not there or whose weights do not fit, before anything
    long depends on it. No weights are read."""
    tokenizer = load_tokenizer(student_tokenizer(student, []))
    if student.shape is not None:
        _shape_config(student.shape, tokenizer)
    elif student.path is not None:
        checkpoint = locate(student.path)
        config = load_model_config(checkpoint, trust_remote_code)
        check_vocabulary(checkpoint.name, tokenizer, config)
        model, _ = load_start(checkpoint, trust_remote_code, on_meta=True)
        if student.layers is not None:
            keep_layers(model, student.layers)


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Keep these layers (0 is the first), in this order, and what all layers share.

    Raises UserError for a model in which a layer is more than its place in one list.
    """
    kind = model.config.model_type
    stack = layer_stack(model)
    if stack is None or kind not in CUT_KINDS:
        raise UserError(
            f"student.layers: the layers of a {kind} cannot be chosen for now, since what belongs "
            f"to a layer does not lie in one list; give a {', '.join(CUT_KINDS)}, or the whole "
            "model (leave student.layers out)"
        )
    if not layers or any(layer not in range(len(stack)) for layer in layers):
        raise UserError(
            f"student.layers={list(layers)} must be chosen from 0..{len(stack) - 1}, at least one"
        )
    kept = [copy.deepcopy(stack[layer]) for layer in layers]  # one may be named twice
    del stack[:]
    stack.extend(kept)
    model.config.num_hidden_layers = len(kept)
    for module in model.modules():
        for name in COUNTS.intersection(vars(module)):
            setattr(module, name, len(kept))
    for place, layer in enumerate(kept):
        for module in layer.modules():
            for name in NUMBERS.intersection(vars(module)):
                setattr(module, name, place)
    _check_built(model)


def _check_built(model: PreTrainedModel) -> None:
    """Raises UserError where the model is not what its own config builds: then something beside
    the list of layers goes by layer, and would be another when the model is read again."""
    built = {n: _facts(m) for n, m in outline(copy.deepcopy(model.config)).named_modules()}
    have = {name: _facts(module) for name, module in model.named_modules()}
    different = sorted(name for name in {**built, **have} if built.get(name) != have.get(name))
    if different:
        raise UserError(
            f"student.layers: a {model.config.model_type} of {model.config.num_hidden_layers} "
            f"layers is built otherwise in {different[0]} than the layers that were chosen; give "
            "the whole model (leave student.layers out)"
        )


def _facts(module: torch.nn.Module) -> dict[str, Any]:
    """What a module is, apart from its weights' values and from what lies inside it."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {
        **{name: value for name, value in plain.items() if not name.startswith("_")},
        "type": type(module).__name__,
        "shapes": {name: tensor.shape for name, tensor in tensors},
    }


def build_student(
    student: StudentConfig,
    task: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
    mean_score: float | None = None,
) -> PreTrainedModel:
    """The student at its start, fp32, on CPU: the same weights on every rank for one seed.

    A head that came with the checkpoint is kept when its label names align with the task's; else
    its layer that ends in classes is made again (from the seed). say: takes the line on what was
    loaded and what is new. mean_score: of the training rows of a regression task: the bias that a
    new head starts with, so that the student need not learn it first.
    """
    names = task.task_kind.outputs(task)
    changes: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        # never what the start says of itself
        "problem_type": task.task_kind.problem_type,
    }
    torch.manual_seed(seed)
    new_head = True
    if student.shape is not None:
        config = _shape_config(student.shape, tokenizer)
        config.update(changes)
        check_vocabulary(student.shape, tokenizer, config)
        model = new_classifier(config)
        account = f"start {student.shape}: all {len(model.state_dict())} tensors are new"
    elif student.path is not None:
        checkpoint = locate(student.path)
        own = load_model_config(checkpoint, trust_remote_code)
        check_vocabulary(checkpoint.name, tokenizer, own)
        model, account, new_head = _start_from(checkpoint, own, task, changes, trust_remote_code)
        account += _other_words(student, tokenizer)
        if student.layers is not None:
            keep_layers(model, student.layers)
            account += f"; of its layers {student.layers} are kept"
    else:
        raise UserError("no student is set; give student=DIR, a hub id, or student.shape=NAME")
    if mean_score is not None and new_head and _start_at(model, mean_score):
        account += f"; its head starts at the mean score of the training rows, {mean_score:.4g}"
    if say is not None:
        say(account)
    return model.float()


def _start_at(model: PreTrainedModel, mean_score: float) -> bool:
    """Give a new head of one score this bias; False where it has none."""
    _, final = final_layer(model)
    if final.bias is None:
        return False
    with torch.no_grad():
        final.bias.fill_(mean_score)
    return True


def _other_words(student: StudentConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What is to be said of a tokeniser that is given beside a start, whose embeddings are then
    those of other words."""
    if student.tokenizer is None or student.path is None:
        return ""
    folder = locate(student.path).folder
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return ""  # it came without words
    own, given = load_tokenizer(locate(student.path)).get_vocab(), tokenizer.get_vocab()
    other = sum(own.get(word) != place for word, place in given.items())
    if not other:
        return ""
    return (
        f"; WARNING: {other} of the {len(given)} words of student.tokenizer={student.tokenizer} "
        "have embeddings of other words, or new ones"
    )


def _start_from(
    checkpoint: Checkpoint,
    own: PretrainedConfig,
    task: TaskSpec,
    changes: dict[str, Any],
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, str, bool]:
    """The checkpoint's model with a head for the task, what is to be said of its weights, and
    whether the head's last layer is new."""
    model, loaded = load_start(checkpoint, trust_remote_code, **changes)
    name, final = final_layer(model)
    parts = {f"{name}.{part}": tensor for part, tensor in final.state_dict().items()}
    if parts.keys() & loaded.new:
        return model, loaded.describe(checkpoint.name), True
    order_C = _kept_order(checkpoint, own, task)
    if order_C is not None and not head_names(model) & loaded.new:
        _place_in_order(final, order_C)
        return model, loaded.describe(checkpoint.name), False
    _renew(final, getattr(model.config, "initializer_range", 0.02))
    classes = ", ".join(label_names(own))
    account = loaded.describe(checkpoint.name, parts) + f" (its head had the classes {classes})"
    return model, account, True


def _kept_order(checkpoint: Checkpoint, own: PretrainedConfig, task: TaskSpec) -> list[int] | None:
    """The checkpoint's column for each class of the task; None where its classes are others."""
    try:
        return align_classes(task, checkpoint.name, label_names(own), None)
    except UserError:
        return None


def _place_in_order(final: torch.nn.Linear, order_C: Sequence[int]) -> None:
    """A student that already has a head answers in the task's class order from now on."""
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.copy_(parameter[list(order_C)].clone())


def _renew(final: torch.nn.Linear, scale: float) -> None:
    """Weights for classes that are unknown are worth nothing: draw them again."""
    with torch.no_grad():
        final.weight.normal_(0.0, scale)
        if final.bias is not None:
            final.bias.zero_()
