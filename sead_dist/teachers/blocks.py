"""Block files of the prediction store: what is in them, how they are written, read and checked.

K ids of a key block, M rows of a value block, C classes (the teacher's own, in its own order).
Every block is a safetensors file named by the hash of its content, so that writing the same rows
twice makes the same file, and a file whose content does not give its name is bad. The files are
laid out here rather than by the safetensors library because its NumPy side cannot map a file into
memory and hides the errno of a full disk; the library reads what is written here, and the reverse.
"""

import errno
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from sead_dist.teachers.layout import (
    BLOCK_SUFFIX,
    FORMAT,
    Layout,
    make_folder,
    set_aside,
    write_aside,
)

Ints = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 1 << 24
# Larger files are mapped, smaller ones read: few mappings stay open, and what was read does not
# depend on its file any more.
MAP_BYTES = 4 << 20


class BadBlockError(Exception):
    """A file that is not a whole and unaltered block; the text says why."""


@dataclass(frozen=True)
class ValueBlock:
    """Logits of one teacher key on rows of one key block.

    logits_MC: float32 [M, C]; rows_M: int32 [M], increasing positions in the key block, None where
    they are all of its `num_keys`; written_at: seconds since the epoch; path: None before writing.
    """

    keys: str
    num_keys: int
    task: str
    split: str
    teacher: str
    numerics: str
    name: str
    runs: tuple[str, ...]
    written_at: float
    logits_MC: Floats
    rows_M: npt.NDArray[np.int32] | None
    path: Path | None = None
    num_bytes: int = 0

    @property
    def content_hash(self) -> str:
        rows = np.empty(0, np.int32) if self.rows_M is None else self.rows_M
        about = [self.keys, str(self.num_keys), self.task, self.split, self.teacher, self.numerics]
        return digest("values", *about, rows, str(self.logits_MC.shape), self.logits_MC)

    @property
    def folder(self) -> str:
        return teacher_folder(self.teacher, self.numerics)


def digest(*parts: str | npt.NDArray[Any]) -> str:
    """128 bits in hex (xxh3) of strings and arrays; every part counts with its length.

    Guards against accidents, not against an enemy with write access; at the speed of memory, so
    that 100 million rows can be checked on opening.
    """
    hasher = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, str):
            data = part.encode()
            hasher.update(len(data).to_bytes(8, "little"))
            hasher.update(data)
        else:
            hasher.update(part.nbytes.to_bytes(8, "little"))
            hasher.update(as_bytes(part).data)
    return hasher.hexdigest()


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def teacher_folder(fingerprint: str, numerics: str) -> str:
    """The folder under values/ of one teacher in one numerics class."""
    return f"{fingerprint[:16]}-{digest(numerics)[:8]}"


def positions(needles_A2: Ints, sorted_B2: Ints) -> Ints:
    """Where each id stands in `sorted_B2` (sorted, unique), [A] int64, -1 where it does not."""
    first_B, second_B = np.ascontiguousarray(sorted_B2[:, 0]), sorted_B2[:, 1]
    low_A = np.searchsorted(first_B, needles_A2[:, 0], "left")
    high_A = np.searchsorted(first_B, needles_A2[:, 0], "right")
    end_A = high_A.copy()
    # Ids that share their first word (rare: a hash) are told apart by bisection on the second.
    while (open_A := low_A < high_A).any():
        middle = (low_A[open_A] + high_A[open_A]) // 2
        below = second_B[middle] < needles_A2[open_A, 1]
        low_A[open_A] = np.where(below, middle + 1, low_A[open_A])
        high_A[open_A] = np.where(below, high_A[open_A], middle)
    found_A = low_A < end_A
    found_A[found_A] = second_B[low_A[found_A]] == needles_A2[found_A, 1]
    return np.where(found_A, low_A, -1)


def is_sorted_unique(ids_K2: Ints) -> bool:
    """Whether the ids increase strictly, first word before second (signed)."""
    before, after = ids_K2[:-1], ids_K2[1:]
    above = after[:, 0] > before[:, 0]
    ties = np.flatnonzero(~above)
    same = after[ties, 0] == before[ties, 0]
    return bool((same & (after[ties, 1] > before[ties, 1])).all())


def unique_ids(ids_B2: Ints) -> tuple[Ints, Ints]:
    """The sorted unique ids [U, 2] and for each given id its entry among them [B]."""
    order = np.lexsort((ids_B2[:, 1], ids_B2[:, 0]))
    sorted_B2 = ids_B2[order]
    new_B = np.ones(len(order), bool)
    new_B[1:] = (sorted_B2[1:] != sorted_B2[:-1]).any(axis=1)
    entry_B = np.empty(len(order), np.int64)
    entry_B[order] = np.cumsum(new_B) - 1
    return np.ascontiguousarray(sorted_B2[new_B]), entry_B


def write_tensors(
    layout: Layout, path: Path, tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, aside and renamed; raises RunError."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        code = CODES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data: Iterable[Any] = (as_bytes(array) for array in tensors.values())
    write_aside(layout, path, [len(text).to_bytes(8, "little"), text, *data])


def read_tensors(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The tensors and metadata of a safetensors file; raises BadBlockError, or OSError."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size < 8:
                raise BadBlockError(f"{size} bytes long: truncated")
            if size >= MAP_BYTES:
                raw: npt.NDArray[np.uint8] = np.memmap(file, np.uint8, "r")
            else:
                raw = np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        if error.errno == errno.EIO:
            raise BadBlockError("the disk cannot read it") from error
        raise
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    if start > min(len(raw), HEADER_LIMIT):
        raise BadBlockError("the header reaches past the end: truncated or not safetensors")
    try:
        header = json.loads(raw[8:start].tobytes())
        metadata = header.pop("__metadata__", {})
        tensors: dict[str, npt.NDArray[Any]] = {}
        offset = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if begin != offset or end - begin != math.prod(shape) * dtype.itemsize:
                raise BadBlockError(f"tensor {name!r} does not fit its place")
            tensors[name] = raw[start + begin : start + end].view(dtype).reshape(shape)
            offset = end
        if start + offset != len(raw):
            raise BadBlockError(
                f"{len(raw)} bytes long, the header says {start + offset}: truncated"
            )
        return tensors, {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadBlockError(f"no header of a block ({type(error).__name__}: {error})") from error


def read_key_block(path: Path) -> Ints:
    """The ids [K, 2] of a key block, checked; raises BadBlockError, FileNotFoundError."""
    tensors, metadata = read_tensors(path)
    ids_K2 = tensors.get("ids")
    if metadata != {"format": str(FORMAT), "kind": "keys"} or ids_K2 is None:
        raise BadBlockError("not a key block of this format")
    if len(tensors) != 1 or ids_K2.dtype != np.int64 or ids_K2.ndim != 2 or ids_K2.shape[1] != 2:
        raise BadBlockError("not a key block: ids should be int64 [K, 2]")
    if digest("keys", ids_K2) != path.name.removesuffix(BLOCK_SUFFIX):
        raise BadBlockError("its content does not give its name: altered")
    if not is_sorted_unique(ids_K2):
        raise BadBlockError("its ids are not sorted and unique")
    return ids_K2


def ensure_key_block(layout: Layout, key_hash: str, ids_K2: Ints, sound: set[str]) -> str | None:
    """Make sure that the key block of these ids is there and whole; what was wrong with it if not.

    `sound` holds the hashes of those that this process has checked already.
    """
    path = layout.key_path(key_hash)
    if key_hash in sound and path.exists():
        return None
    trouble = None
    try:
        read_key_block(path)
    except (BadBlockError, FileNotFoundError) as error:
        if isinstance(error, BadBlockError):
            trouble = f"{path.name}: {error}"
            set_aside(layout, path)
        about = {"format": str(FORMAT), "kind": "keys"}
        write_tensors(layout, path, {"ids": np.ascontiguousarray(ids_K2, np.int64)}, about)
    sound.add(key_hash)
    return trouble


def read_value_block(path: Path, *, check: bool = True) -> ValueBlock:
    """A value block; `check` reads all of it, otherwise only its header counts.

    Raises BadBlockError (truncated, altered, not a block, another teacher's), FileNotFoundError.
    """
    tensors, about = read_tensors(path)
    if about.get("format") != str(FORMAT) or about.get("kind") != "values":
        raise BadBlockError("not a value block of this format")
    try:
        block = ValueBlock(
            keys=about["keys"],
            num_keys=int(about["num_keys"]),
            task=about["task"],
            split=about["split"],
            teacher=about["teacher"],
            numerics=about["numerics"],
            name=about["name"],
            runs=tuple(json.loads(about["runs"])),
            written_at=datetime.fromisoformat(about["written_at"]).timestamp(),
            logits_MC=tensors.pop("logits"),
            rows_M=tensors.pop("rows", None),
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
    if check:
        content = block.content_hash
        if path.name != content + BLOCK_SUFFIX or checksum != _checksum(content, about):
            raise BadBlockError("its content does not give its checksum: altered")
        if block.rows_M is not None:
            rows = block.rows_M
            if rows[0] < 0 or rows[-1] >= block.num_keys or not (rows[1:] > rows[:-1]).all():
                raise BadBlockError(f"rows outside of its {block.num_keys} keys, or not increasing")
    return block


def _check_shapes(block: ValueBlock, other_tensors: dict[str, npt.NDArray[Any]]) -> None:
    logits, rows = block.logits_MC, block.rows_M
    if other_tensors or logits.dtype != np.float32 or logits.ndim != 2 or not logits.size:
        raise BadBlockError("not a value block: logits should be float32 [M, C]")
    num_rows = block.num_keys if rows is None else rows.size
    if len(logits) != num_rows or (rows is not None and (rows.dtype != np.int32 or rows.ndim != 1)):
        raise BadBlockError(f"{len(logits)} rows of logits for {num_rows} keys")


def _checksum(content: str, about: dict[str, str]) -> str:
    return digest(content, json.dumps(about, sort_keys=True))


def write_value_block(layout: Layout, block: ValueBlock, ids_K2: Ints, sound: set[str]) -> Path:
    """Write a value block, and before it whatever it needs; returns its path. Raises RunError.

    A whole file of the same content is left as it is. `sound`: as in `ensure_key_block`.
    """
    content = block.content_hash
    path = layout.values / block.folder / (content + BLOCK_SUFFIX)
    about = {
        "format": str(FORMAT),
        "kind": "values",
        "keys": block.keys,
        "num_keys": str(block.num_keys),
        "task": block.task,
        "split": block.split,
        "teacher": block.teacher,
        "numerics": block.numerics,
        "name": block.name,
        "runs": json.dumps(block.runs),
        "written_at": datetime.fromtimestamp(block.written_at, timezone.utc).isoformat(),
    }
    about["checksum"] = _checksum(content, about)
    tensors: dict[str, npt.NDArray[Any]] = {"logits": block.logits_MC}
    if block.rows_M is not None:
        tensors["rows"] = block.rows_M
    # Under the lock nobody removes as unused what the new block is about to use.
    with layout.lock("store.lock", exclusive=False):
        ensure_key_block(layout, block.keys, ids_K2, sound)
        about_teacher = path.parent / "teacher.json"
        if not about_teacher.exists():
            make_folder(layout, path.parent)
            description = {
                "format": FORMAT,
                "name": block.name,
                "fingerprint": block.teacher,
                "numerics": block.numerics,
                "classes": block.logits_MC.shape[1],
            }
            write_aside(layout, about_teacher, [json.dumps(description, indent=1).encode()])
        try:
            read_value_block(path)
        except (BadBlockError, OSError):
            write_tensors(layout, path, tensors, about)
    return path
