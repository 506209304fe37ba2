"""Builds the student at its start: a checkpoint, layers of a model, or a new shape.

L tokens, H width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sead_dist.config.names import did_you_mean
from sead_dist.config.schema import StudentConfig
from sead_dist.config.yaml_text import read_yaml
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError, reading, reason
from sead_dist.models.hidden_states import (
    LayerParts,
    WantedLayers,
    body_of,
    find_layer_parts,
    layer_lists,
    layer_map,
    layer_stack,
)
from sead_dist.models.hidden_states import (
    reading as reading_layers,
)
from sead_dist.models.loaded import final_layer, head_names
from sead_dist.models.pretrained import (
    TOKENIZER_FILES,
    Checkpoint,
    check_vocabulary,
    embeddings_for,
    load_model_config,
    load_tokenizer,
    locate,
)
from sead_dist.models.sequence_classifier import (
    align_classes,
    label_names,
    load_start,
    new_classifier,
    outline,
)
from sead_dist.models.start import misspelt_field, shape_file, student_tokenizer
from sead_dist.runtime.run_log import tell

_log = logging.getLogger(__name__)

# attributes in which a layer and its parts hold their place among the layers
PLACES = {"layer_idx", "layer_id", "layer_index", "layer_number"}


def _shape_config(shape: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    path = shape_file(shape)
    fields = read_yaml(path)
    if not isinstance(fields, Mapping) or "model_type" not in fields:
        raise UserError(
            f"student.shape={shape} has no model_type; it must hold the fields of a "
            "Transformers config, such as model_type: bert and hidden_size: 256"
        )
    kind = fields["model_type"]
    if str(kind) not in CONFIG_MAPPING:
        # of equally near names the first is shown, and most shapes are berts
        known = ["bert", *CONFIG_MAPPING]
        hint = did_you_mean(str(kind), known, "give one of Transformers, such as bert")
        raise UserError(f"student.shape={shape}: unknown model_type {kind!r}; {hint}")
    given = {
        "vocab_size": embeddings_for(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }
    try:
        with reading(str(path), "see the fields of a Transformers config"):
            config = AutoConfig.for_model(**given)
            if problem := misspelt_field(config, fields):
                raise UserError(problem)
            if unknown := [name for name in fields if not hasattr(type(config)(), name)]:
                _log.warning("%s: a %s may not use %s", path, config.model_type, ", ".join(unknown))
            outline(config)
    except UserError as error:
        raise UserError(f"student.shape={shape}: {error}") from error
    return config


def check_start(student: StudentConfig, trust_remote_code: bool) -> None:
    """Raises UserError for a start that is missing or whose weights do not fit. It reads no
    weights, and so comes before anything that takes long."""
    tokenizer = load_tokenizer(student_tokenizer(student, None))
    if student.shape is not None:
        _shape_config(student.shape, tokenizer)
    elif student.path is not None:
        checkpoint = locate(student.path)
        config = load_model_config(checkpoint, trust_remote_code)
        check_vocabulary(checkpoint.name, tokenizer, config)
        model, _ = load_start(checkpoint, trust_remote_code, on_meta=True)
        if student.layers is not None:
            keep_layers(model, student.layers, trust_remote_code)


def keep_layers(
    model: PreTrainedModel, layers: Sequence[int], trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of these layers (0 is the first), in this order, and of all that is not in a layer.

    It is built from a config of so many layers, and takes its tensors from `model`. So it equals
    what is loaded from its files, also where a kind's layers differ (alternating attention, another
    first layer). Raises UserError where tensors are missing or left over, or where a layer would
    compute something else in its new place.
    """
    kind, lists = model.config.model_type, layer_lists(model)
    if len(lists) != 1 or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"student.layers: the layers of a {kind} cannot be chosen, since they are not one list "
            "of layers with weights of their own; give the whole model (leave student.layers out)"
        )
    ((name, stack),) = lists.items()
    if not layers or any(layer not in range(len(stack)) for layer in layers):
        raise UserError(
            f"student.layers={list(layers)} is not a list of layers of this model; give one or "
            f"more from 0..{len(stack) - 1}"
        )
    source = model.state_dict()
    beside = {key: one for key, one in source.items() if not key.startswith(f"{name}.")}
    kept = dict(beside)
    for place, layer in enumerate(layers):
        for key, tensor in stack[layer].state_dict().items():
            kept[f"{name}.{place}.{key}"] = tensor
    config = _config_of_layers(model.config, layers)
    # its new weights are overwritten, and later draws must not depend on them
    with torch.random.fork_rng(devices=[]):
        on_meta = any(tensor.is_meta for tensor in kept.values())
        cut = (outline if on_meta else new_classifier)(config, trust_remote_code)
    wanted = cut.state_dict()
    other = [key for key in {**kept, **wanted} if _shape(kept, key) != _shape(wanted, key)]
    parts = dict(cut.named_modules())
    for place, layer in enumerate(layers):
        here, there = _layer_facts(parts.get(f"{name}.{place}")), _layer_facts(stack[layer])
        other += [f"{name}.{place}.{part}" for part in there if there[part] != here.get(part)]
    if other:
        raise UserError(
            f"student.layers={list(layers)}: a {kind} of {len(layers)} layers differs in "
            f"{other[0]} from the layers that were chosen; keep layer 0 first and "
            "the order of the kinds of layers, or give the whole model (leave student.layers out)"
        )
    if not on_meta:
        cut.load_state_dict(kept)
    return cut.train(model.training)


def _config_of_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config of a model of these layers, as it is read from its file. Lists with a value for
    each layer (layer_types) keep the values of these layers."""
    depth, fields = config.num_hidden_layers, config.to_dict()
    for name, value in fields.items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            fields[name] = [value[layer] for layer in layers]
    count = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    fields[count] = len(layers)
    try:
        small = type(config).from_dict(fields)
        if small.num_hidden_layers != len(layers):
            raise ValueError(f"{count} does not set its number of layers")
        return small
    except Exception as error:  # kinds have many ways to count their layers
        raise UserError(
            f"student.layers={list(layers)}: a {config.model_type} of {len(layers)} layers cannot "
            f"be built: {reason(error)}; give the whole model (leave student.layers out)"
        ) from error


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _layer_facts(layer: torch.nn.Module | None) -> dict[str, Any]:
    """The types and plain attributes of a layer and its parts, without weights and place."""
    about: dict[str, Any] = {}
    for name, part in layer.named_modules() if layer is not None else ():
        about[f"{name} (kind)"] = type(part).__name__
        for field, value in vars(part).items():
            if not field.startswith("_") and field not in {"training", *PLACES} and _plain(value):
                about[f"{name}.{field}"] = value
    return about


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str)


def build_student(
    student: StudentConfig,
    task: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    trust_remote_code: bool = False,
    mean_score: float | None = None,
) -> PreTrainedModel:
    """The student at its start, fp32, on CPU: the same weights on every rank for one seed.

    The checkpoint's head is kept when its label names are the task's. Else its last layer is new
    (from the seed). A line names the weights that were loaded and those that are new. mean_score:
    the mean score of the training rows of a regression task. It becomes the bias of a new head,
    since a student would learn it first.
    """
    names = task.task_kind.outputs(task)
    changes: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        # the start's own value does not count
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
        account += _embedding_warning(student, tokenizer)
        if student.layers is not None:
            model = keep_layers(model, student.layers, trust_remote_code)
            account += f"; its layers {student.layers} are kept"
    else:
        raise UserError("no student is set; give student=DIR, a hub id, or student.shape=NAME")
    if mean_score is not None and new_head and _set_head_bias(model, mean_score):
        account += f"; its head starts at the mean score of the training rows, {mean_score:.4g}"
    tell(account)
    return model.float()


def _set_head_bias(model: PreTrainedModel, mean_score: float) -> bool:
    """Set the bias of a new head of one score; False where the head has none."""
    _, final = final_layer(model)
    if final.bias is None:
        return False
    with torch.no_grad():
        final.bias.fill_(mean_score)
    return True


def _embedding_warning(student: StudentConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """A warning where student.tokenizer has other words than the start's own tokeniser: their
    embeddings are then those of other words. Empty where there is nothing to warn of."""
    if student.tokenizer is None or student.path is None:
        return ""
    folder = locate(student.path).folder
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return ""  # the start has no tokeniser
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
    """(the checkpoint's model with a head for the task, a line on its weights, whether the head's
    last layer is new)."""
    model, loaded = load_start(checkpoint, trust_remote_code, **changes)
    name, final = final_layer(model)
    parts = {f"{name}.{part}": tensor for part, tensor in final.state_dict().items()}
    if parts.keys() & loaded.new:
        return model, loaded.describe(checkpoint.name), True
    try:
        order_C = align_classes(task, checkpoint.name, label_names(own), None)
    except UserError:  # its classes are others
        order_C = None
    with torch.no_grad():
        if order_C is not None and not head_names(model) & loaded.new:
            # from here on its logits have the task's class order
            for parameter in final.parameters():
                parameter.copy_(parameter[order_C].clone())
            return model, loaded.describe(checkpoint.name), False
        # weights for other classes are of no use
        final.weight.normal_(0.0, getattr(model.config, "initializer_range", 0.02))
        if final.bias is not None:
            final.bias.zero_()
    classes = ", ".join(label_names(own))
    account = loaded.describe(checkpoint.name, parts) + f" (its head had the classes {classes})"
    return model, account, True


def start_as_feature_teacher(student: PreTrainedModel, feature_teacher: PreTrainedModel) -> bool:
    """Copy the feature teacher's body into the student, where all shapes fit; of its layers, evenly
    spaced ones. (After Sanh et al. 2019, section 3: every second layer.) Returns whether they fit.

    Raises UserError where the student then computes something else from these weights.
    """
    if layer_stack(student) is None or layer_stack(feature_teacher) is None:
        return False  # its layers are not one list as long as its config gives
    own = find_layer_parts(student, "the student", attention=False)
    whole = find_layer_parts(feature_teacher, "the feature teacher", attention=False)
    numbers = layer_map(len(own.layers), len(whole.layers))
    chosen = replace(whole, layers=[whole.layers[number - 1] for number in numbers])
    mine, theirs = outside(student, own), outside(feature_teacher, whole)
    pairs = list(zip(own.layers, chosen.layers, strict=True))
    fits = (
        student.config.model_type == feature_teacher.config.model_type
        and shapes_of(mine) == shapes_of(theirs)
        and all(shapes_of(a.state_dict()) == shapes_of(b.state_dict()) for a, b in pairs)
    )
    if not fits:
        return False
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
    for one, other in pairs:
        one.load_state_dict(other.state_dict())
    check_same_states(
        states_of(student, own), states_of_layers(feature_teacher, chosen), feature_teacher.dtype
    )
    return True


def outside(model: PreTrainedModel, layer_parts: LayerParts) -> dict[str, torch.Tensor]:
    """The tensors of the body that are in none of its layers, by their names in the body."""
    inside = {
        id(tensor)
        for layer in layer_parts.layers
        for tensor in layer.state_dict(keep_vars=True).values()
    }
    body = body_of(model)
    state = (model if body is None else body[1]).state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if id(tensor) not in inside}


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor, by name."""
    return {name: tensor.shape for name, tensor in state.items()}


def check_same_states(
    mine: list[torch.Tensor], theirs: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Raises UserError where the student's hidden states differ from those of the feature teacher
    with these layers alone. Then their configs give different arithmetic."""
    for number, (own_RLH, their_RLH) in enumerate(zip(mine, theirs, strict=True)):
        off = float((own_RLH - their_RLH).abs().max() / their_RLH.abs().max().clamp(min=1.0))
        if not off <= (1e-3 if dtype == torch.float32 else 0.1):
            raise UserError(
                "student_init=feature_teacher: with that teacher's weights the student's hidden "
                f"states {number} differ from the teacher's by {off:.2g}; give a student whose "
                "config differs from the teacher's in its number of layers alone, or "
                "student_init=own"
            )


def states_of_layers(model: PreTrainedModel, layer_parts: LayerParts) -> list[torch.Tensor]:
    """`states_of` of a model that runs only these of its layers."""
    stack = layer_stack(model)
    assert stack is not None
    whole = list(stack)
    del stack[:]
    stack.extend(layer_parts.layers)
    try:
        return states_of(model, layer_parts)
    finally:
        del stack[:]
        stack.extend(whole)


def states_of(model: PreTrainedModel, layer_parts: LayerParts) -> list[torch.Tensor]:
    """The hidden states of eight token ids: the input of layer 1, then each layer's output; each
    [1, L, H]."""
    wanted = WantedLayers(tuple(range(len(layer_parts.layers) + 1)))
    ids_RL = torch.arange(8, device=model.device)[None] + min(8, model.config.vocab_size - 8)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), reading_layers(layer_parts, wanted) as found:
        model(input_ids=ids_RL, attention_mask=torch.ones_like(ids_RL))
    model.train(was_training)
    return [found.hidden[number].cpu() for number in wanted.hidden]
