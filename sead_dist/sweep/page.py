"""The report of a sweep as one HTML page that works from a file: tables, pictures, explanation.

The page asks for nothing outside itself; without JavaScript only the sorting is missing.
"""

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sead_dist.runtime.own_files import written_aside
from sead_dist.sweep.plots import COLOURS, Picture, draw_pictures, gaps
from sead_dist.sweep.report import arms, chance_of, equal_steps, means_over

if TYPE_CHECKING:
    from markupsafe import Markup

Rows = list[dict[str, Any]]
# of a cell, added up over tasks
COSTS = ("seconds", "teacher_forwards", "steps", "labelled_rows", "unlabelled_rows")


def render_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html, and its pictures as SVG files, into `folder`, which is made.

    Args:
        report: what report.json holds (`sweepscores.scores_of`).
        folder: where the page goes; an older page there is replaced.

    Returns:
        the page's path.
    """
    from jinja2 import Environment, StrictUndefined

    folder.mkdir(parents=True, exist_ok=True)
    pictures = [(picture, inline(picture, folder)) for picture in draw_pictures(report, folder)]
    template = (
        resources.files("sead_dist.reporting.templates")
        .joinpath("sweep.html.j2")
        .read_text("utf-8")
    )
    jinja = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    text = jinja.from_string(template).render(
        report=report,
        command=shlex.join(report["command"]),
        reference=report["reference"],
        names=[task["name"] for task in report["tasks"]],
        arms=arms(report),
        methods=methods(report),
        ceilings=ceilings(report),
        published=published(report),
        costs=costs(report),
        equal_steps=equal_steps(report),
        means_over=means_over(report),
        chance=chance_of(report),
        pictures=pictures,
        compared=bool(gaps(report)),
    )
    path = folder / "report.html"
    with written_aside(path) as aside:
        # a word of the command line may hold bytes that are no text
        aside.write_text(text, encoding="utf-8", errors="replace")
    return path


def methods(report: Mapping[str, Any]) -> Rows:
    """A row for each method: its mean, and by task its cell and whether that is the best.

    The highest mean comes first; methods without any score stand last.
    """
    found = {(of["task"], of["method"]): of for of in report["cells"]}
    best: dict[str, float] = {}
    for of in report["cells"]:
        if of["mean"] is not None:
            best[of["task"]] = max(of["mean"], best.get(of["task"], of["mean"]))
    why = absences(report)
    rows = []
    for mean in report["means"]:
        cells: Rows = []
        for task in report["tasks"]:
            place = (task["name"], mean["method"])
            of = found.get(place)
            if of is None or of["mean"] is None:
                cells.append({"mean": None, "why": why.get(place, "not run")})
            else:
                had = sum(score is not None for score in of["scores"])
                cells.append({**of, "runs": had, "best": of["mean"] == best[task["name"]]})
        rows.append({**mean, "cells": cells})
    return sorted(rows, key=lambda row: (-row["tasks"], -(row["score"] or 0.0)))


def absences(report: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """In a word, why a method has no score on a task."""
    kinds = {"missing": "not run", "failed": "failed", "not_applicable": "does not apply"}
    return {(of["task"], of["method"]): word for kind, word in kinds.items() for of in report[kind]}


def ceilings(report: Mapping[str, Any]) -> Rows:
    """A row for each teacher, the ensemble and the constant answer, with a score for each task.

    Their means are over the same tasks as the methods'."""
    scores: dict[str, dict[str, float]] = {}
    for of in report["ceilings"]:
        scores.setdefault(of["who"], {})[of["task"]] = of["score"]
    scores["constant answer"] = {task["name"]: task["constant"] for task in report["tasks"]}
    names = [task["name"] for task in report["tasks"]]
    return [
        {
            "who": who,
            "scores": [by_task.get(name) for name in names],
            "mean": mean_of([by_task.get(name) for name in report["mean_tasks"]]),
        }
        for who, by_task in scores.items()
    ]


def published(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row for each task and metric, a column for each model; `of` holds the figures, of which
    there are two where a task has two dev splits."""
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for of in report["published"]:
        row = rows.setdefault((of["task"], of["metric"]), {})
        row.setdefault(of["who"], []).append(of["score"])
    return {
        "who": list(dict.fromkeys(of["who"] for of in report["published"])),
        "notes": list(dict.fromkeys(of["note"] for of in report["published"])),
        "rows": [
            {"task": task, "metric": metric, "of": of, "here": best_here(report, task, metric)}
            for (task, metric), of in rows.items()
        ],
    }


def best_here(report: Mapping[str, Any], task: str, metric: str) -> Mapping[str, Any] | None:
    """The cell with the sweep's highest mean on `task`; None where it is scored otherwise."""
    if not any((of["name"], of["metric"]) == (task, metric) for of in report["tasks"]):
        return None
    cells = [of for of in report["cells"] if of["task"] == task and of["mean"] is not None]
    return max(cells, key=lambda of: of["mean"], default=None)


def costs(report: Mapping[str, Any]) -> Rows:
    """A row for each method: its mean, and what its runs took over the tasks of the mean."""
    rows = []
    for mean in report["means"]:
        cells = [
            of
            for of in report["cells"]
            if of["method"] == mean["method"] and of["task"] in report["mean_tasks"]
        ]
        rows.append(
            {
                **mean,
                **{key: total([of[key] for of in cells]) for key in COSTS},
            }
        )
    return rows


def mean_of(values: Sequence[float | None]) -> float | None:
    """Their mean; None where one is missing or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def total(values: Sequence[float | None]) -> float | None:
    """Their sum; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def inline(picture: Picture, folder: Path) -> "Markup":
    """The SVG file as a part of the page: with words for those who cannot see it, and colours that
    the page may change."""
    from markupsafe import Markup, escape

    _, _, drawing = (folder / picture.file).read_text("utf-8").partition("<svg ")
    for name, colour in COLOURS.items():
        drawing = drawing.replace(colour.lower(), f"var(--{name}, {colour})")
    label = escape(f"{picture.title}. {picture.words}")
    return Markup(f'<svg role="img" aria-label="{label}" ') + Markup(drawing)
