"""Folders that every node of a run must see: found out at the start, not after the first epoch."""

import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sead_dist.errors import UserError, refusal
from sead_dist.runtime.distributed import World, from_main, gather_objects

# A network file system may show a new file to other nodes late.
PATIENCE_S = 10.0


def node_name() -> str:
    """The node that this rank runs on, as SLURM calls it, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_shared(world: World, folders: Mapping[str, Path]) -> None:
    """Every rank looks for a file that rank 0 wrote into each of `folders` (key -> folder).

    Nothing is written where all ranks run on one node. Raises UserError on every rank, naming the
    node and the folder, when one does not see it.
    """
    nodes = gather_objects(world, node_name())
    if len(set(nodes)) == 1:
        return
    token = from_main(world, lambda: f".seen-{uuid.uuid4().hex}")
    try:
        from_main(world, lambda: _write(folders, token))
        blind = gather_objects(world, _first_unseen(folders, token))
    finally:
        if world.is_main:
            for folder in folders.values():
                with suppress(OSError):
                    (folder / token).unlink()
    for node, key in zip(nodes, blind, strict=True):
        if key is not None:
            if world.is_main:  # made for nothing; what holds files stays
                with suppress(OSError):
                    folders[key].rmdir()
            raise UserError(
                f"{key}={folders[key]}: node {node} does not see what node {nodes[0]} wrote there; "
                "give a folder on a file system that all nodes share"
            )


def _write(folders: Mapping[str, Path], token: str) -> None:
    for key, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).touch()
        except OSError as error:
            raise refusal(
                f"{key}={folder} cannot be written: {error.strerror}; give another folder", error
            ) from None


def _first_unseen(folders: Mapping[str, Path], token: str) -> str | None:
    end = time.monotonic() + PATIENCE_S
    for key, folder in folders.items():
        while not (folder / token).exists():
            if time.monotonic() > end:
                return key
            time.sleep(0.1)
            with suppress(OSError):
                os.listdir(folder)  # makes a network file system look again
    return None
