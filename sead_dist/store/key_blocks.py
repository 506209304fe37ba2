"""Key blocks of the prediction store: the sorted unique ids [K, 2] of one example set.

The file is named by the hash of the ids: one whose content does not give its name is bad.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sead_dist.store.ids import Ints, is_sorted_unique
from sead_dist.store.layout import BLOCK_SUFFIX, PLAIN_FORMAT, Layout, aside, set_aside
from sead_dist.store.tensor_file import (
    MAP_BYTES,
    BadBlockError,
    as_bytes,
    digest,
    header_of,
    read_tensors,
    write_tensors,
)

KEY_BLOCK = {"format": str(PLAIN_FORMAT), "kind": "keys"}
HEADER_ROOM = 256


def read_key_block(path: Path, *, check: bool = True) -> Ints:
    """The ids [K, 2] of a key block, checked unless told otherwise; raises BadBlockError,
    FileNotFoundError."""
    tensors, metadata = read_tensors(path)
    ids_K2 = tensors.get("ids")
    if metadata != KEY_BLOCK or ids_K2 is None:
        raise BadBlockError("not a key block of this format")
    if len(tensors) != 1 or ids_K2.dtype != np.int64 or ids_K2.ndim != 2 or ids_K2.shape[1] != 2:
        raise BadBlockError("not a key block: ids should be int64 [K, 2]")
    if not check:
        return ids_K2
    if digest("keys", ids_K2) != path.name.removesuffix(BLOCK_SUFFIX):
        raise BadBlockError("its content does not give its name: altered")
    if not is_sorted_unique(ids_K2):
        raise BadBlockError("its ids are not sorted and unique")
    return ids_K2


def ensure_key_block(layout: Layout, key_hash: str, ids_K2: Ints, sound: set[str]) -> str | None:
    """Make sure that the key block of these ids is there and whole; what was wrong with it if not.

    `sound` holds the hashes of those that this process has checked already. Of a large one the form
    is checked, not each id: it is the caller that has the ids, so its reading does not need them.
    """
    path = layout.key_path(key_hash)
    if key_hash in sound and path.exists():
        return None
    trouble = None
    try:
        read_key_block(path, check=path.stat().st_size < MAP_BYTES)
    except (BadBlockError, FileNotFoundError) as error:
        if isinstance(error, BadBlockError):
            trouble = f"{path.name}: {error}"
            set_aside(layout, path)
        write_tensors(layout, path, {"ids": np.ascontiguousarray(ids_K2, np.int64)}, KEY_BLOCK)
    sound.add(key_hash)
    return trouble


def write_key_block(layout: Layout, pieces: Iterable[Ints]) -> str:
    """Write the key block of ids that come in sorted pieces; its hash. Raises RunError."""
    with aside(layout, "keys") as (file, keep):
        file.write(bytes(HEADER_ROOM))
        num_keys = 0
        for piece in pieces:
            file.write(as_bytes(piece).data)
            num_keys += len(piece)
        shape = (num_keys, 2)
        file.seek(0)
        file.write(header_of({"ids": (np.dtype("<i8"), shape)}, KEY_BLOCK, HEADER_ROOM))
        file.flush()
        ids_K2 = np.memmap(file, "<i8", "r", offset=HEADER_ROOM, shape=shape)
        key_hash = digest("keys", ids_K2)
        keep(layout.key_path(key_hash))
    return key_hash
