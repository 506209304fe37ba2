"""A pretrained checkpoint's folder: where it is, its weights' files, its config, its tokeniser.

Nothing here loads weights.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sead_dist.errors import UserError, reading
from sead_dist.models.letter_case import reject_lost_capitals
from sead_dist.runtime.files import files_hash

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ADAPTER = "adapter_config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
# one of these says of which kind a tokeniser is
KIND_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
OLD_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# a tokeniser is made of these where tokenizer.json is missing; the packages and modules for that
WORD_FILES = ("*.model", "*.tiktoken")
READ_BY = {
    "sentencepiece": {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"},
    "tiktoken": {"tiktoken": "tiktoken"},
}
# ends of files that no tokeniser is read from
NOT_WORDS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".md"),
    *(".png", ".svg"),
)
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "pytorch_model*.bin", "*.py"]
# kinds whose positions start after the padding index
OFFSET_POSITIONS = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert"),
    *("longformer", "mpnet", "data2vec-text", "ibert", "xmod", "luke"),
    *("esm", "lilt", "markuplm", "layoutlmv3"),
)
# kinds whose padding index is fixed by their code, whatever the config says
FIXED_PADDING = {"mpnet": 1}
# keys for the size of the table of positions; the first of them that a config has counts
LIMITS = ("max_position_embeddings", "n_positions", "max_source_positions", "max_seq_len")
# other keys of a config that hold whole numbers
COUNTED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "type_vocab_size", "pad_token_id"),
)
# keys of a config that do not change logits
NO_EFFECT = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype"),
    *("id2label", "label2id"),
)
# no size of a model is larger
LARGEST = 2**31
COPY = "fix it, or copy the whole folder again"
# kinds with relative positions, so that no table can end, whatever number their files hold
# (T5's n_positions, Funnel's max_position_embeddings, XLNet's -1)
UNLIMITED = ("bloom", "funnel", "mt5", "t5", "umt5", "xlnet")
# a tokeniser written in Python is identified also by the ids that it makes of these
PROBES = (
    "The film is a warm, funny and moving story of two old friends.",
    "  Don't: it's 12.50 \u20ac (or $13), at http://a.bc/d?e=1 @f #g \n\tok\u2026 \u201cno\u201d",
    "na\u00efve CAF\u00c9 Stra\u00dfe \u0130 e\u0301 \ufb01n \u00a0 \u200b x\u00b2",
    "\u041f\u0440\u0438 \u05e9\u05dc \u0645\u0631 \u0928\u092e \u3053\u4e16\u754c \U0001f600",
    "",
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights, and where it came from. name: what the person wrote. origin: the
    hash of the files that the weights were merged from, if they were."""

    name: str
    folder: Path
    revision: str | None
    origin: str | None = None


def locate(
    path: str,
    revision: str | None = None,
    marks: tuple[str, ...] = ("config.json",),
    offline: bool = False,
    as_teacher: bool = False,
) -> Checkpoint:
    """The local folder of a checkpoint: a folder, a run directory (its model/), or a hub id; of a
    LoRA adapter, the folder in which it is merged into its base.

    marks: file names of which a checkpoint's folder holds one. offline: of a hub id only what was
    fetched before. as_teacher: whether it is one of `teachers`, where a pattern can give several.
    Raises UserError when it is not there, or the hub cannot be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        for place in (folder, folder / "model"):
            if _is_adapter(place):
                return _merged(path, place, revision)
            if any((place / mark).is_file() for mark in marks):
                return Checkpoint(path, place, revision)
        if (folder / "run.json").is_file():
            raise UserError(f"the run {path} is not finished; give its command again")
        reject_several(path, marks, as_teacher)
        raise UserError(
            f"{path} holds no {' or '.join(marks)}; give a folder saved by save_pretrained"
        )
    name, _, tag = path.partition("@")
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1 or folder.exists():
        hint = f", or a file of predictions: {{predictions: {path}}}" if _is_data(folder) else ""
        raise UserError(f"{path} is not a folder; give a checkpoint's folder or a hub id{hint}")
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(
            name, revision=tag or revision, allow_patterns=WANTED, local_files_only=offline
        )
    except Exception as error:
        why = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"{path} is neither a folder nor reachable on the hub{why}: "
            f"{type(error).__name__}; give a folder that exists, or check the id and the network"
        ) from error
    if _is_adapter(Path(found)):
        return _merged(path, Path(found), Path(found).name)
    return Checkpoint(path, Path(found), Path(found).name)


def reject_several(
    path: str, marks: Sequence[str] = ("config.json",), as_teacher: bool = False
) -> None:
    """Raises UserError for a folder that holds checkpoints or runs and is none itself."""
    if any((Path(path) / mark).is_file() for mark in marks):
        return  # a student that was exported has its ONNX files in a folder of their own
    found = [
        child.name
        for child in sorted(Path(path).iterdir())
        if any((place / mark).is_file() for place in (child, child / "model") for mark in marks)
    ]
    every = f", or all: teachers={Path(path) / '*'}" if as_teacher else ""
    if found and found != ["model"]:
        raise UserError(
            f"{path} is a folder of models ({', '.join(found[:4])}{', ...' if found[4:] else ''}); "
            f"give one of them, such as {Path(path, found[0])}{every}"
        )


def _is_data(path: Path) -> bool:
    """Whether `path` is a file with a data file's ending."""
    from sead_dist.data.loading import EXTENSIONS  # it needs pyarrow

    return path.is_file() and path.suffix.lower() in EXTENSIONS


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone."""
    whole = any((folder / name).is_file() for name in WEIGHT_FILES + OLD_WEIGHT_FILES)
    return (folder / ADAPTER).is_file() and not whole


def _merged(name: str, folder: Path, revision: str | None) -> Checkpoint:
    from sead_dist.models.adapters import merged  # it needs torch

    return merged(name, folder, revision)


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold the weights. Raises UserError where there are none, or where an adapter
    is beside them: without peft, plain Transformers would leave it out."""
    if (checkpoint.folder / ADAPTER).is_file():
        raise UserError(
            f"{checkpoint.name} holds a whole model and an adapter ({ADAPTER}) beside it; give "
            "each a folder of its own, or merge them (merge_and_unload) and save the whole model"
        )
    for name in WEIGHT_FILES + OLD_WEIGHT_FILES:
        path = checkpoint.folder / name
        if path.is_file() and name.endswith(".index.json"):
            with reading(path, COPY, f"{checkpoint.name}: {name}"):
                files = [checkpoint.folder / shard for shard in _shards(checkpoint, path)]
                missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{checkpoint.name} lacks the file {missing[0]}; copy it there")
            return files
        if path.is_file():
            return [path]
    raise UserError(
        f"{checkpoint.name} holds no weights; give a folder that has one of "
        f"{', '.join(WEIGHT_FILES + OLD_WEIGHT_FILES)}"
    )


def _shards(checkpoint: Checkpoint, index: Path) -> list[str]:
    named = json.loads(index.read_text(encoding="utf-8"))
    shards = named.get("weight_map") if isinstance(named, dict) else None
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(shard, str) for shard in names):
        raise UserError(
            f"{checkpoint.name}: {index.name} has no weight_map that names the weights' files; "
            f"{COPY}"
        )
    return sorted(set(names))


def weights_hash(checkpoint: Checkpoint) -> str:
    """sha256 over the weight files' bytes, or of what they were merged from."""
    return checkpoint.origin or files_hash(weight_files(checkpoint))


def setting_hash(checkpoint: Checkpoint) -> str:
    """sha256 over the files beside the weights. Where it is equal, the tokeniser and the model's
    shape are equal."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and path.suffix not in NOT_WORDS:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def load_model_config(checkpoint: Checkpoint, trust_remote_code: bool) -> "PretrainedConfig":
    """A checkpoint's config.json. Raises UserError where it is not a config, or where its values
    have types that no model has."""
    from transformers import AutoConfig  # files are found and compared without it

    path = checkpoint.folder / "config.json"
    with reading(path, COPY, f"{checkpoint.name}: its config.json"):
        config = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        _check_types(config)
        return config


def _check_types(config: "PretrainedConfig") -> None:
    """Raises ValueError for values of types that no reader of a config expects."""
    names = config.id2label
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        raise ValueError(f"id2label is {names!r}, which does not name the classes 0, 1, ...")
    for key in (*LIMITS, *COUNTED):
        value = getattr(config, key, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{key} is {value!r}, not a whole number")
        if value is not None and abs(value) >= LARGEST:
            raise ValueError(f"{key} is {value}, too large for a model")
    for key in ("problem_type", "model_type"):
        if not isinstance(getattr(config, key, None), str | None):
            raise ValueError(f"{key} is {getattr(config, key)!r}, not a text")


def load_tokenizer(
    checkpoint: Checkpoint, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """A checkpoint's tokeniser. One without a padding token (GPT-2, Llama) pads with its end token.
    Raises UserError when there is none, it cannot pad, a package is missing, or capitals are lost.
    """
    from transformers import AutoTokenizer

    _check_packages(checkpoint)
    if not any((checkpoint.folder / name).is_file() for name in KIND_FILES):
        raise UserError(
            f"{checkpoint.name}: no file says of which kind its tokeniser is; "
            f"copy one of {', '.join(KIND_FILES)} of the same model into the folder"
        )
    with reading(checkpoint.folder, COPY, f"{checkpoint.name}: its tokeniser"):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if tokenizer.pad_token_id is None and _can_pad_with_end(tokenizer):
            tokenizer.pad_token = tokenizer.eos_token
        _try_out(tokenizer)
    reject_lost_capitals(checkpoint.name, checkpoint.folder, tokenizer)
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


def _check_packages(checkpoint: Checkpoint) -> None:
    """Raises UserError where the tokeniser's only file is read by a package that is missing."""
    folder = checkpoint.folder
    files = sorted(path for kind in WORD_FILES for path in folder.glob(kind))
    if not files or (folder / "tokenizer.json").is_file():
        return
    with reading(files[0], COPY), files[0].open("rb") as file:
        # lines of a word in base 64 and its number; a SentencePiece model is not a text
        extra = "tiktoken" if re.match(rb"[\w+/=]+ \d+\r?\n", file.read(200)) else "sentencepiece"
    lacking = [name for name, module in READ_BY[extra].items() if not _is_installed(module)]
    if lacking:
        raise UserError(
            f"{checkpoint.name}: its tokeniser is {files[0].name}, which needs the package "
            f"{lacking[0]}; pip install 'sead-dist[{extra}]', or save it again as tokenizer.json"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _can_pad_with_end(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether there is an end token that is added to no text. Only such a token can pad: models
    that look for the last token of a text look for the last one that is not padding."""
    end = tokenizer.eos_token_id
    return end is not None and end not in tokenizer(PROBES[0])["input_ids"]


def _try_out(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Use the tokeniser once, so that broken files raise here and not with the first row."""
    if tokenizer.pad_token_id is None or not len(tokenizer):
        return
    tokenizer(PROBES[0], PROBES[1])  # leaves no truncation behind
    int(tokenizer.model_max_length)
    tokenizer_hash(tokenizer)


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Identifies what a tokeniser does to a text (truncation and padding are ours)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # version, truncation and padding come first; parsing a whole vocabulary takes long
        text = backend.to_str()
        rules = text[text.index('"added_tokens"') :]
    else:
        rules = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    extra = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.model_input_names]
    if tokenizer.truncation_side != "right":
        extra.append(tokenizer.truncation_side)
    if getattr(tokenizer, "split_special_tokens", False):
        extra.append("split_special_tokens")
    if backend is None or is_own_code(type(tokenizer)):
        extra.append(_behaviour(tokenizer))
    about = json.dumps(extra, sort_keys=True, default=str)
    return hashlib.sha256(f"{about}{rules}".encode()).hexdigest()


def _behaviour(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What identifies a tokeniser written in Python besides its vocabulary: its files, and the ids
    that it makes of fixed texts, alone and as a pair."""
    names = [name for name in tokenizer.vocab_files_names.values() if name != "tokenizer.json"]
    files = [Path(tokenizer.name_or_path) / name for name in sorted(names)]
    return {
        "files": {f.name: files_hash([f]) for f in files if f.is_file()},
        "ids": [
            *(tokenizer(text)["input_ids"] for text in PROBES),
            tokenizer(PROBES[0], PROBES[1])["input_ids"],
        ],
    }


def is_own_code(kind: type) -> bool:
    """Whether a class is not of Transformers: it came with a checkpoint."""
    return kind.__module__.partition(".")[0] != "transformers"


def code_hash(checkpoint: Checkpoint, *kinds: type) -> str | None:
    """sha256 over the Python files that a checkpoint brings, and those of these classes; None where
    none of the classes is its own. The place of a file does not count."""
    own = [kind for kind in kinds if is_own_code(kind)]
    if not own:
        return None
    places = {*checkpoint.folder.rglob("*.py"), *(Path(inspect.getfile(kind)) for kind in own)}
    found = {(place.name, files_hash([place])) for place in places}
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def position_limit(config: "PretrainedConfig") -> int | None:
    """The most tokens a model's positions allow; None where they never end."""
    if config.model_type in UNLIMITED:
        return None
    sizes = (getattr(config, name, None) for name in LIMITS)
    limit = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if limit is None or config.model_type not in OFFSET_POSITIONS:
        return limit
    return limit - 1 - FIXED_PADDING.get(config.model_type, config.pad_token_id or 0)


def embeddings_for(tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many word embeddings a tokeniser needs. (The ids of its words may have gaps.)"""
    return max(len(tokenizer), 1 + int(max(tokenizer.get_vocab().values())))


def check_vocabulary(
    name: str, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig"
) -> None:
    """Raises UserError where the tokeniser has words that the model has no embeddings for."""
    size, words = getattr(config, "vocab_size", None), embeddings_for(tokenizer)
    if size is not None and words > size:
        raise UserError(
            f"{name} has {size} word embeddings but its tokeniser has {words} words; "
            "give the tokeniser that the model was trained with"
        )
