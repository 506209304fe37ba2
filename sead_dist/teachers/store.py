"""The content-addressed store of teacher predictions (invariant 3; design, section 3).

U unique examples of a table (entries: positions in its sorted ids), R rows of a request, K ids of a
key block, M rows of a value block, C classes. A prediction is identified by the example's id and
the teacher key, and by nothing else: task, split and run only describe it.

Readers take no locks. A value block never changes under its name; compaction adds the merged block
before it removes the parts, so that a reader who misses a part finds its rows on looking again.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sead_dist.errors import RunError
from sead_dist.teachers import layout as _layout
from sead_dist.teachers.blocks import (
    MAP_BYTES,
    BadBlockError,
    Bools,
    Floats,
    Integers,
    Ints,
    ValueBlock,
    digest,
    ensure_key_block,
    is_sorted_unique,
    positions,
    read_key_block,
    read_value_block,
    teacher_folder,
    write_value_block,
)
from sead_dist.teachers.layout import BLOCK_SUFFIX
from sead_dist.teachers.rows import Rows


@dataclass(frozen=True)
class TeacherKey:
    """What a teacher's predictions depend on besides the example.

    fingerprint: hex, of weights, config, tokeniser and maximum length; numerics: canonical JSON of
    the numerics class; name: as the person gave it, description only; classes: width of its logits.
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


class PredictionStore:
    """The store in `folder`, made where missing; `report` receives one-line notices.

    Raises UserError where `folder` is a file, not writable, of another format or no store.
    """

    def __init__(self, folder: Path | str, report: Callable[[str], None]) -> None:
        self.layout = _layout.create(Path(folder))
        self.report = report
        self.sound_keys: set[str] = set()
        self._entries: dict[tuple[str, str], npt.NDArray[np.int32]] = {}

    def table(
        self,
        key: TeacherKey,
        ids_U2: Ints,
        task: str,
        split: str,
        run: str,
        accept_any: bool = False,
    ) -> "Table":
        """What is stored of one teacher on one example set; ids_U2 int64, sorted and unique.

        accept_any: read other numerics classes of the same teacher too, after the exact one.
        """
        return Table(self, key, ids_U2, task, split, run, accept_any)

    def hold(
        self, run: str, keys: Sequence[TeacherKey], accept_any: bool = False
    ) -> AbstractContextManager[None]:
        """While inside, nothing that these teachers' tables may read is removed from the store."""
        folders = [f"{key.fingerprint[:16]}-*" if accept_any else key.folder for key in keys]
        return _layout.hold(self.layout, run, folders)

    def set_aside(self, path: Path, reason: object) -> None:
        target = _layout.set_aside(self.layout, path)
        where = f"moved to {target.parent.name}/" if target else "could not be moved away"
        self.report(f"store: {path.parent.name}/{path.name} is bad ({reason}); {where}")

    def read_block(self, path: Path) -> ValueBlock | None:
        """The block at `path`, checked; None where it is bad (set aside) or gone."""
        try:
            return read_value_block(path)
        except FileNotFoundError:
            return None
        except BadBlockError as error:
            self.set_aside(path, error)
            return None
        except OSError as error:
            raise _layout.unreadable(path, error) from error

    def entries_of(self, block: ValueBlock, ids_hash: str, ids_U2: Ints) -> npt.NDArray[np.int32]:
        """For each id of the block's key block its entry in `ids_U2`, [K] int32, -1 where none.

        Worked out once per pair of id sets. Raises BadBlockError, FileNotFoundError.
        """
        if (block.keys, ids_hash) not in self._entries:
            path = self.layout.key_path(block.keys)
            try:
                ids_K2 = read_key_block(path)
            except BadBlockError as error:
                self.set_aside(path, error)
                raise BadBlockError(f"its key block {block.keys} is bad") from error
            self._entries[block.keys, ids_hash] = _entries(ids_K2, ids_U2)
        return self._entries[block.keys, ids_hash]


def _entries(ids_K2: Ints, ids_U2: Ints) -> npt.NDArray[np.int32]:
    if len(ids_K2) <= len(ids_U2):
        return positions(ids_K2, ids_U2).astype(np.int32)
    entry_K = np.full(len(ids_K2), -1, np.int32)
    place_U = positions(ids_U2, ids_K2)
    found = np.flatnonzero(place_U >= 0)
    entry_K[place_U[found]] = found
    return entry_K


class Table:
    """Predictions of one teacher on the U examples of one set; made by `PredictionStore.table`.

    present_U: which are stored (read it, do not write it); classes_read: the numerics classes that
    rows were read from. Use from several threads is safe.
    """

    def __init__(
        self,
        store: PredictionStore,
        key: TeacherKey,
        ids_U2: Ints,
        task: str,
        split: str,
        run: str,
        accept_any: bool,
    ) -> None:
        if ids_U2.ndim != 2 or ids_U2.shape[1] != 2 or not is_sorted_unique(ids_U2):
            raise ValueError(f"ids {ids_U2.shape} should be [U, 2], sorted and unique")
        self.key, self.task, self.split, self.run = key, task, split, run
        self.classes_read: tuple[str, ...] = ()
        self._rows = Rows(len(ids_U2), key.classes)
        self.present_U: Bools = self._rows.present_U
        self._store, self._accept_any = store, accept_any
        self._ids_U2 = np.ascontiguousarray(ids_U2, np.int64)
        self._ids_hash = digest("keys", self._ids_U2)
        self._mutex = threading.Lock()
        self._seen: set[Path] = set()
        self._check_teacher()
        self.refresh()

    def lookup(self, entries_R: Integers) -> tuple[Floats, Bools]:
        """Logits [R, C] of the entries, NaN where there are none, and which are there [R]."""
        return self._rows.lookup(entries_R)

    def write(self, entries_R: Ints, logits_RC: npt.ArrayLike) -> None:
        """Store logits of entries as one block, at once seen by `lookup`; raises RunError.

        Entries that are stored already are left as they are.
        """
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
                keys=self._ids_hash,
                num_keys=len(self.present_U),
                task=self.task,
                split=self.split,
                teacher=self.key.fingerprint,
                numerics=self.key.numerics,
                name=self.key.name,
                runs=(self.run,),
                written_at=time.time(),
                logits_MC=logits,
                rows_M=None if all_rows else entries.astype(np.int32),
            )
            sound = self._store.sound_keys
            path = write_value_block(self._store.layout, block, self._ids_U2, sound)
            self._seen.add(path)
            self._rows.copy(entries, logits)

    def refresh(self) -> None:
        """See the blocks that others have written since."""
        with self._mutex:
            exact = self._store.layout.values / self.key.folder
            self._read_folder(exact)
            if not self._accept_any:
                return
            for folder in sorted(exact.parent.glob(f"{self.key.fingerprint[:16]}-*")):
                if folder != exact:
                    self._read_folder(folder)

    def _read_folder(self, folder: Path) -> None:
        # A listing taken while a compaction renames and removes may show neither the parts nor the
        # merged block, and a part may be gone when it is opened: look until nothing has changed.
        listed: list[Path] | None = None
        while not self.present_U.all():
            found = _list_blocks(folder)
            if found == listed:
                break
            listed = found
            for path in found:
                if path in self._seen or self.present_U.all():
                    continue
                self._seen.add(path)
                block = self._store.read_block(path)
                if block is not None:
                    self._take(block, path)
                if not path.exists():
                    # Gone or set aside: a file that gets this name later is another one.
                    self._seen.discard(path)

    def _take(self, block: ValueBlock, path: Path) -> None:
        """Make the rows of a block readable that were missing so far."""
        store = self._store
        try:
            if block.teacher != self.key.fingerprint:
                raise BadBlockError(f"it belongs to teacher {block.teacher}: foreign")
            if block.logits_MC.shape[1] != self.key.classes:
                raise BadBlockError(f"{block.logits_MC.shape[1]} classes, not {self.key.classes}")
            if block.keys == self._ids_hash:
                self._mend_keys()
                entry_K: Integers | None = None
                num_keys = len(self.present_U)
            else:
                entry_K = store.entries_of(block, self._ids_hash, self._ids_U2)
                num_keys = len(entry_K)
            if num_keys != block.num_keys:
                raise BadBlockError(f"{block.num_keys} keys, its key block has {num_keys}")
        except (BadBlockError, FileNotFoundError) as error:
            # Its key block goes only after the block itself: one that is still here is bad.
            if path.exists():
                missing = f"its key block {block.keys} is missing"
                store.set_aside(path, error if isinstance(error, BadBlockError) else missing)
            return
        # Rows of the exact class stay before those of another.
        replaces = block.numerics == self.key.numerics or not self.present_U.any()
        if entry_K is None and block.rows_M is None and replaces:
            self._rows.set_whole(block.logits_MC)
        else:
            rows_M = np.arange(num_keys) if block.rows_M is None else block.rows_M
            entry_M = rows_M if entry_K is None else entry_K[rows_M]
            take = np.flatnonzero(entry_M >= 0)
            take = take[~self.present_U[entry_M[take]]]
            if not len(take):
                return
            if block.num_bytes >= MAP_BYTES:
                self._rows.refer(entry_M[take], block.logits_MC, take)
            else:
                self._rows.copy(entry_M[take], block.logits_MC[take])
        self._note_class(block.numerics)

    def _mend_keys(self) -> None:
        layout = self._store.layout
        if self._ids_hash in self._store.sound_keys:
            return
        with layout.lock("store.lock", exclusive=False):
            trouble = ensure_key_block(layout, self._ids_hash, self._ids_U2, self._store.sound_keys)
        if trouble:
            self._store.report(f"store: keys/{trouble}; moved to quarantine/ and written anew")

    def _note_class(self, numerics: str) -> None:
        if numerics in self.classes_read:
            return
        self.classes_read = (*self.classes_read, numerics)
        if numerics != self.key.numerics:
            self._store.report(
                f"store: {self.task} {self.split}: predictions of {self.key.name} are read from "
                f"another numerics class, {numerics}"
            )

    def _check_teacher(self) -> None:
        """Refuse a width other than the stored one: its blocks are sound, the caller is not."""
        path = self._store.layout.values / self.key.folder / "teacher.json"
        try:
            classes = json.loads(path.read_bytes())["classes"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._store.set_aside(path, error)
            return
        if classes != self.key.classes:
            raise RunError(
                f"teacher {self.key.name}: the store {self._store.layout.root} holds {classes} "
                f"logits an example, this run expects {self.key.classes}; check the teacher's "
                "config.json or name another store="
            )


def _list_blocks(folder: Path) -> list[Path]:
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
        raise _layout.unreadable(folder, error) from error
    return [folder / name for _, name in sorted(sizes)]
