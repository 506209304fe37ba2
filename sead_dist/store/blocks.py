"""Value blocks of the prediction store: their content, and how they are written, read and checked.

K ids of the key block, M rows of a value block, C classes (the teacher's own, in its own order), U
ids of a table, P ids that a table and a key block share.

Every block is a safetensors file that is named by a hash of its content. So writing the same rows
twice makes the same file, and a file whose content does not give its name is bad. The name of a
compacted block is made from the sums of its chunks instead of its rows, so that it can be checked
without reading all rows.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sead_dist.store.ids import Ints, ensure_key_block
from sead_dist.store.layout import (
    BLOCK_SUFFIX,
    Layout,
    make_folder,
    write_aside,
)
from sead_dist.store.rows import WORD, Coverage, Logits, chunk_rows
from sead_dist.store.tensor_file import BadBlockError, digest, read_tensors, write_tensors

# What is checked before a block is used: only its header; all but the rows of a compacted block,
# which are checked when they are first read; or all.
Check = Literal["header", "touched", "all"]
# The form in a block's header: as a run writes it, or as a compaction does.
PLAIN, COMPACT = "1", "2"
# The order of tensors in a compacted block.
COMPACTED = ("words", "sums", "rows", "logits")


@dataclass(frozen=True)
class ValueBlock:
    """Logits [M, C] of one teacher key, for those ids of one key block that it covers.

    keys: the hash of the key block. written_at: seconds since the epoch. path: None before writing.
    """

    keys: str
    task: str
    split: str
    teacher: str
    numerics: str
    name: str
    runs: tuple[str, ...]
    written_at: float
    covers: Coverage
    logits: Logits
    path: Path | None = None
    num_bytes: int = 0

    @property
    def compacted(self) -> bool:
        return self.logits.sums_S is not None

    @property
    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors of its file. In a compacted block they are in the order in which each begins
        at a multiple of its items' size."""
        tensors = {"logits": self.logits.values_MC, **self.covers.tensors}
        if self.logits.sums_S is None:
            return tensors
        tensors["sums"] = self.logits.sums_S
        return {name: tensors[name] for name in COMPACTED if name in tensors}

    @property
    def content_hash(self) -> str:
        about = [self.keys, str(self.covers.num_keys), self.task, self.split]
        about += [self.teacher, self.numerics]
        values, sums = self.logits.values_MC, self.logits.sums_S
        if sums is not None:
            parts = self.covers.tensors
            named = [part for name in sorted(parts) for part in (name, parts[name])]
            return digest("compacted", *about, *named, str(values.shape), sums)
        rows = np.empty(0, np.int32) if self.covers.rows_M is None else self.covers.rows_M
        return digest("values", *about, rows, str(values.shape), values)

    @property
    def folder(self) -> str:
        return teacher_folder(self.teacher, self.numerics)


def teacher_folder(fingerprint: str, numerics: str) -> str:
    """The name of the folder under values/ for one teacher in one numerics class."""
    return f"{fingerprint[:16]}-{digest(numerics)[:8]}"


def read_value_block(path: Path, check: Check) -> ValueBlock:
    """The value block in this file. Raises BadBlockError where it is truncated, altered, not a
    block or another teacher's, and FileNotFoundError."""
    tensors, about = read_tensors(path)
    if about.get("format") not in (PLAIN, COMPACT) or about.get("kind") != "values":
        raise BadBlockError("not a value block of this format")
    try:
        num_keys = int(about["num_keys"])
        block = ValueBlock(
            keys=about["keys"],
            task=about["task"],
            split=about["split"],
            teacher=about["teacher"],
            numerics=about["numerics"],
            name=about["name"],
            runs=tuple(json.loads(about["runs"])),
            written_at=datetime.fromisoformat(about["written_at"]).timestamp(),
            covers=Coverage(num_keys, tensors.pop("rows", None), tensors.pop("words", None)),
            logits=Logits(tensors.pop("logits"), tensors.pop("sums", None), path),
            path=path,
            num_bytes=path.stat().st_size,
        )
        checksum = about.pop("checksum")
    except (KeyError, ValueError, TypeError) as error:
        raise BadBlockError(
            f"its metadata is not that of a value block ({type(error).__name__}: {error})"
        ) from error
    if block.folder != path.parent.name:
        raise BadBlockError(f"it belongs to another teacher, the one in {block.folder}")
    _check_shapes(block, tensors)
    if check == "header":
        return block
    content = block.content_hash
    if path.name != content + BLOCK_SUFFIX or checksum != _checksum(content, about):
        raise BadBlockError("its content does not match its checksum: altered")
    if trouble := block.covers.trouble():
        raise BadBlockError(trouble)
    if check == "all" and (chunks := block.logits.bad_chunks()):
        altered = sum(len(chunk) for chunk in chunks)
        raise BadBlockError(f"{altered} of its {len(block.logits.values_MC)} rows are altered")
    return block


def _check_shapes(block: ValueBlock, other_tensors: dict[str, npt.NDArray[Any]]) -> None:
    logits, sums = block.logits.values_MC, block.logits.sums_S
    rows, words = block.covers.rows_M, block.covers.words
    if other_tensors or logits.dtype != np.float32 or logits.ndim != 2 or not logits.size:
        raise BadBlockError("not a value block: logits should be float32 [M, C]")
    if sums is not None:
        num_chunks = -(-len(logits) // chunk_rows(logits.shape[1]))
        if sums.dtype != np.uint64 or sums.shape != (num_chunks,):
            raise BadBlockError(f"sums of shape {sums.shape} for {num_chunks} chunks of rows")
    if rows is not None and (rows.dtype != np.int32 or rows.ndim != 1):
        raise BadBlockError("not a value block: rows should be int32 [M]")
    num_words = -(-block.covers.num_keys // WORD)
    if words is not None and (words.dtype != np.uint64 or words.shape != (num_words,)):
        raise BadBlockError(f"not a value block: words should be uint64 [{num_words}]")
    if len(logits) != block.covers.num_rows:
        raise BadBlockError(f"{len(logits)} rows of logits for {block.covers.num_rows} keys")


def _checksum(content: str, about: dict[str, str]) -> str:
    return digest(content, json.dumps(about, sort_keys=True))


def metadata_of(block: ValueBlock, content: str) -> dict[str, str]:
    """The metadata in the header of the block's file. content: its content hash."""
    about = {
        "format": COMPACT if block.compacted else PLAIN,
        "kind": "values",
        "keys": block.keys,
        "num_keys": str(block.covers.num_keys),
        "task": block.task,
        "split": block.split,
        "teacher": block.teacher,
        "numerics": block.numerics,
        "name": block.name,
        "runs": json.dumps(block.runs),
        "written_at": datetime.fromtimestamp(block.written_at, UTC).isoformat(),
    }
    return {**about, "checksum": _checksum(content, about)}


def write_value_block(
    layout: Layout, block: ValueBlock, ids_K2: Ints, sound: set[str]
) -> tuple[Path, bool]:
    """Write a value block, and before it the key block and the teacher.json that it needs.

    Returns its path, and whether the file is new. A whole file of the same content stays as it is.
    sound: as in `ensure_key_block`. Raises RunError.
    """
    content = block.content_hash
    path = layout.values / block.folder / (content + BLOCK_SUFFIX)
    # Under the lock no process removes as unused what the new block is about to use.
    with layout.lock("store.lock", exclusive=False):
        ensure_key_block(layout, block.keys, ids_K2, sound)
        describe_teacher(layout, block)
        try:
            read_value_block(path, "all")
            return path, False
        except (BadBlockError, OSError):
            write_tensors(layout, path, block.tensors, metadata_of(block, content))
    return path, True


def describe_teacher(layout: Layout, block: ValueBlock) -> None:
    """Make the folder of the block's teacher and its teacher.json, if that file is missing."""
    path = layout.values / block.folder / "teacher.json"
    if path.exists():
        return
    make_folder(layout, path.parent)
    description = {
        "format": 1,
        "name": block.name,
        "fingerprint": block.teacher,
        "numerics": block.numerics,
        "classes": block.logits.values_MC.shape[1],
    }
    checked = {**description, "checksum": _description_checksum(description)}
    write_aside(layout, path, [json.dumps(checked, indent=1).encode()])


def _description_checksum(description: dict[str, Any]) -> str:
    return digest(json.dumps(description, sort_keys=True))


def read_description(path: Path) -> dict[str, Any]:
    """The content of a teacher.json. Files of earlier versions have no checksum.

    Raises BadBlockError where it is altered, and FileNotFoundError.
    """
    try:
        description = json.loads(path.read_bytes())
        checksum = description.pop("checksum", None)
        fields = sorted(description) == ["classes", "fingerprint", "format", "name", "numerics"]
        if not fields or checksum not in (None, _description_checksum(description)):
            raise BadBlockError("its content does not match its checksum")
        folder = teacher_folder(description["fingerprint"], description["numerics"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadBlockError(f"it cannot be read ({error})") from error
    if folder != path.parent.name:
        raise BadBlockError("it describes another teacher")
    return dict(description)


def check_num_keys(block: ValueBlock, num_keys: int) -> None:
    """Raises BadBlockError where the block was made for another number of keys."""
    if num_keys != block.covers.num_keys:
        raise BadBlockError(
            f"it is for {block.covers.num_keys} keys, but its key block has {num_keys}"
        )
