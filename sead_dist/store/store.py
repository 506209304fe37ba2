"""The content-addressed store of teacher predictions (invariant 3).

Only the example's id and the teacher key identify a prediction. Task, split and run describe it.

U unique examples of a table (entries: positions in its sorted ids), R rows of a request, P ids that
two sets share, M rows of a value block, C classes.

Blocks are read without a lock. A value block never changes under its name. Compaction adds the
merged block before it removes the parts. So a reader that misses a part finds its rows when it
looks again.
"""

import re
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sead_dist.errors import RunError
from sead_dist.runtime.run_log import tell
from sead_dist.store.blocks import (
    ValueBlock,
    check_num_keys,
    read_description,
    read_value_block,
    teacher_folder,
    write_value_block,
)
from sead_dist.store.ids import (
    Bools,
    Integers,
    Ints,
    Places,
    common,
    ensure_key_block,
    is_sorted_unique,
    read_key_block,
)
from sead_dist.store.layout import BLOCK_SUFFIX, create, existing, hold, set_aside, unreadable
from sead_dist.store.rows import BadChunkError, Coverage, Floats, Logits, Rows
from sead_dist.store.tensor_file import MAP_BYTES, BadBlockError, digest


@dataclass(frozen=True)
class TeacherKey:
    """All that a teacher's predictions depend on besides the example.

    fingerprint: hex; for a classifier a hash of weights, config, tokeniser and maximum length, for
    other kinds one of all that their answers depend on. numerics: canonical JSON of the numerics
    class. name: as the user gave it, only a description. classes: width of its logits.
    """

    fingerprint: str
    numerics: str
    name: str
    classes: int

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{16,}", self.fingerprint):
            raise ValueError(f"fingerprint={self.fingerprint!r}: at least 16 lower-case hex digits")

    @property
    def folder(self) -> str:
        return teacher_folder(self.fingerprint, self.numerics)


@dataclass(frozen=True, eq=False)
class IdSet:
    """The ids of a table, sorted and unique, int64 [U, 2], with the hash that names them."""

    ids_U2: Ints
    hash: str


class StoreFolder:
    """The store in `folder`, made if it is missing.

    read_only: the store must exist, and nothing in it is changed; bad blocks stay where they are.
    Any rank of a run logs them. Raises UserError where `folder` is a file, of another format or
    not a store, and UserError or RunError (as `layout.create`) where it is not writable.
    """

    def __init__(self, folder: Path | str, read_only: bool = False) -> None:
        self.layout = existing(Path(folder)) if read_only else create(Path(folder))
        self.read_only = read_only
        self.sound_keys: set[str] = set()
        self._id_sets: dict[int, IdSet] = {}
        self._shared: dict[tuple[str, str], tuple[int, Places, Places]] = {}

    def table(
        self,
        key: TeacherKey,
        ids_U2: Ints,
        task: str,
        split: str,
        run: str,
        accept_any: bool = False,
    ) -> "Table":
        """The kept predictions of one teacher on one example set. ids_U2: int64, sorted and unique.

        accept_any: also read other numerics classes of the same teacher, after the exact one.
        """
        return Table(self, key, self.id_set(ids_U2), task, split, run, accept_any)

    def hold(
        self, run: str, keys: Sequence[TeacherKey], accept_any: bool = False
    ) -> AbstractContextManager[None]:
        """While inside, nothing is removed from the store that these teachers' tables may read."""
        folders = [f"{key.fingerprint[:16]}-*" if accept_any else key.folder for key in keys]
        return hold(self.layout, run, folders)

    def id_set(self, ids_U2: Ints) -> IdSet:
        """The ids with their hash. It is computed once for an array, which the tables of all
        teachers share. Raises ValueError for ids that are not sorted and unique."""
        if id(ids_U2) not in self._id_sets or self._id_sets[id(ids_U2)].ids_U2 is not ids_U2:
            if ids_U2.ndim != 2 or ids_U2.shape[1] != 2 or not is_sorted_unique(ids_U2):
                raise ValueError(f"ids {ids_U2.shape} should be [U, 2], sorted and unique")
            self._id_sets[id(ids_U2)] = IdSet(ids_U2, digest("keys", ids_U2))
        return self._id_sets[id(ids_U2)]

    def set_aside(self, path: Path, reason: object) -> None:
        target = None if self.read_only else set_aside(self.layout, path)
        where = "left in place" if self.read_only else "could not be moved away"
        where = f"moved to {target.parent.name}/" if target else where
        tell(f"store: {path.parent.name}/{path.name} is bad ({reason}); {where}", any_rank=True)

    def read_block(self, path: Path) -> ValueBlock | None:
        """The block at `path`. All but the rows of a compacted block is checked; these are checked
        when they are read. None where the block is bad (it is set aside) or gone."""
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
        """The ids that the block's key block and a set share: their places in the first and in the
        second.

        They are computed once for each pair of id sets. Raises BadBlockError, FileNotFoundError.
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

    def rewrite_keys(self, ids: IdSet) -> None:
        """Make sure that the key block of these ids is there, since blocks refer to it."""
        if self.read_only or ids.hash in self.sound_keys:
            return
        with self.layout.lock("store.lock", exclusive=False):
            trouble = ensure_key_block(self.layout, ids.hash, ids.ids_U2, self.sound_keys)
        if trouble:
            tell(f"store: keys/{trouble}; moved to quarantine/ and written again", any_rank=True)


class Table:
    """Predictions of one teacher on the U examples of one set. `StoreFolder.table` makes it.

    present_U: which are stored (read it, do not write it). classes_read: the numerics classes of
    the rows that were read. Several threads may use a table.
    """

    def __init__(
        self,
        store: StoreFolder,
        key: TeacherKey,
        ids: IdSet,
        task: str,
        split: str,
        run: str,
        accept_any: bool,
    ) -> None:
        self.key, self.task, self.split, self.run = key, task, split, run
        self.classes_read: tuple[str, ...] = ()
        self._rows = Rows(len(ids.ids_U2), key.classes)
        self._store, self._accept_any, self._ids = store, accept_any, ids
        self._mutex = threading.Lock()
        self._seen: set[Path] = set()
        self._check_teacher()
        self.refresh()

    @property
    def present_U(self) -> Bools:
        return self._rows.present_U

    @property
    def blocks_seen(self) -> int:
        """The number of blocks of this teacher that were found, of any split."""
        return len(self._seen)

    def lookup(self, entries_R: Integers) -> tuple[Floats, Bools]:
        """(logits [R, C] of the entries, NaN where there are none; which entries are there [R]).

        A block that is found altered is set aside, and its rows are no longer there.
        """
        while True:
            try:
                return self._rows.lookup(entries_R)
            except BadChunkError as error:
                self._forget(error.logits, error)

    def _forget(self, logits: Logits, reason: BadBlockError) -> None:
        with self._mutex:
            self._rows.drop(logits)
            if logits.path in self._seen:
                self._seen.discard(logits.path)
                self._store.set_aside(logits.path, reason)

    def write(self, entries_R: Ints, logits_RC: npt.ArrayLike) -> None:
        """Store logits of entries as one block. `lookup` finds them at once.

        Entries that are stored already stay as they are. Raises RunError where the logits are not
        finite or the block cannot be written, and ValueError for other shapes or a read-only store.
        """
        if self._store.read_only:
            raise ValueError(f"{self._store.layout.root} was opened as read-only")
        logits = np.asarray(logits_RC, np.float32)
        entries, first = np.unique(np.asarray(entries_R, np.int64), return_index=True)
        if logits.shape != (len(entries_R), self.key.classes):
            raise ValueError(f"logits {logits.shape} for {len(entries_R)} entries and {self.key}")
        if len(entries) and not 0 <= entries[0] <= entries[-1] < len(self.present_U):
            raise ValueError(f"entries {entries[0]}..{entries[-1]} of {len(self.present_U)}")
        logits = logits[first]
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits).all(axis=1)).sum())
            raise RunError(
                f"teacher {self.key.name}: logits of {bad} {self.task} {self.split} examples are "
                "not finite and were not stored; try another dtype for it or leave it out"
            )
        with self._mutex:
            new = ~self.present_U[entries]
            if not new.any():
                return
            entries, logits = entries[new], np.ascontiguousarray(logits[new])
            all_rows = len(entries) == len(self.present_U)
            block = ValueBlock(
                keys=self._ids.hash,
                task=self.task,
                split=self.split,
                teacher=self.key.fingerprint,
                numerics=self.key.numerics,
                name=self.key.name,
                runs=(self.run,),
                written_at=time.time(),
                covers=Coverage(
                    len(self.present_U), None if all_rows else entries.astype(np.int32)
                ),
                logits=Logits(logits),
            )
            sound = self._store.sound_keys
            path, _ = write_value_block(self._store.layout, block, self._ids.ids_U2, sound)
            self._seen.add(path)
            self._rows.copy(entries, logits)

    def refresh(self) -> None:
        """Read the blocks that other processes have written since."""
        with self._mutex:
            exact = self._store.layout.values / self.key.folder
            self._read_folder(exact)
            if not self._accept_any:
                return
            for folder in sorted(exact.parent.glob(f"{self.key.fingerprint[:16]}-*")):
                if folder != exact:
                    self._read_folder(folder)

    def _read_folder(self, folder: Path) -> None:
        # A listing during a compaction may show neither the parts nor the merged block, and a
        # listed part may be gone when it is opened. So list again until nothing has changed.
        listed: list[Path] | None = None
        while not self._rows.complete:
            found = list_blocks(folder)
            if found == listed:
                break
            listed = found
            for path in found:
                if path in self._seen or self._rows.complete:
                    continue
                self._seen.add(path)
                block = self._store.read_block(path)
                if block is not None:
                    self._take(block, path)
                if not path.exists():
                    # Gone or set aside: a later file of this name is another one.
                    self._seen.discard(path)

    def _take(self, block: ValueBlock, path: Path) -> None:
        """Make those rows of a block readable that were missing so far."""
        try:
            taken = self._take_sound(block)
        except (BadBlockError, FileNotFoundError) as error:
            # A key block is removed only after its blocks. So a block that is still here is bad.
            if path.exists():
                missing = f"its key block {block.keys} is missing"
                reason = error if isinstance(error, BadBlockError) else missing
                self._store.set_aside(path, reason)
            return
        if taken and block.numerics not in self.classes_read:
            self.classes_read = (*self.classes_read, block.numerics)
            if block.numerics != self.key.numerics:
                tell(
                    f"store: {self.task} {self.split}: predictions of {self.key.name} are read "
                    f"from another numerics class, {block.numerics}",
                    any_rank=True,
                )

    def _take_sound(self, block: ValueBlock) -> bool:
        """Whether the block had any missing row. Raises BadBlockError, and FileNotFoundError for
        its key block."""
        if block.teacher != self.key.fingerprint:
            raise BadBlockError(f"it belongs to another teacher, {block.teacher}")
        classes = block.logits.values_MC.shape[1]
        if classes != self.key.classes:
            raise BadBlockError(f"it has {classes} classes, not {self.key.classes}")
        covers, present_U = block.covers, self.present_U
        if block.keys == self._ids.hash:
            self._store.rewrite_keys(self._ids)
            check_num_keys(block, len(present_U))
            # Rows of the exact class stay before those of another.
            comes_first = block.numerics == self.key.numerics or not present_U.any()
            if comes_first and (covers.whole or block.compacted):
                self._rows.lay(covers, block.logits)
                return True
            entry_M: Integers = np.concatenate(list(covers.pieces()))
            row_M: Integers = np.arange(len(entry_M), dtype=np.int32)
        else:
            place_P, entry_M = self._store.shared(block, self._ids)
            row_M = covers.rows_at(place_P)
        take = np.flatnonzero((row_M >= 0) & ~present_U[entry_M])
        entry_M, row_M = entry_M[take], row_M[take]
        if not len(take):
            return False
        if block.num_bytes >= MAP_BYTES:
            self._rows.refer(entry_M, block.logits, row_M)
        else:
            self._rows.copy(entry_M, block.logits.take(row_M))
        return True

    def _check_teacher(self) -> None:
        """Raises RunError for another width of logits than the stored one: the blocks are sound, so
        the caller is wrong."""
        path = self._store.layout.values / self.key.folder / "teacher.json"
        try:
            classes = read_description(path)["classes"]
        except FileNotFoundError:
            return
        except BadBlockError as error:
            self._store.set_aside(path, error)
            return
        if classes != self.key.classes:
            raise RunError(
                f"teacher {self.key.name}: the store {self._store.layout.root} holds {classes} "
                f"logits an example, this run needs {self.key.classes}; check the teacher's "
                "config.json or give another store=DIR"
            )


def list_blocks(folder: Path) -> list[Path]:
    """Value blocks in a folder, largest first, since one merged block may make the others
    needless."""
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
