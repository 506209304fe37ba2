"""Checkpoints, tokenisers, classifiers, and the alignment of their classes by label name.

The only file that imports AutoModel*. Weights are read from safetensors, or from older
`pytorch_model.bin` files with weights_only=True; nothing foreign is unpickled.
"""

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sead_dist.config import TeacherConfig
from sead_dist.errors import RunError, UserError
from sead_dist.tasks import TaskSpec, align_name

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
OLD_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin", "*.py"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights, and where it came from. `name` is what the person wrote."""

    name: str
    folder: Path
    revision: str | None


def locate(
    path: str, revision: str | None = None, marks: tuple[str, ...] = ("config.json",)
) -> Checkpoint:
    """The local folder of a checkpoint: a folder, a run folder (its model/), or a hub id.

    marks: file names of which a checkpoint's folder holds one.

    Raises UserError when it is not there, or the hub cannot be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        for place in (folder, folder / "model"):
            if any((place / mark).is_file() for mark in marks):
                return Checkpoint(path, place, revision)
        raise UserError(
            f"{path} holds no {' or '.join(marks)}; give a folder saved by save_pretrained"
        )
    name, _, tag = path.partition("@")
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1 or folder.exists():
        raise UserError(f"{path} is not a folder; give a checkpoint's folder or a hub id")
    try:
        found = snapshot_download(name, revision=tag or revision, allow_patterns=WANTED)
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"{path} is neither a folder nor reachable on the hub{offline}: "
            f"{type(error).__name__}; give a folder that exists, or check the id and the network"
        ) from None
    return Checkpoint(path, Path(found), Path(found).name)


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold the weights. Raises UserError when there are none."""
    for name in WEIGHT_FILES + OLD_WEIGHT_FILES:
        path = checkpoint.folder / name
        if path.is_file() and name.endswith(".index.json"):
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            files = [checkpoint.folder / shard for shard in sorted(shards)]
            if missing := [file.name for file in files if not file.is_file()]:
                raise UserError(f"{checkpoint.name} lacks the weights {missing[0]}; copy it there")
            return files
        if path.is_file():
            return [path]
    raise UserError(
        f"{checkpoint.name} holds no weights; "
        f"looked for {', '.join(WEIGHT_FILES + OLD_WEIGHT_FILES)}"
    )


def weights_hash(checkpoint: Checkpoint) -> str:
    """sha256 over the weight files' bytes."""
    digest = hashlib.sha256()
    for path in weight_files(checkpoint):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def load_model_config(checkpoint: Checkpoint, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint.name}: its config.json cannot be used: {reason}") from None


def load_tokenizer(
    checkpoint: Checkpoint, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A checkpoint's tokeniser. Raises UserError when there is none or it cannot pad."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{checkpoint.name}: no usable tokeniser: {reason}") from None
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{checkpoint.name}: its tokeniser has no padding token; "
            'set "pad_token" in its tokenizer_config.json'
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"{checkpoint.name}: its tokeniser has no vocabulary; "
            "copy tokenizer.json or vocab.txt into the folder"
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies what a tokeniser does to a text (truncation and padding are ours)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # version, truncation and padding come first; parsing a whole vocabulary takes long
        text = backend.to_str()
        rules = text[text.index('"added_tokens"') :]
    else:
        rules = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    extra = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.model_input_names]
    about = json.dumps(extra, sort_keys=True, default=str)
    return hashlib.sha256(f"{about}{rules}".encode()).hexdigest()


def position_limit(config: PretrainedConfig) -> int | None:
    """The most tokens a model's positions allow (RoBERTa's start after the padding index)."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return int(limit) - offset


def is_generic(names: Sequence[str]) -> bool:
    """LABEL_0, LABEL_1, ... say nothing about the classes."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def width(task: TaskSpec) -> int:
    """How many logits a model gives per text row."""
    return len(task.labels) if task.kind == "classification" else 1


def label_names(config: PretrainedConfig) -> list[str]:
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def align_classes(
    task: TaskSpec,
    model: str,
    names: Sequence[str],
    labels: Sequence[str] | str | None,
    mend: str | None = None,
) -> list[int]:
    """For each task class, the column of the model's own logits: order_C with
    logits_task = logits_model[:, order_C]. (Invariant 4; our own rule.)

    names: the model's label names; labels: what the person says they are, or "task_order"; mend:
    how to say it, ready to copy (default: a teacher's entry). Raises UserError with that line.
    """
    entry = f"{{path: {model}, labels: [{', '.join(task.labels)}]}}"
    mend = mend or f"{entry} or labels: task_order"
    if len(names) != width(task):
        raise UserError(
            f"{model} has num_labels={len(names)} but task {task.name} needs {width(task)}"
            + (f" ({', '.join(task.labels)})" if task.kind == "classification" else "")
            + "; give a model fine-tuned for this task"
        )
    if task.kind != "classification" or labels == "task_order":
        return list(range(len(names)))
    said = list(labels) if labels is not None else list(names)
    if labels is None and is_generic(names):
        raise UserError(
            f"{model} names its classes {', '.join(names)}, which says nothing of their order; "
            f"say the order that it was trained with: {mend}"
        )
    found = [align_name(task, name) for name in said]
    wrong = [name for name, index in zip(said, found, strict=True) if index is None]
    if wrong or sorted(index for index in found if index is not None) != list(range(len(names))):
        reason = f"{wrong[0]!r} is no label of" if wrong else "they are not one each of"
        raise UserError(
            f"{model} names its classes {', '.join(said)}: {reason} task {task.name}, whose "
            f"labels are {', '.join(task.labels)}; say what they mean, in its own order: {mend}"
        )
    return [found.index(index) for index in range(len(names))]


def load_classifier(
    checkpoint: Checkpoint,
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """A sequence classifier with its weights; `changes` go to its config (num_labels, ...).

    Raises UserError when a checkpoint without a classification head is asked to classify as it
    is (no `changes`).
    """
    files = weight_files(checkpoint)
    try:
        model, notes = AutoModelForSequenceClassification.from_pretrained(
            checkpoint.folder,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=files[0].suffix == ".safetensors",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **changes,
        )
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{checkpoint.name}: its weights cannot be read: {files[0].name} holds more than "
            f"tensors{f' ({asked[1]})' if asked else ''}, and code in it is never run; "
            "save it anew as model.safetensors where you trust it"
        ) from None
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{checkpoint.name}: its weights cannot be read: {reason}") from None
    missing = [key for key in notes["missing_keys"] if "position_ids" not in key]
    if missing and not changes:
        raise UserError(
            f"{checkpoint.name} lacks the weights {', '.join(sorted(missing)[:3])}, so it was "
            "never fine-tuned to classify; fine-tune it first (sead-dist finetune)"
        )
    return model


def build_teacher(
    entry: TeacherConfig, dtype: str, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """A teacher in eval mode, without gradients, in its dtype on its device."""
    checkpoint = locate(entry.path, entry.revision)
    model = load_classifier(checkpoint, dtype, trust_remote_code).to(device)
    for parameter in model.parameters():
        # weights mapped from a file lie at any address, and bits depend on their alignment
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def new_classifier(config: PretrainedConfig) -> PreTrainedModel:
    """A sequence classifier of this shape with new weights, from torch's seed."""
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int
) -> None:
    """model.safetensors, config with label names, and the tokeniser, as Transformers reads them.

    Written aside and renamed. Raises RunError when that fails.
    """
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside, safe_serialization=True)
        tokenizer.model_max_length = max_length
        tokenizer.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(
            f"the model cannot be written to {folder}: {error}; free space or mend the folder, "
            "then give the same command again"
        ) from error
