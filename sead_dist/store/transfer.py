"""Predictions copied from one store into another: `sead-dist store export` and `import`.

An export is a store of its own. It holds hashes of rows, and logits. It holds no text. Of a
teacher's path only the last part stays, and the names of the runs that wrote are left out. Rows
keep their ids, so a run that reads the store finds them wherever it needs the same teacher for
the same texts.

K ids of a key block.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import numpy as np

from sead_dist.errors import UserError
from sead_dist.runtime.redact import redact
from sead_dist.store.blocks import ValueBlock, read_value_block, write_value_block
from sead_dist.store.ids import Bools, Ints, read_key_block
from sead_dist.store.layout import Layout, create, existing
from sead_dist.store.maintenance import Bad, is_teacher, scan
from sead_dist.store.rows import Coverage, Logits
from sead_dist.store.store import StoreFolder, TeacherKey
from sead_dist.store.tensor_file import BadBlockError


@dataclass(frozen=True)
class Carried:
    """What was copied.

    blocks: those with a row that was copied. known: those without. num_rows, num_bytes: of both.
    bad: files that could not be read, which are left out.
    """

    blocks: int
    known: int
    num_rows: int
    num_bytes: int
    bad: tuple[Bad, ...]


def carry(
    source: Path, target: Path, task: str | None = None, teacher: str | None = None
) -> Carried:
    """Copy predictions from one store into another, which is made if it is missing. Every row is
    checked on the way. A row that the target has already is not copied: an endpoint may have given
    another answer there, and the first one stays.

    task, teacher: copy only theirs. teacher: its name, or the first digits (6 or more) of its
    fingerprint.
    Raises UserError where the source is not a store, the target is the source or something else, or
    nothing fits; RunError where the target cannot be written.
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
        wanted = [f" of task {task}"] if task else []
        wanted += [f" of teacher {teacher}"] if teacher else []
        raise UserError(
            f"the prediction store {source} holds no predictions{' and'.join(wanted)}; "
            "sead-dist store ls lists what it holds"
        )
    into = Target(create(target), StoreFolder(target, read_only=True))
    copied = known = num_rows = num_bytes = 0
    for path in chosen:
        try:
            block = read_value_block(path, "all")
            new = _copy(layout, into, block)
        except (BadBlockError, FileNotFoundError) as error:
            bad.append(Bad(path, str(error), moved=False))
            continue
        copied, known = copied + new, known + (not new)
        num_rows += block.covers.num_rows
        num_bytes += block.num_bytes
    return Carried(copied, known, num_rows, num_bytes, tuple(bad))


def _fits(block: ValueBlock, task: str | None, teacher: str | None) -> bool:
    last = PurePath(redact(block.name)).name  # the name that an export gives it
    right_teacher = teacher is None or teacher == last or is_teacher(block, teacher)
    return right_teacher and task in (None, block.task)


@dataclass
class Target:
    """The store that blocks are copied into. sound: as in `ensure_key_block`. had: which ids of a
    key block it had before, by teacher folder and key block."""

    layout: Layout
    before: StoreFolder
    sound: set[str] = field(default_factory=set)
    had: dict[tuple[str, str], Bools] = field(default_factory=dict)

    def had_K(self, block: ValueBlock, ids_K2: Ints) -> Bools:
        """Which ids of the block's key block the store had for its teacher before."""
        place = (block.folder, block.keys)
        if place not in self.had:
            classes = block.logits.values_MC.shape[1]
            key = TeacherKey(block.teacher, block.numerics, block.name, classes)
            table = self.before.table(key, ids_K2, block.task, block.split, run="")
            self.had[place] = table.present_U.copy()
        return self.had[place]


def _copy(source: Layout, into: Target, block: ValueBlock) -> bool:
    """Copy the rows that the target did not have. Whether there are any that it lacks.

    Raises BadBlockError, FileNotFoundError, RunError.
    """
    ids_K2 = read_key_block(source.key_path(block.keys))
    if len(ids_K2) != block.covers.num_keys:
        raise BadBlockError(f"{len(ids_K2)} ids for {block.covers.num_keys} keys")
    block = replace(block, name=PurePath(redact(block.name)).name, runs=())
    covered_K = np.zeros(len(ids_K2), bool)
    block.covers.add_to(covered_K)
    new_K = covered_K & ~into.had_K(block, ids_K2)
    if not new_K.any():
        return False
    if (new_K != covered_K).any():
        rows = block.covers.rows_at(np.flatnonzero(new_K))
        logits = Logits(block.logits.values_MC.take(rows, axis=0))
        block = replace(
            block,
            covers=Coverage(len(ids_K2), np.flatnonzero(new_K).astype(np.int32)),
            logits=logits,
        )
    return write_value_block(into.layout, block, ids_K2, into.sound)[1]
