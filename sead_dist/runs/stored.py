"""The prediction store for Python programs: its contents, and a teacher's kept logits of rows.

The store is not changed, and no teacher computes anything.

Shapes: B rows, C classes (C = 1: a score), U rows that differ.
"""

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sead_dist.data.examples import build_examples, entries
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.errors import UserError, expect
from sead_dist.runs.given import NAMES, as_rows, checked_task
from sead_dist.store import store as kept
from sead_dist.store.layout import store_folder
from sead_dist.store.maintenance import Row, headers, is_teacher, list_store
from sead_dist.store.removal import check_known

if TYPE_CHECKING:
    import pandas as pd


class PredictionStore:
    """A store of predictions, opened for reading only.

    Bad blocks are not removed. Their rows count as not kept, and the logger `sead_dist` gets a
    line on them.

    folder: as `store=` of a run. The default is `SEAD_DIST_STORE`, else the folder in the user's
    cache. Raises UserError where there is no store.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        expect("folder", folder, NAMES | None, "the folder of a prediction store")
        self.path: Path = store_folder(None if folder is None else os.fspath(folder))
        self._store = kept.StoreFolder(self.path, read_only=True)

    def contents(self) -> "pd.DataFrame":
        """A table with one row for each teacher, task and split.

        Columns: teacher (its name as given to the run), fingerprint, numerics, task, split,
        num_rows, num_blocks, num_bytes, newest (seconds since 1970), folder.
        """
        import pandas as pd

        rows = [asdict(row) for row in list_store(self.path).rows]
        return pd.DataFrame(rows, columns=[field.name for field in fields(Row)])

    def predictions(
        self,
        teacher: str,
        texts_or_rows: Any,
        *,
        task: str | os.PathLike[str] | TaskSpec,
        numerics: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """The kept logits [B, C] of rows, float32. Rows that are not kept are NaN.

        The classes are in the teacher's own order (that of its config.json). Rows of all splits
        are searched, by the exact texts that the task makes of them.

        teacher: its name or the first digits (6 or more) of its fingerprint, as in `contents`.
        texts_or_rows: as for `predict`. numerics: the numerics class to read, where the store has
        several of this teacher. Raises UserError where no teacher or several teachers match, for a
        numerics class that is not kept or not named, and for rows that do not fit the task.
        """
        expect("teacher", teacher, str, "its name, or the first digits of its fingerprint")
        expect("numerics", numerics, str | None, "the name of a numerics class")
        key = self._key(teacher, numerics)
        if isinstance(texts_or_rows, str):
            raise UserError(
                "texts_or_rows is one text; give a list of texts, or pathlib.Path(FILE)"
            )
        if isinstance(task, TaskSpec):
            spec = checked_task(task)
        else:
            expect("task", task, NAMES, "a shipped name (sst2), a YAML file, or a TaskSpec")
            spec = load_task(os.fspath(task))
        rows = as_rows(spec, texts_or_rows, "texts_or_rows")
        examples = build_examples(spec, rows, "given", labelled=False)
        ids_U2, entry_B = entries(examples.ids_B2)
        table = self._store.table(key, ids_U2, spec.name, "given", run="")
        return table.lookup(entry_B)[0]

    def _key(self, teacher: str, numerics: str | None) -> kept.TeacherKey:
        blocks = headers(self._store.layout)
        own = [block for block in blocks if is_teacher(block, teacher)]
        check_known("teacher", teacher, bool(own), {block.name for block in blocks})
        prints = sorted({block.teacher for block in own})
        if len(prints) > 1:
            raise UserError(
                f"{len(prints)} teachers in the store have the name {teacher!r}; give the start of "
                f"a fingerprint: {', '.join(one[:16] for one in prints)}"
            )
        found = {block.numerics: block for block in own}
        if numerics is None and len(found) == 1:
            numerics = next(iter(found))
        if numerics not in found:
            said = "is kept in several numerics classes"
            if numerics is not None:
                said = f"is not kept in the numerics class {numerics!r}"
            raise UserError(f"teacher {teacher!r} {said}; give numerics= one of: {list(found)}")
        block = found[numerics]
        classes = block.logits.values_MC.shape[1]
        return kept.TeacherKey(block.teacher, block.numerics, block.name, classes)
