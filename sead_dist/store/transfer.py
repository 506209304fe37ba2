"""Predictions carried from one store to another: an export is a store of its own.

It holds hashed rows and logits. No text is in it; of the paths of teachers the last part stays,
and the runs that wrote are left out. Rows keep their identity, so a run that reads the store finds
them wherever the same teacher is asked of the same texts.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from sead_dist.errors import UserError
from sead_dist.runtime.redact import redact
from sead_dist.store.blocks import ValueBlock, read_value_block, write_value_block
from sead_dist.store.ids import read_key_block
from sead_dist.store.layout import Layout, create, existing, raise_format
from sead_dist.store.maintenance import Bad, scan
from sead_dist.store.tensor_file import BadBlockError


@dataclass(frozen=True)
class Carried:
    """blocks: those that came over; known: those that were there already; bad: what could not be
    read, which is left out."""

    blocks: int
    known: int
    num_rows: int
    num_bytes: int
    bad: tuple[Bad, ...]


def carry(
    source: Path, target: Path, task: str | None = None, teacher: str | None = None
) -> Carried:
    """Copy predictions from one store into another, which is made where it is missing. Every row is
    checked on the way; what the target holds stays.

    task, teacher: only theirs; a teacher is given by its name or the start of its fingerprint.
    Raises UserError where one is no store, or where nothing fits, RunError where the target cannot
    be written.
    """
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is the store itself; give another folder")
    layout = existing(source)
    bad: list[Bad] = []
    chosen: list[Path] = []
    for path, block in scan(layout, "header"):
        if isinstance(block, BadBlockError):
            bad.append(Bad(path, str(block), moved=False))
        elif _fits(block, task, teacher):
            chosen.append(path)
    if not chosen:
        wanted = [f"task {task}"] if task else []
        wanted += [f"teacher {teacher}"] if teacher else []
        raise UserError(
            f"the prediction store {source} holds nothing of "
            f"{' and '.join(wanted) or 'any teacher'}; see sead-dist store ls"
        )
    into = create(target)
    sound: set[str] = set()
    copied = known = num_rows = num_bytes = 0
    for path in chosen:
        try:
            there, rows, new = _copy(layout, into, path, sound)
        except (BadBlockError, FileNotFoundError) as error:
            bad.append(Bad(path, str(error), moved=False))
            continue
        copied, known = copied + new, known + (not new)
        num_rows += rows
        num_bytes += there.stat().st_size
    return Carried(copied, known, num_rows, num_bytes, tuple(bad))


def _fits(block: ValueBlock, task: str | None, teacher: str | None) -> bool:
    names = (block.name, PurePath(redact(block.name)).name)
    right_teacher = teacher is None or teacher in names or block.teacher.startswith(teacher)
    return right_teacher and task in (None, block.task)


def _copy(source: Layout, into: Layout, path: Path, sound: set[str]) -> tuple[Path, int, bool]:
    """(where the block lies in the other store, its rows, whether it is new there). Raises
    BadBlockError, FileNotFoundError, RunError."""
    block = read_value_block(path, "all")
    ids_K2 = read_key_block(source.key_path(block.keys))
    if len(ids_K2) != block.covers.num_keys:
        raise BadBlockError(f"{len(ids_K2)} ids for {block.covers.num_keys} keys")
    block = replace(block, name=PurePath(redact(block.name)).name, runs=())
    if block.compacted:
        raise_format(into)
    there, new = write_value_block(into, block, ids_K2, sound)
    return there, block.covers.num_rows, new
