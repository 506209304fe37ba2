"""Pictures that a test does not look at: made by the same functions, drawn as drafts.

A run draws four of them at its end, which takes longer than its training in the tests.
"""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sead_dist.reporting import plots, report
from sead_dist.runtime.files import written_aside


def save_draft(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(plots.draft(figure))


def draw_drafts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(report, "save", save_draft)


def draw_pictures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(report, "save", plots.save)
