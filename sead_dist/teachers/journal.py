"""What was computed, block by block, by each rank of each start of a run: RUN/teacher_rows/."""

import json
import time
from pathlib import Path

from sead_dist.runtime.distributed import World, gather_objects
from sead_dist.runtime.run_log import append_line


class Journal:
    """This rank's file of computed rows, beside those of the other ranks."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.path = folder / f"rank-{world.rank}.jsonl"

    def note(self, teacher: str, split: str, rows: int) -> None:
        """So many rows of a teacher are in the store now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"teacher": teacher, "split": split, "rows": rows, "time": round(time.time(), 3)}
        append_line(self.path, json.dumps(record))

    def rows(self) -> int:
        """Rows computed by all ranks and restarts of this run. Every rank calls this."""
        mine = _rows(self.path) if self.path.is_file() else 0
        return sum(gather_objects(self.world, mine)) + self._rows_of_other_worlds()

    def _rows_of_other_worlds(self) -> int:
        """Rows computed by ranks that this world no longer has."""
        paths = self.folder.glob("rank-*.jsonl")
        gone = [path for path in paths if int(path.stem.partition("-")[2]) >= self.world.size]
        return sum(_rows(path) for path in gone)


def _rows(path: Path) -> int:
    return sum(_rows_of(line) for line in path.read_text(encoding="utf-8").splitlines())


def _rows_of(line: str) -> int:
    """Rows of a journal line; a line torn by a kill counts nothing."""
    try:
        return int(json.loads(line)["rows"])
    except (ValueError, KeyError, TypeError):
        return 0
