"""Merges a LoRA adapter into the classifier that it was trained on.

The merged model is kept in the user's cache as an ordinary model folder. Packs, shards, 8-bit
weights and pool workers read it like any teacher. Its identity is a hash of the files of adapter
and base. The merged weights are not part of it, since another machine may round them differently.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sead_dist.errors import UserError, reading, reason, rejection
from sead_dist.models.loaded import final_layer, first_few, reject_gaps, reject_leftovers
from sead_dist.models.pretrained import (
    ADAPTER,
    COPY,
    NOT_WORDS,
    TOKENIZER_FILES,
    Checkpoint,
    load_model_config,
    locate,
    setting_hash,
    weights_hash,
)
from sead_dist.models.sequence_classifier import outline, read_classifier
from sead_dist.runtime.files import cache_place, files_hash, folder_aside, sweep_old

RULES = "merge-1"
WEIGHTS = "adapter_model.safetensors"
# what peft puts before the names of a model's tensors
PREFIX = "base_model.model."


def merged(name: str, folder: Path, revision: str | None) -> Checkpoint:
    """The checkpoint of an adapter merged into its base. It is merged where the cache lacks it.

    Raises UserError for an adapter that is not a LoRA of a classifier, for one whose base is not
    found, and for one that does not fit its base.
    """
    facts = _facts(name, folder)
    base = _base_of(name, folder, facts)
    own = Checkpoint(name, folder, revision)
    with reading(folder / WEIGHTS, COPY):
        parts = [RULES, files_hash([folder / WEIGHTS]), setting_hash(own)]
    parts += [weights_hash(base), setting_hash(base)]
    identity = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    place = cache_place("merged", "SEAD_DIST_MERGED=DIR")
    target = place / identity
    found = Checkpoint(name, target, revision, identity)
    if target.is_dir():
        return found
    if find_spec("peft") is None:
        raise UserError(
            f"{name} is a LoRA adapter, and the package peft is not installed; "
            "pip install 'sead-dist[peft]', or merge it (merge_and_unload) and save the whole model"
        )
    try:
        place.mkdir(parents=True, exist_ok=True)
        sweep_old(place)
        # merging draws weights that it overwrites, and the caller's draws must not depend on the
        # cache
        with folder_aside(target, replaces=False) as aside, torch.random.fork_rng(devices=[]):
            _merge(own, base, aside)
    except (OSError, SafetensorError) as error:
        if target.is_dir():
            return found  # another process merged it first
        raise rejection(
            f"{name} cannot be merged in {place}: {reason(error)}; free space or get permission to "
            "write there, or set SEAD_DIST_MERGED=DIR",
            error,
        ) from error
    return found


def _facts(name: str, folder: Path) -> Mapping[str, Any]:
    """The fields of the adapter's config. Raises UserError for a kind of adapter that is not merged
    here."""
    with reading(folder / ADAPTER, COPY, f"{name}: {ADAPTER}"):
        facts = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    facts = facts if isinstance(facts, dict) else {}
    if facts.get("peft_type") != "LORA" or facts.get("task_type") != "SEQ_CLS":
        raise UserError(
            f"{name} is an adapter with peft_type={facts.get('peft_type')} and "
            f"task_type={facts.get('task_type')}; give one with peft_type=LORA and "
            "task_type=SEQ_CLS, or the whole model"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{name} is an adapter and holds no {WEIGHTS}; save it again with peft")
    return facts


def _base_of(name: str, folder: Path, facts: Mapping[str, Any]) -> Checkpoint:
    base = facts.get("base_model_name_or_path")
    about = f"{name} is an adapter of {base} (base_model_name_or_path in its {ADAPTER})"
    if not isinstance(base, str) or Path(base).resolve() == folder.resolve():
        raise UserError(f"{about}, which is not a model; write the base's folder or hub id there")
    try:
        return locate(base, facts.get("revision"))
    except UserError as error:
        raise UserError(f"{about}: {error}") from error


def _merge(adapter: Checkpoint, base: Checkpoint, folder: Path) -> None:
    """Write the merged model and its tokeniser to `folder`, in fp32."""
    from peft import PeftModel, get_peft_model_state_dict

    with (
        reading(adapter.folder / WEIGHTS, COPY),
        safe_open(adapter.folder / WEIGHTS, framework="pt") as file,
    ):
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    config = load_model_config(base, False)
    head, _ = final_layer(outline(config))
    classes = shapes.get(f"{PREFIX}{head}.weight", [config.num_labels])[0]
    given: dict[str, Any] = {} if classes == config.num_labels else {"num_labels": classes}
    if (adapter.folder / "config.json").is_file():
        own = load_model_config(adapter, False)
        given = {"id2label": own.id2label, "label2id": own.label2id}
    model, loaded = read_classifier(base, "fp32", False, **given)
    who = f"adapter {adapter.name} of {base.name}"
    reject_gaps(who, model, loaded, {name.removeprefix(PREFIX) for name in shapes})
    reject_leftovers(base.name, model, loaded.unused)
    with reading(adapter.folder, COPY, who), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = PeftModel.from_pretrained(model, adapter.folder, torch_device="cpu")
        read = get_peft_model_state_dict(both, save_embedding_layers=False)
        whole = both.merge_and_unload(safe_merge=True)
    if other := shapes.keys() ^ read.keys():
        raise UserError(
            f"{who}: the adapter does not fit this base in {first_few(other)}; give the base that "
            "the adapter was trained on"
        )
    whole.save_pretrained(folder)
    words = next((one.folder for one in (adapter, base) if _has_words(one.folder)), None)
    for path in () if words is None else words.iterdir():
        other_use = path.name in ("config.json", ADAPTER) or path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in NOT_WORDS and not other_use:
            shutil.copyfile(path, folder / path.name)


def _has_words(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
