"""The content-addressed store of teacher predictions (invariant 3).

A prediction is identified by the example's id and the teacher key, and by nothing else: task, split
and run only describe it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from sead_dist.store import layout as _layout
from sead_dist.store import live
from sead_dist.store.block_reader import BlockReader
from sead_dist.store.ids import Ints
from sead_dist.store.table import Table, TeacherKey


class PredictionStore:
    """The store in `folder`, made where missing; `report` receives one-line notices.

    Raises UserError where `folder` is a file, not writable, of another format or no store.
    """

    def __init__(self, folder: Path | str, report: Callable[[str], None]) -> None:
        self.layout = _layout.create(Path(folder))
        self._reader = BlockReader(self.layout, report)

    def table(
        self,
        key: TeacherKey,
        ids_U2: Ints,
        task: str,
        split: str,
        run: str,
        accept_any: bool = False,
    ) -> Table:
        """What is stored of one teacher on one example set; ids_U2 int64, sorted and unique.

        accept_any: read other numerics classes of the same teacher too, after the exact one.
        """
        ids = self._reader.id_set(ids_U2)
        return Table(self._reader, key, ids, task, split, run, accept_any)

    def hold(
        self, run: str, keys: Sequence[TeacherKey], accept_any: bool = False
    ) -> AbstractContextManager[None]:
        """While inside, nothing that these teachers' tables may read is removed from the store."""
        folders = [f"{key.fingerprint[:16]}-*" if accept_any else key.folder for key in keys]
        return live.hold(self.layout, run, folders)
