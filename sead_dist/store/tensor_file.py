"""Safetensors files of the store: written aside and renamed, read or mapped, and checked in form.

The store writes them itself because the NumPy side of the safetensors library cannot map a file
into memory and hides the errno of a full disk. The library reads these files, and files of the
library can be read here.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from sead_dist.store.layout import Layout, aside, write_aside

DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# no block has a header of more bytes
HEADER_LIMIT = 1 << 24
# Larger files are mapped and smaller ones are read. So few mappings stay open, and data that was
# read no longer depends on its file.
MAP_BYTES = 4 << 20

Shapes = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


class BadBlockError(Exception):
    """A file is not a whole and unaltered block. The text says why."""


def digest(*parts: str | npt.NDArray[Any]) -> str:
    """A hash (xxh3, 128 bits, in hex) of strings and arrays. Each part is hashed with its length.

    It shows accidents, not changes by an attacker with write access. It takes about as long as
    reading the bytes.
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
    """An array's bytes in the order of its elements. They are copied only where the array is not
    contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_tensors(
    layout: Layout, path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: dict[str, str]
) -> None:
    """Write a safetensors file aside and rename it. Raises RunError."""
    shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    data: Iterable[Any] = (as_bytes(array) for array in tensors.values())
    write_aside(layout, path, [header_of(shapes, metadata), *data])


@contextmanager
def mapped_tensors(
    layout: Layout, name: str, shapes: Shapes, metadata: dict[str, str]
) -> Iterator[tuple[dict[str, npt.NDArray[Any]], Callable[[Path, dict[str, str]], None]]]:
    """Yield (the tensors of a mapped safetensors file, to be filled in place; a function of a path
    and the final metadata, which moves the file there).

    name: a part of the file's name until then. metadata: must be as long as the final one. If the
    function is not called, the file is removed. Only the page cache holds the file in memory.
    Raises RunError.
    """
    header = header_of(shapes, metadata)
    size = len(header) + sum(_num_bytes(*shape) for shape in shapes.values())
    with aside(layout, name) as (file, keep):
        # The space is taken first, since a full disk under a mapping would kill the process.
        os.posix_fallocate(file.fileno(), 0, size)
        mapped = np.memmap(file, np.uint8, "r+")
        raw = np.asarray(mapped)  # so that its parts are plain arrays
        tensors: dict[str, npt.NDArray[Any]] = {}
        offset = len(header)
        for tensor, (dtype, shape) in shapes.items():
            end = offset + _num_bytes(dtype, shape)
            tensors[tensor] = raw[offset:end].view(dtype).reshape(shape)
            offset = end

        def finish(path: Path, final: dict[str, str]) -> None:
            text = header_of(shapes, final)
            assert len(text) == len(header)
            raw[: len(text)] = np.frombuffer(text, np.uint8)
            mapped.flush()
            keep(path)

        yield tensors, finish


def _num_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def header_of(shapes: Shapes, metadata: dict[str, str], at_least: int = 0) -> bytes:
    """The bytes before the tensors, filled up with blanks to a multiple of 8 and to `at_least`
    bytes. The tensors follow in the order of `shapes`, without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + _num_bytes(dtype, shape)
        code = CODES[dtype.newbyteorder("<")]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    length = max(math.ceil(len(text) / 8) * 8, at_least - 8)
    return length.to_bytes(8, "little") + text.ljust(length)


def read_tensors(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The tensors and metadata of a safetensors file. Raises BadBlockError, or OSError."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size < 8:
                raise BadBlockError(f"it is {size} bytes long: truncated")
            if size >= MAP_BYTES:
                raw = np.asarray(np.memmap(file, np.uint8, "r"))
            else:
                raw = np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        if error.errno == errno.EIO:
            raise BadBlockError("the disk cannot read it") from error
        raise
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    if start > min(len(raw), HEADER_LIMIT):
        raise BadBlockError("its header is longer than the file: truncated or not safetensors")
    try:
        header = json.loads(raw[8:start].tobytes())
        metadata = header.pop("__metadata__", {})
        tensors: dict[str, npt.NDArray[Any]] = {}
        offset = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if begin != offset or end - begin != _num_bytes(dtype, shape):
                raise BadBlockError(f"tensor {name!r} does not fit its place")
            tensors[name] = raw[start + begin : start + end].view(dtype).reshape(shape)
            offset = end
        if start + offset != len(raw):
            raise BadBlockError(
                f"it is {len(raw)} bytes long, its header needs {start + offset}: truncated"
            )
        return tensors, {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadBlockError(
            f"its header is not that of a block ({type(error).__name__}: {error})"
        ) from error
