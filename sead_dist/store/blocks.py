"""Value blocks of the prediction store: what is in them, how they are written, read and checked.

K ids of the key block, M rows of a value block, C classes (the teacher's own, in its own order), U
ids of a table, P ids that a table and a key block share.

Every block is a safetensors file named by the hash of its content, so that writing the same rows
twice makes the same file, and a file whose content does not give its name is bad. The name of a
compacted block is the hash of the sums of its chunks, so that it is known without reading all rows.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sead_dist.store.ids import (
    Ints,
    Places,
    common,
    ensure_key_block,
    is_sorted_unique,
    read_key_block,
)
from sead_dist.store.layout import (
    BLOCK_SUFFIX,
    FORMAT,
    PLAIN_FORMAT,
    Layout,
    make_folder,
    set_aside,
    unreadable,
    write_aside,
)
from sead_dist.store.rows import WORD, Coverage, Logits, chunk_rows
from sead_dist.store.tensor_file import (
    BadBlockError,
    digest,
    read_tensors,
    write_tensors,
)

# What is checked of a block before it is used: its header alone; all but the rows of a compacted
# block, which are checked when they are first touched; all.
Check = Literal["header", "touched", "all"]


@dataclass(frozen=True)
class ValueBlock:
    """Logits [M, C] of one teacher key on those ids of one key block that it covers.

    written_at: seconds since the epoch; path: None before writing.
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
    """The folder under values/ of one teacher in one numerics class."""
    return f"{fingerprint[:16]}-{digest(numerics)[:8]}"


def read_value_block(path: Path, check: Check) -> ValueBlock:
    """A value block. Raises BadBlockError (truncated, altered, not a block, another teacher's),
    FileNotFoundError."""
    tensors, about = read_tensors(path)
    formats = {str(PLAIN_FORMAT), str(FORMAT)}
    if about.get("format") not in formats or about.get("kind") != "values":
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
            f"metadata of no value block ({type(error).__name__}: {error})"
        ) from error
    if block.folder != path.parent.name:
        raise BadBlockError(f"it belongs to the teacher in {block.folder}: foreign")
    _check_shapes(block, tensors)
    if check == "header":
        return block
    content = block.content_hash
    if path.name != content + BLOCK_SUFFIX or checksum != _checksum(content, about):
        raise BadBlockError("its content does not give its checksum: altered")
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
            raise BadBlockError(f"{sums.shape} sums for {num_chunks} chunks of rows")
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
    """What the header of the block says besides its tensors; `content` is its content hash."""
    about = {
        "format": str(FORMAT if block.compacted else PLAIN_FORMAT),
        "kind": "values",
        "keys": block.keys,
        "num_keys": str(block.covers.num_keys),
        "task": block.task,
        "split": block.split,
        "teacher": block.teacher,
        "numerics": block.numerics,
        "name": block.name,
        "runs": json.dumps(block.runs),
        "written_at": datetime.fromtimestamp(block.written_at, timezone.utc).isoformat(),
    }
    return {**about, "checksum": _checksum(content, about)}


def write_value_block(layout: Layout, block: ValueBlock, ids_K2: Ints, sound: set[str]) -> Path:
    """Write a plain value block, and before it whatever it needs; returns its path.

    A whole file of the same content is left as it is. `sound`: as in `ensure_key_block`. Raises
    RunError.
    """
    content = block.content_hash
    path = layout.values / block.folder / (content + BLOCK_SUFFIX)
    # Under the lock nobody removes as unused what the new block is about to use.
    with layout.lock("store.lock", exclusive=False):
        ensure_key_block(layout, block.keys, ids_K2, sound)
        describe_teacher(layout, block)
        try:
            read_value_block(path, "all")
        except (BadBlockError, OSError):
            tensors = {"logits": block.logits.values_MC, **block.covers.tensors}
            write_tensors(layout, path, tensors, metadata_of(block, content))
    return path


def describe_teacher(layout: Layout, block: ValueBlock) -> None:
    """Make the folder of the block's teacher, with its teacher.json, where it is missing."""
    path = layout.values / block.folder / "teacher.json"
    if path.exists():
        return
    make_folder(layout, path.parent)
    description = {
        "format": PLAIN_FORMAT,
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
    """A teacher.json. Those of earlier versions have no checksum.

    Raises BadBlockError where it is altered, FileNotFoundError.
    """
    try:
        description = json.loads(path.read_bytes())
        checksum = description.pop("checksum", None)
        fields = sorted(description) == ["classes", "fingerprint", "format", "name", "numerics"]
        if not fields or checksum not in (None, _description_checksum(description)):
            raise BadBlockError("its content does not give its checksum")
        folder = teacher_folder(description["fingerprint"], description["numerics"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadBlockError(f"not readable ({error})") from error
    if folder != path.parent.name:
        raise BadBlockError("it describes another teacher")
    return dict(description)


@dataclass(frozen=True, eq=False)
class IdSet:
    """The ids of a table, sorted and unique, int64 [U, 2], with the hash that names them."""

    ids_U2: Ints
    hash: str


class BlockReader:
    """What the tables of one process have in common. `report` receives one-line notices."""

    def __init__(self, layout: Layout, report: Callable[[str], None]) -> None:
        self.layout, self.report = layout, report
        self.sound_keys: set[str] = set()
        self._id_sets: dict[int, IdSet] = {}
        self._shared: dict[tuple[str, str], tuple[int, Places, Places]] = {}

    def id_set(self, ids_U2: Ints) -> IdSet:
        """Worked out once for an array, since the tables of all teachers have the same."""
        if id(ids_U2) not in self._id_sets or self._id_sets[id(ids_U2)].ids_U2 is not ids_U2:
            if ids_U2.ndim != 2 or ids_U2.shape[1] != 2 or not is_sorted_unique(ids_U2):
                raise ValueError(f"ids {ids_U2.shape} should be [U, 2], sorted and unique")
            self._id_sets[id(ids_U2)] = IdSet(ids_U2, digest("keys", ids_U2))
        return self._id_sets[id(ids_U2)]

    def set_aside(self, path: Path, reason: object) -> None:
        target = set_aside(self.layout, path)
        where = f"moved to {target.parent.name}/" if target else "could not be moved away"
        self.report(f"store: {path.parent.name}/{path.name} is bad ({reason}); {where}")

    def read_block(self, path: Path) -> ValueBlock | None:
        """The block at `path`, checked as far as its rows are not when they are read; None where it
        is bad (set aside) or gone."""
        try:
            return read_value_block(path, "touched")
        except FileNotFoundError:
            return None
        except BadBlockError as error:
            self.set_aside(path, error)
            return None
        except OSError as error:
            raise unreadable(path, error) from error

    def shared(self, block: ValueBlock, ids: IdSet) -> tuple[Places, Places]:
        """The ids that the block's key block and a set share: their places in either.

        Worked out once per pair of id sets. Raises BadBlockError, FileNotFoundError.
        """
        if (block.keys, ids.hash) not in self._shared:
            path = self.layout.key_path(block.keys)
            try:
                ids_K2 = read_key_block(path)
            except BadBlockError as error:
                self.set_aside(path, error)
                raise BadBlockError(f"its key block {block.keys} is bad") from error
            self._shared[block.keys, ids.hash] = (len(ids_K2), *common(ids_K2, ids.ids_U2))
        num_keys, places_P, entries_P = self._shared[block.keys, ids.hash]
        check_num_keys(block, num_keys)
        return places_P, entries_P

    def mend_keys(self, ids: IdSet) -> None:
        """Make sure that the key block of these ids is there, since blocks refer to it."""
        if ids.hash in self.sound_keys:
            return
        with self.layout.lock("store.lock", exclusive=False):
            trouble = ensure_key_block(self.layout, ids.hash, ids.ids_U2, self.sound_keys)
        if trouble:
            self.report(f"store: keys/{trouble}; moved to quarantine/ and written again")


def check_num_keys(block: ValueBlock, num_keys: int) -> None:
    """Raises BadBlockError where the block was made for another number of keys."""
    if num_keys != block.covers.num_keys:
        raise BadBlockError(f"{block.covers.num_keys} keys, its key block has {num_keys}")


def list_blocks(folder: Path) -> list[Path]:
    """Value blocks in a folder, largest first: one merged block may make the rest needless."""
    sizes: list[tuple[int, str]] = []
    try:
        for path in folder.iterdir():
            if path.suffix == BLOCK_SUFFIX:
                with suppress(FileNotFoundError):
                    sizes.append((-path.stat().st_size, path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, error) from error
    return [folder / name for _, name in sorted(sizes)]
