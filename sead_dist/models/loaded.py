"""Which tensors of a model came from a checkpoint's files, and which may be new (invariant 11).

Transformers gives every tensor that it does not find a random value, and goes on. Here each such
tensor must belong to a head that is to be new. Else the checkpoint is rejected, with the names.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from sead_dist.errors import RunError, UserError
from sead_dist.models.hidden_states import body_of, layer_stack

# what a wrapper puts before the names of a model's tensors; wrappers are DataParallel,
# torch.compile, sentence encoders, and the training loops of distillation
WRAPPER = re.compile(r"(?:module|model|student|encoder_model|_orig_mod|(?:\d+\.)?auto_model)\.")
# a message gives at most so many names
MOST_NAMED = 3
# buffers in layers, which older versions of Transformers saved; they are computed, not learned (the
# last three hold a causal mask)
OLD_BUFFERS = (
    *("masked_bias", "inv_freq", "position_ids"),
    *("attn.bias", "attn.attention.bias", "causal_mask"),
)


@dataclass(frozen=True)
class Loaded:
    """What of a model came from its files, by names of tensors.

    total: how many tensors the model has. missing: those that no file holds. mismatched: (name,
    shape in the file, shape in the model). unused: those of the files that the model has no place
    for. prefix: what was removed from the start of the names in the files.
    """

    total: int
    missing: frozenset[str]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unused: frozenset[str]
    prefix: str = ""

    @property
    def new(self) -> frozenset[str]:
        """The tensors that are drawn at random."""
        return self.missing | {name for name, _, _ in self.mismatched}

    def describe(self, who: str, redrawn: Iterable[str] = ()) -> str:
        """One line for the log. redrawn: tensors that came from the files and were drawn again."""
        new = sorted({*self.new, *redrawn})
        line = f"start {who}: {self.total - len(new)} of {self.total} tensors loaded; new: "
        line += ", ".join(new) or "none"
        if self.prefix:
            line += f"; the prefix {self.prefix!r} was removed from the names in its files"
        if self.unused:
            line += f"; not used from its files: {first_few(self.unused)}"
        return line


def first_few(names: Iterable[str]) -> str:
    """The first few of these names, and how many more there are."""
    known = sorted(names)
    more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    return ", ".join(known[:MOST_NAMED]) + more


def wrapper_prefixes(name: str) -> list[str]:
    """The prefixes of this name that wrappers may have put there, shortest first."""
    found: list[str] = []
    at = 0
    while match := WRAPPER.match(name, at):
        at = match.end()
        found.append(name[:at])
    return found


def bare_names(name: str) -> list[str]:
    """A file's name of a tensor without each of its `wrapper_prefixes`."""
    return [name.removeprefix(prefix) for prefix in wrapper_prefixes(name)]


def wrapper_prefix(loaded: Loaded, body: str) -> str | None:
    """The prefix to remove from the names in the files: the one that gives the most unused tensors
    the name of a missing one. None where none does. body: the name of the model's body, or ""."""
    counts: Counter[str] = Counter()
    for name in loaded.unused:
        for prefix in wrapper_prefixes(name):
            bare = name.removeprefix(prefix)
            counts[prefix] += bare in loaded.missing or f"{body}.{bare}" in loaded.missing
    best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default=None)
    return best if best is not None and counts[best] else None


def final_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """(name, layer) of the linear layer that gives the classes: the last one with an output for
    each class outside the body, else in the body. Raises UserError where there is none."""
    body = body_of(model)
    inside = set() if body is None else {id(module) for module in body[1].modules()}
    wide = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    outside = [pair for pair in wide if id(pair[1]) not in inside]
    if not wide:
        raise UserError(
            f"a {model.config.model_type} classifier has no linear layer with one output for each "
            f"of its {model.config.num_labels} classes; give a model of another kind"
        )
    return (outside or wide)[-1]


def head_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors outside the body, which classify. Where all tensors are in the body,
    those of the layer that gives the classes."""
    body = body_of(model)
    start = "" if body is None else f"{body[0]}."
    outside = {name for name in model.state_dict() if not name.startswith(start)}
    if outside:
        return outside
    name, final = final_layer(model)
    return {f"{name}.{part}" for part in final.state_dict()}


def pooler_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors of the body's pooler, which checkpoints of language models lack."""
    body = body_of(model)
    start = "pooler." if body is None else f"{body[0]}.pooler."
    return {name for name in model.state_dict() if name.startswith(start)}


def reject_gaps(who: str, model: PreTrainedModel, loaded: Loaded, may_be_new: set[str]) -> None:
    """Raises UserError, with their names, where tensors other than `may_be_new` are not from the
    files.

    who: what the message calls the checkpoint.
    """
    mismatched = [found for found in loaded.mismatched if found[0] not in may_be_new]
    if mismatched:
        name, theirs, ours = mismatched[0]
        raise UserError(
            f"{who}: {len(mismatched)} of {loaded.total} tensors have other shapes in its files "
            f"than its config.json sets, such as {name}: {list(theirs)} in the file, {list(ours)} "
            "by the config; give the config.json that belongs to these weights"
        )
    # positions are counted, not learned
    missing = {n for n in loaded.missing - may_be_new if not n.endswith("position_ids")}
    if missing:
        others = f", which hold {first_few(loaded.unused)} instead" if loaded.unused else ""
        raise UserError(
            f"{who}: {len(missing)} of {loaded.total} tensors of a {model.config.model_type} are "
            f"not in its files{others}: {first_few(missing)}; give a checkpoint whose files hold "
            "them under the names that Transformers uses (save_pretrained writes them so)"
        )


def reject_leftovers(who: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Raises UserError, with their names, where a trained model's files hold more than the model
    takes: layers beyond its depth, adapters on its modules, a second copy of its tensors. A pooler
    or a language model's head is allowed where the classifier does not use it.

    who: as for `reject_gaps`. unused: the names that the model has no place for.
    """
    modules, body, stack = dict(model.named_modules()), body_of(model), layer_stack(model)
    in_layers = tuple(f"{name}." for name, module in modules.items() if module is stack)
    names = set(model.state_dict())
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def belongs(name: str) -> bool:
        """Whether a tensor of this name would be a part of the model."""
        owner = modules.get(name.rpartition(".")[0])
        beside_others = owner is not None and len(list(owner.parameters(recurse=False))) > 0
        return beside_others or name in names or name.startswith(in_layers)

    left = set()
    for name in unused:
        if name.endswith(OLD_BUFFERS) or any(one.search(name) for one in ignored):
            continue
        possible = [name, *bare_names(name)]
        if body is not None:
            possible += [f"{body[0]}.{one}" for one in possible]
        if any(belongs(one) for one in possible):
            left.add(name)
    if left:
        raise UserError(
            f"{who}: its files hold {len(left)} tensors that a {model.config.model_type} of its "
            f"config.json has no place for: {first_few(left)}; give the config.json that belongs "
            "to these weights, or save the model again with adapters merged and without copies"
        )


def check_whole(model: nn.Module, names: Collection[str], folder: Path) -> None:
    """Raises RunError with its name for a tensor that a checkpoint lacks or has too many. A shared
    tensor is in it under one name only."""
    state = model.state_dict(keep_vars=True)
    held = {tensor.data_ptr() or id(tensor) for name, tensor in state.items() if name in names}
    lost = [n for n, tensor in state.items() if (tensor.data_ptr() or id(tensor)) not in held]
    strange = [name for name in names if name not in state]
    if lost or strange:
        which = f"lacks the tensor {lost[0]}" if lost else f"holds the unknown tensor {strange[0]}"
        raise RunError(
            f"{folder / 'student.safetensors'} {which}, so it is not a checkpoint of this student; "
            f"remove {folder} to continue from an earlier one, or give another output_dir"
        )
