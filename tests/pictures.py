"""Pictures that a test does not look at are made by the same functions, and a blank one is kept.

A run draws four of them at its end, which takes longer than its training in the tests. Before its
first step it has drawn drafts with the same texts, in the tests too.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sead_dist.reporting import plots, report
from sead_dist.runtime.files import written_aside


def keep_blanks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(report, "save", saver_of(plots.draft(Figure())))


def saver_of(picture: bytes) -> Callable[[Figure, Path], None]:
    def save(figure: Figure, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_bytes(picture)

    return save


def draw_pictures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(report, "save", plots.save)
