"""The pictures of a report, each a function of plain numbers that returns a figure.

Shapes: B examples, C classes, K bins of confidence.
Colours are those of Okabe and Ito (2008). They differ for any kind of colour vision.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from sead_dist.data.metrics import Confusion
from sead_dist.runtime.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
LOSSES = {
    "loss": ("total", BLUE, "-"),
    "loss_soft": ("soft (teachers)", ORANGE, "--"),
    "loss_hard": ("hard (labelled rows)", GREEN, ":"),
    "loss_feature": ("feature", GREY, "-."),
}
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Reliability:
    """How often a model is right, by its confidence (the largest class probability).

    Bins are equal steps of confidence. An empty bin holds NaN in both means.
    """

    confidence_K: NDArray[np.float64]
    accuracy_K: NDArray[np.float64]
    count_K: NDArray[np.int64]
    error: float  # expected calibration error, 0 to 1


def reliability(probabilities_BC: Floats, labels_B: NDArray[Any], bins: int = 10) -> Reliability:
    """Compute the reliability of class probabilities (Guo et al. 2017, equal-width bins).

    Args:
        probabilities_BC: rows that sum to 1; rows with NaN (no prediction) are left out.
        labels_B: class indices; rows below 0 (no gold label) are left out.
        bins: number of bins from 0 to 1; a bin holds its upper edge.
    """
    known_B = (labels_B >= 0) & np.isfinite(probabilities_BC).all(axis=1)
    confidence_B = probabilities_BC[known_B].max(axis=1).astype(np.float64)
    right_B = probabilities_BC[known_B].argmax(axis=1) == labels_B[known_B]
    bin_B = np.clip(np.ceil(confidence_B * bins).astype(np.int64) - 1, 0, bins - 1)
    count_K = np.bincount(bin_B, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence_K = np.bincount(bin_B, weights=confidence_B, minlength=bins) / count_K
        accuracy_K = np.bincount(bin_B, weights=right_B, minlength=bins) / count_K
    gap_K = np.nan_to_num(np.abs(accuracy_K - confidence_K))
    error = float((gap_K * count_K).sum() / max(int(count_K.sum()), 1))
    return Reliability(confidence_K, accuracy_K, count_K, error)


def plot_loss(records: Sequence[Mapping[str, Any]], metric: str) -> "Figure":
    """Draw the parts of the loss, and below them the score on the selection split, over steps.

    records: those of metrics.jsonl. metric: the one of the score.
    """
    figure = _figure(8, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    train = even_records([r for r in records if r.get("event") == "train"])
    window = _window(len(train))
    for key, (label, colour, style) in LOSSES.items():
        points = [(r["step"], r[key]) for r in train if r.get(key) is not None]
        if points:
            _line(top, np.array(points, dtype=float), label, colour, style, window)
    top.set_ylim(bottom=0)
    top.set(ylabel="training loss", title="Training loss and selection score")
    _legend(top, f"mean of {window} records" if window > 1 else None)

    evals = [r for r in records if r.get("event") == "eval" and r.get("split") == "selection"]
    scores = [(r["step"], r["metrics"][metric]) for r in evals if metric in r["metrics"]]
    scores = [(step, score) for step, score in scores if score is not None]
    if scores:
        steps, values = zip(*scores, strict=True)
        best = int(np.argmax(values))
        bottom.plot(steps, values, "o-", color=BLUE, markersize=4, label=f"student, {metric}")
        label = f"best, {values[best]:.4f}"
        bottom.plot(steps[best], values[best], "*", color=RED, markersize=13, label=label)
        _legend(bottom)
    else:
        _note(bottom, "no evaluation on the selection split")
    bottom.set(xlabel="optimiser step", ylabel=f"selection {metric}")
    return _ruled(figure)


def even_records(train: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records of training, with those of few rows joined to their neighbours.

    A record has few rows where an evaluation or the end of the run cuts it short. Its mean would be
    an outlier. Losses are means over rows. A joined record has the step of its last part.
    """
    if not all("rows" in record for record in train):
        return [dict(record) for record in train]  # an older version, which did not count rows
    full = max((record["rows"] for record in train), default=0)
    joined: list[dict[str, Any]] = []
    for record in train:
        if joined and joined[-1]["rows"] < full / 2:
            joined.append(_join(joined.pop(), record))
        else:
            joined.append(dict(record))
    if len(joined) > 1 and joined[-1]["rows"] < full / 2:
        last = joined.pop()
        joined.append(_join(joined.pop(), last))
    return joined


def _join(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One record for the rows of both: means weighted by rows, and all else of the second."""
    rows = first["rows"] + second["rows"]
    both = {**second, "rows": rows}
    for key in LOSSES:
        if first.get(key) is not None and second.get(key) is not None:
            both[key] = (first[key] * first["rows"] + second[key] * second["rows"]) / rows
    return both


def plot_scores(panels: Mapping[str, Sequence[tuple[str, str, float]]], metric: str) -> "Figure":
    """Draw one panel of horizontal bars per split.

    Args:
        panels: per split its (role, name, score), from the top down; the role is "student",
            "ensemble" or "teacher" and gives the colour.
        metric: what the scores are.
    """
    colours = {"student": BLUE, "ensemble": ORANGE, "teacher": GREY}
    rows = max(len(bars) for bars in panels.values())
    figure = _figure(8, len(panels) * (1.3 + 0.42 * rows))
    values = [score for bars in panels.values() for _, _, score in bars]
    for axes, (split, bars) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for y, (role, _, score) in enumerate(bars):
            axes.barh(y, score, height=0.66, color=colours[role])
            axes.annotate(
                f"{score:.4f}",
                (max(score, 0.0), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(bars)), [_plain(short(name)) for _, name, _ in bars])
        axes.invert_yaxis()
        # Bars start at zero and the axis ends at the best possible score, so that their
        # lengths can be compared.
        axes.set_xlim(min([0.0, *values]) * 1.1, max([1.0, *values]))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel=metric, title=f"Scores on {split}")
    return _ruled(figure, grid="x")


def plot_calibration(reliabilities: Mapping[str, Reliability], split: str) -> "Figure":
    """Draw how often the student (and the ensemble) is right, by confidence.

    reliabilities: one or two, by name, with equal numbers of bins.
    """
    figure = _figure(8, 6.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = len(next(iter(reliabilities.values())).count_K)
    width = 0.84 / (bins * len(reliabilities))
    lowest = bins
    for n, (name, result) in enumerate(reliabilities.items()):
        colour, marker = ((BLUE, "o"), (ORANGE, "s"))[n]
        filled_K = result.count_K > 0
        lowest = min(lowest, *np.flatnonzero(filled_K), bins - 1)
        label = f"{name}, calibration\nerror {result.error:.4f}"
        means = result.confidence_K[filled_K], result.accuracy_K[filled_K]
        top.plot(*means, marker=marker, color=colour, label=label)
        left_K = (np.arange(bins) + 0.08) / bins + n * width
        share_K = result.count_K / max(int(result.count_K.sum()), 1)
        bottom.bar(left_K, share_K, width=0.95 * width, align="edge", color=colour)
    top.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1, label="perfect")
    # Confidence is never below one over the number of classes, so the axis starts at the first bin
    # that has rows.
    top.set(xlim=(lowest / bins, 1), ylim=(0, 1.02), ylabel="share of rows that are right")
    top.set_title(f"Calibration on {split}")
    bottom.set(xlabel="confidence (largest class probability)", ylabel="share of rows")
    _legend(top)
    return _ruled(figure)


def plot_confusion(found: Confusion, split: str) -> "Figure":
    """Draw how many rows of each gold label got each predicted one. The shade is the share of the
    gold label's rows."""
    counts_CC, names = found.counts_CC, [_plain(short(name, 20)) for name in found.names]
    size = 2.5 + 0.55 * len(names)
    figure = _figure(size + 1.0, size)
    axes = figure.subplots()
    share_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    for gold, predicted in np.argwhere(counts_CC):
        dark = share_CC[gold, predicted] > 0.5
        axes.text(
            predicted, gold, str(counts_CC[gold, predicted]), ha="center", va="center",
            color="white" if dark else "black", fontsize="small",
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="gold label", title=f"Student on {split}")
    return _ruled(figure, grid=None)


def plot_regression(gold_B: Floats, predicted: Mapping[str, Floats], split: str) -> "Figure":
    """Draw predicted against gold scores, in a panel for each of at most two (student, ensemble).
    Rows whose gold score is NaN are left out."""
    figure = _figure(0.5 + 4.5 * len(predicted), 5)
    known_B = np.isfinite(gold_B)
    drawn = np.concatenate([gold_B[known_B], *(p_B[known_B] for p_B in predicted.values())])
    low, high = float(np.nanmin(drawn, initial=0.0)), float(np.nanmax(drawn, initial=0.0))
    margin = 0.03 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    panels = figure.subplots(1, len(predicted), sharey=True, squeeze=False)[0]
    for axes, (name, predicted_B), colour in zip(
        panels, predicted.items(), (BLUE, ORANGE), strict=False
    ):
        errors_B = np.abs(predicted_B - gold_B)[known_B]
        error = float(np.nanmean(errors_B)) if len(errors_B) else float("nan")
        axes.plot(limits, limits, color="black", linestyle="--", linewidth=1, zorder=3)
        axes.scatter(gold_B[known_B], predicted_B[known_B], s=14, alpha=0.4, color=colour, lw=0)
        axes.set(xlim=limits, ylim=limits, xlabel="gold score (dashed: predicted = gold)")
        axes.set_title(f"{name}, mean absolute error {error:.3f}", fontsize="medium")
    panels[0].set_ylabel("predicted score")
    figure.suptitle(f"Predicted against gold on {split}")
    return _ruled(figure)


def _figure(width: float, height: float) -> "Figure":
    # Not pyplot: it keeps figures in global state and may look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _window(records: int) -> int:
    """How many records a smoothed point is the mean of; few records are drawn as they are."""
    return records // 40 if records >= 120 else 1


def _line(axes: "Axes", points: Floats, label: str, colour: str, style: str, window: int) -> None:
    """Draw a line. Of many points, draw the running mean over a faint line of the points."""
    steps, values = points.T
    if window == 1 or len(values) < window:
        axes.plot(steps, values, style, color=colour, label=label, marker="o", markersize=3)
        return
    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    middle = steps[(window - 1) // 2 :][: len(mean)]
    axes.plot(middle, mean, style, color=colour, linewidth=2, label=label)


def _legend(axes: "Axes", title: str | None = None) -> None:
    """Put the legend to the right of the axes, if there is anything in it."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            title=title,
            alignment="left",
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            frameon=False,
            borderaxespad=0.0,
        )


def _note(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def short(name: str, longest: int = 32) -> str:
    """A name of at most `longest` letters; the end of a longer one is cut."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _plain(name: str) -> str:
    """The name with its dollar signs escaped: text between two of them would become a formula."""
    return name.replace("$", r"\$")


def _ruled(figure: "Figure", grid: Literal["both", "x"] | None = "both") -> "Figure":
    """The figure with faint grid lines, and without the upper and right lines of its frames."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if grid is not None:
            axes.grid(axis=grid, alpha=0.25)
        axes.set_axisbelow(True)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write the figure as a PNG. The folder is made. Raises OSError where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        _draw(figure, file)


def draft(figure: "Figure") -> bytes:
    """The figure as a small PNG, without numbers on its axes and without a layout, which take most
    of the time. Raises an error of matplotlib where a text of the figure cannot be drawn.
    """
    from matplotlib.ticker import AutoLocator, NullLocator

    figure.set_layout_engine(None)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_locator(), AutoLocator):
                axis.set_major_locator(NullLocator())
    figure.set_dpi(20)
    drawn = io.BytesIO()
    _draw(figure, drawn)
    return drawn.getvalue()


def _draw(figure: "Figure", file: BinaryIO) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # not savefig: it goes through the whole figure twice, for the same bytes
    FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]
