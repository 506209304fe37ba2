"""The report of a sweep as one HTML page that works from a file: tables, pictures, explanation.

The page loads nothing from outside. Without JavaScript only the sorting is missing. Its pictures
are also SVG files: differences from the reference, and score against time. Page and pictures depend
on report.json alone. Text in the pictures stays text, so that it can be searched and read aloud.
`COLOURS` names the few colours, so that a dark page can change them.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sead_dist.data.significance import LEVEL
from sead_dist.reporting.model_card import fill_template
from sead_dist.reporting.plots import BLUE, GREY, RED, short
from sead_dist.runtime.console import counted
from sead_dist.runtime.files import written_aside
from sead_dist.sweep.report import (
    SHARES,
    SHARES_NOTE,
    arms,
    chance_notes,
    equal_steps,
    gap_shares,
    holm_note,
    means_over,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
# keys of a cell that are added up over tasks
COSTS = ("seconds", "teacher_forwards", "steps", "labelled_rows", "unlabelled_rows")
INK, PAPER = "#1b1f24", "#ffffff"
COLOURS = {"ink": INK, "paper": PAPER, "better": BLUE, "worse": RED, "unsure": GREY}
WIDTH_IN = 10.0
ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class Picture:
    """A file of the report's folder, and what it shows in words."""

    file: str
    title: str
    words: str


@dataclass(frozen=True)
class MethodGap:
    """How far a method is from the reference on one task, or over all of them.

    interval: None where there are too few runs for one.
    """

    task: str
    method: str
    value: float
    interval: tuple[float, float] | None
    p_holm: float | None = None

    @property
    def colour(self) -> str:
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return GREY
        return BLUE if self.value > 0 else RED


def render_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html and its pictures (SVG files) into `folder`, which is made. Returns the
    page's path. report: the content of report.json (`sweep.results.scores_of`)."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [(picture, inline(picture, folder)) for picture in draw_pictures(report, folder)]
    text = fill_template(
        "sweep.html.j2",
        report=report,
        command=shlex.join(report["command"]),
        reference=report["reference"],
        names=[task["name"] for task in report["tasks"]],
        arms=arms(report),
        methods=methods(report),
        ceilings=ceilings(report),
        published=published(report),
        holm_note=holm_note(report),
        shares=gap_shares(report),
        shares_columns=SHARES,
        shares_note=SHARES_NOTE,
        costs=cost_rows(report),
        equal_steps=equal_steps(report),
        means_over=means_over(report),
        chance=chance_notes(report),
        pictures=pictures,
        compared=bool(gaps(report)),
    )
    path = folder / "report.html"
    with written_aside(path) as aside:
        # a word of the command line may hold bytes that are not text
        aside.write_text(text, encoding="utf-8", errors="replace")
    return path


def methods(report: Mapping[str, Any]) -> Rows:
    """A row for each method: its mean, and by task its cell and whether that is the best.

    The highest mean comes first. Methods without any score come last.
    """
    found = {(of["task"], of["method"]): of for of in report["cells"]}
    best: dict[str, float] = {}
    for of in report["cells"]:
        if of["mean"] is not None:
            best[of["task"]] = max(of["mean"], best.get(of["task"], of["mean"]))
    kinds = {"missing": "not run", "failed": "failed", "not_applicable": "does not apply"}
    why = {(of["task"], of["method"]): kinds[kind] for kind in kinds for of in report[kind]}
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


def ceilings(report: Mapping[str, Any]) -> Rows:
    """A row for each teacher, the ensemble and the majority baseline, with a score for each task.

    Their means are over the same tasks as the methods'."""
    scores: dict[str, dict[str, float]] = {}
    for of in report["ceilings"]:
        scores.setdefault(of["who"], {})[of["task"]] = of["score"]
    scores["majority baseline"] = {task["name"]: task["constant"] for task in report["tasks"]}
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
    """A row for each task and metric, a column for each model. `of` holds the figures by model; two
    where a task has two dev splits."""
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
    """The cell with the sweep's highest mean on `task`; None where its metric is another."""
    if not any((of["name"], of["metric"]) == (task, metric) for of in report["tasks"]):
        return None
    cells = [of for of in report["cells"] if of["task"] == task and of["mean"] is not None]
    return max(cells, key=lambda of: of["mean"], default=None)


def cost_rows(report: Mapping[str, Any]) -> Rows:
    """A row for each method: its mean, and what its runs took over the tasks of the mean."""
    rows = []
    for mean in report["means"]:
        own = [of for of in report["cells"] if of["method"] == mean["method"]]
        cells = [of for of in own if of["task"] in report["mean_tasks"]]
        rows.append({**mean, **{key: total([of[key] for of in cells]) for key in COSTS}})
    return rows


def mean_of(values: Sequence[float | None]) -> float | None:
    """Their mean; None where one is missing or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def total(values: Sequence[float | None]) -> float | None:
    """The sum of the known values; None where none is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def inline(picture: Picture, folder: Path) -> "Markup":
    """The SVG file as a part of the page. It has a text for readers who cannot see it, and colours
    that the page can change."""
    from markupsafe import Markup, escape

    _, _, drawing = (folder / picture.file).read_text("utf-8").partition("<svg ")
    for name, colour in COLOURS.items():
        drawing = drawing.replace(colour.lower(), f"var(--{name}, {colour})")
    label = escape(f"{picture.title}. {picture.words}")
    return Markup(f'<svg role="img" aria-label="{label}" ') + Markup(drawing)


def draw_pictures(report: Mapping[str, Any], folder: Path) -> list[Picture]:
    """Write the pictures that have something to show, and return them."""
    pictures = []
    if found := gaps(report):
        pictures.append(draw_gaps(found, str(report["reference"]), folder))
    if found_costs := costs(report):
        pictures.append(draw_costs(found_costs, report["reference"], folder))
    return pictures


def gaps(report: Mapping[str, Any]) -> list[MethodGap]:
    """The report's differences. Where it has none for a method that has scores of the same seeds as
    the reference: the difference of the means, without an interval."""
    reference = {of["task"]: of for of in report["cells"] if of["method"] == report["reference"]}
    found = []
    for of in report["cells"]:
        other = reference.get(of["task"])
        if other is None or other is of or of["mean"] is None or other["mean"] is None:
            continue
        value, interval = of["difference"], of["interval"]
        if value is None and scored_seeds(of) == scored_seeds(other):
            value = of["mean"] - other["mean"]
        if value is not None:
            gap = MethodGap(
                of["task"], of["method"], value, interval and tuple(interval), of.get("p_holm")
            )
            found.append(gap)
    if len(report["tasks"]) > 1:
        found += [
            MethodGap(ALL_TASKS, of["method"], of["difference"], tuple(of["interval"]))
            for of in report["means"]
            if of["difference"] is not None and of["interval"] is not None
        ]
    return found


def scored_seeds(cell: Mapping[str, Any]) -> list[bool]:
    """For each seed whether there is a score."""
    return [score is not None for score in cell["scores"]]


def costs(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Seconds (one seed of every task) and mean score by method, over the tasks of the mean."""
    return {
        row["method"]: (row["seconds"], row["score"])
        for row in cost_rows(report)
        if row["score"] is not None and row["seconds"] is not None
    }


def draw_gaps(found: Sequence[MethodGap], name: str, folder: Path) -> Picture:
    """A panel for each task and a row for each method; the other way round where there are more
    tasks than methods. name: of the reference."""
    tasks = list(dict.fromkeys(gap.task for gap in found))
    tasks.sort(key=lambda task: task == ALL_TASKS)
    methods = list(dict.fromkeys(gap.method for gap in found))
    by_task = len(tasks) <= len(methods)
    panels, rows = (tasks, methods) if by_task else (methods, tasks)
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    height_in = lines * (0.75 + 0.22 * len(rows)) + 0.3
    with svg(folder / "differences.svg", height_in) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=not by_task)
        for n, axes in enumerate(grid.flat):
            if n >= len(panels):
                axes.set_axis_off()
                continue
            own = [gap for gap in found if panels[n] in (gap.task, gap.method)]
            at = [(gap.method if by_task else gap.task, gap) for gap in own]
            plot_panel(axes, [(rows.index(row), gap) for row, gap in at])
            axes.set_title(short(panels[n], 24), fontsize=10, loc="left", fontweight="bold")
            axes.set_yticks(range(len(rows)), [short(row, 24) for row in rows])
            if n + columns >= len(panels):  # the last panel of its column
                axes.xaxis.set_tick_params(labelbottom=True)
        grid[0, 0].set_ylim(len(rows) - 0.4, -0.6)
        figure.supxlabel(f"difference from {name} (score)", fontsize=9)
    words = gaps_sentences(found, name)
    if by_task and len(panels) > 1:
        words += " Each panel has its own scale, with 0 in the middle."
    return Picture("differences.svg", f"Differences from {name}", words)


def plot_panel(axes: "Axes", at: Sequence[tuple[int, MethodGap]]) -> None:
    """Draw dots with their intervals. Dots whose interval leaves out 0 are filled and coloured."""
    axes.axvline(0, color=INK, linewidth=0.8)
    reach = 1e-4
    for y, gap in at:
        low, high = gap.interval or (gap.value, gap.value)
        axes.plot([low, high], [y, y], color=gap.colour, linewidth=1.6)
        filling = PAPER if gap.colour == GREY else gap.colour
        axes.plot(gap.value, y, "o", color=gap.colour, markerfacecolor=filling, markersize=5.5)
        reach = max(reach, -low, high)
    widest = max(reach * 1.08, *map(abs, axes.get_xlim()))  # of all panels that share the axis
    axes.set_xlim(-widest, widest)
    axes.locator_params(axis="x", nbins=4)


def gaps_sentences(found: Sequence[MethodGap], name: str) -> str:
    """What the picture of differences shows, as sentences."""
    single = [gap for gap in found if gap.task != ALL_TASKS]
    number = counted(len(single), "difference")
    better = sum(gap.colour == BLUE for gap in single)
    worse = sum(gap.colour == RED for gap in single)
    if all(gap.interval is None for gap in single):
        one = len(single) == 1
        return f"{number} without {'an interval: it' if one else 'intervals: each'} may be chance."
    left = sum(gap.p_holm is not None and gap.p_holm < 1 - LEVEL for gap in single)
    return (
        f"Of {number}, {better} are above and {worse} below {name} beyond chance, each taken "
        f"by itself (filled dots). After Holm's correction for all of them {left} are left. The "
        "others (hollow dots) may be chance. Lines are 95% intervals."
    )


def draw_costs(
    found: Mapping[str, tuple[float, float]], reference: str | None, folder: Path
) -> Picture:
    """Draw mean score against seconds. Names are at the right, in the order of scores."""
    names = sorted(found, key=lambda name: found[name][1])
    scores = [found[name][1] for name in names]
    middle, reach = (scores[0] + scores[-1]) / 2, max((scores[-1] - scores[0]) * 0.6, 0.002)
    step = 2 * reach / max(len(names), 8)
    with svg(folder / "cost.svg", max(2.6, 0.7 + 0.27 * len(names))) as figure:
        axes = figure.subplots()
        for name, place in zip(names, spread_out(scores, step), strict=True):
            seconds, score = found[name]
            filled = PAPER if name == reference else BLUE
            axes.plot(seconds, score, "o", color=BLUE, markerfacecolor=filled, markersize=7)
            axes.annotate(
                short(name, 24),
                (seconds, score),
                xytext=(1.03, place),
                textcoords=("axes fraction", "data"),
                va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 4},
            )
        axes.set_ylim(middle - reach - step, middle + reach + step)
        axes.set_xlim(0, max(seconds for seconds, _ in found.values()) * 1.06)
        axes.set_xlabel("seconds of training: one seed of every task")
        axes.set_ylabel("mean score over tasks")
    words = "; ".join(
        f"{name} {score:.4f} in {seconds:.0f} s" for name, (seconds, score) in found.items()
    )
    return Picture("cost.svg", "Score against time", f"{words}.")


def spread_out(places: Sequence[float], step: float) -> list[float]:
    """Move rising places apart, so that neighbours are at least `step` from each other, around
    the same middle."""
    apart: list[float] = []
    for place in places:
        apart.append(max(place, apart[-1] + step) if apart else place)
    shift = (sum(apart) - sum(places)) / len(places)
    return [place - shift for place in apart]


@contextmanager
def svg(path: Path, height_in: float) -> "Iterator[Figure]":
    """A figure that is written as a file. The same report gives the same bytes."""
    # Not pyplot: it keeps figures in global state and may look for a display.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        # ids of two pictures in one page must differ
        "svg.hashsalt": path.stem,
        # a name may hold a dollar sign
        "text.parse_math": False,
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
        with written_aside(path) as aside:
            figure.savefig(aside, format="svg", metadata={"Date": None})
