"""The report of a run: predictions as Parquet, tables, plots and the model card.

Shapes: B examples, C classes (1 for regression).
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from sead_dist.config.names import renamed_record
from sead_dist.data.metrics import MOST_SHOWN, confusion
from sead_dist.errors import reading
from sead_dist.reporting.model_card import card_text
from sead_dist.reporting.plots import (
    Reliability,
    draft,
    plot_calibration,
    plot_confusion,
    plot_loss,
    plot_regression,
    plot_scores,
    reliability,
    save,
)
from sead_dist.reporting.run_files import read_run
from sead_dist.runtime.files import folder_aside, written_aside
from sead_dist.runtime.run_log import read_metrics

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Predictions:
    """The rows of one predictions/<split>.parquet."""

    ids_B2: NDArray[np.int64]
    labels_B: NDArray[Any]  # int64 class index, -1 unlabelled; regression float64, NaN unlabelled
    student_logits_BC: NDArray[Any]
    ensemble_probabilities_BC: NDArray[Any] | None  # regression: the ensemble's scores, C = 1

    def places(self, ids_B2: NDArray[np.int64]) -> list[int | None]:
        """The place of each id's row; None for an id without a row."""
        place_of = {id_2.tobytes(): place for place, id_2 in enumerate(self.ids_B2)}
        return [place_of.get(id_2.tobytes()) for id_2 in np.ascontiguousarray(ids_B2)]


def write_report(run: Path, trial: bool = False) -> None:
    """Write README.md and plots/ from the other files of a run directory, also into run/model/.

    The report depends on those files alone, so it may be written again at any time. trial: the
    plots are drawn as drafts and not kept.

    Raises:
        UserError: a file that the report needs is missing or cannot be read.
    """
    files = read_run(run)
    plots = run / "plots"
    plots.mkdir(exist_ok=True)
    names: list[str] = []

    def keep(figure: "Figure", name: str) -> None:
        names.append(name)
        if trial:
            draft(figure)
        else:
            save(figure, plots / name)

    mark = files.mark
    records = [renamed_record(record) for record in read_metrics(run)]
    keep(plot_loss(records, files.metric_of("selection")), "loss.png")
    panels = {
        f"{split}{mark}": [
            (role, name, metrics[files.metric_of(split)])
            for role, name, metrics in files.split_rows(split)
            if metrics.get(files.metric_of(split)) is not None
        ]
        for split in files.evaluation_splits
    }
    split = files.evaluation_splits[0]
    keep(plot_scores(panels, files.metric_of(split)), "scores.png")
    errors, matrix = {}, None
    # without gold labels no answer is right or wrong
    if (run / "predictions" / f"{split}.parquet").exists() and not files.by_teachers(split):
        predictions = read_predictions(run / "predictions" / f"{split}.parquet")
        figure, found = _plot_predictions(predictions, f"{split}{mark}")
        keep(figure, "calibration.png")
        errors = {name: result.error for name, result in found.items()}
        labels = files.scores.get("labels") or []
        if len(labels) == predictions.student_logits_BC.shape[1] > 1:
            matrix = confusion(labels, predictions.labels_B, predictions.student_logits_BC)
            if len(labels) <= MOST_SHOWN:
                keep(plot_confusion(matrix, f"{split}{mark}"), "confusion.png")
    with written_aside(run / "README.md") as aside:
        aside.write_text(card_text(files, names, errors, matrix), "utf-8")
    if (run / "model").is_dir():
        _copy_aside(run / "README.md", run / "model" / "README.md")
        (run / "model" / "plots").mkdir(exist_ok=True)
        for name in names:
            _copy_aside(plots / name, run / "model" / "plots" / name)
        if files.onnx:
            _link_folder(run / "onnx", run / "model" / "onnx")


def write_predictions(
    path: Path,
    ids_B2: NDArray[np.int64],
    labels_B: NDArray[Any],
    student_logits_BC: NDArray[Any],
    ensemble_probabilities_BC: NDArray[Any] | None,
    more: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Write one split's predictions as Parquet: id (32 hex digits), label, lists of floats.

    Args:
        path: predictions/<split>.parquet; its folder is made.
        ids_B2: the 128-bit example ids, as two int64.
        labels_B: class indices, or the gold scores of a regression.
        student_logits_BC: the student's raw outputs.
        ensemble_probabilities_BC: the ensemble's class probabilities (for a regression its
            scores, C = 1), or None without teachers.
        more: further columns of B values for people: row, names of labels, texts.
    """
    import pyarrow as pa
    from pyarrow import parquet

    halves_B2 = np.ascontiguousarray(ids_B2, dtype=np.int64).view(np.uint64)
    ensemble = ensemble_probabilities_BC
    columns = {
        "id": pa.array([f"{high:016x}{low:016x}" for high, low in halves_B2.tolist()], pa.string()),
        "label": pa.array(labels_B),
        "student_logits": _as_lists(student_logits_BC),
        "ensemble_probabilities": pa.nulls(len(labels_B), pa.list_(pa.float32()))
        if ensemble is None
        else _as_lists(ensemble),
        **{name: pa.array(_encodable(values)) for name, values in (more or {}).items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        parquet.write_table(pa.table(columns), aside)


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote, with the same bits.

    Raises:
        UserError: the file is missing, is not Parquet or lacks a column.
    """
    from pyarrow import parquet

    with reading(path, "evaluate the run again"):
        read = parquet.read_table(path)
        halves = [[int(i[:16], 16), int(i[16:], 16)] for i in read["id"].to_pylist()]
        ensemble = read["ensemble_probabilities"]
        return Predictions(
            ids_B2=np.array(halves, dtype=np.uint64).view(np.int64),
            labels_B=read["label"].to_numpy(),
            student_logits_BC=_as_array(read["student_logits"]),
            ensemble_probabilities_BC=None if ensemble.null_count else _as_array(ensemble),
        )


def _plot_predictions(
    predictions: Predictions, split: str
) -> tuple["Figure", dict[str, Reliability]]:
    """(plot of the calibration, its numbers); for a regression (scatter plot, {})."""
    logits_BC = predictions.student_logits_BC.astype(np.float64)
    ensemble_BC = predictions.ensemble_probabilities_BC
    # a report is made of files, which do not name the kind; the labels have its `label_type`
    if np.issubdtype(predictions.labels_B.dtype, np.floating):
        predicted = {"student": logits_BC[:, 0]}
        if ensemble_BC is not None:
            predicted["ensemble"] = ensemble_BC[:, 0]
        return plot_regression(predictions.labels_B, predicted, split), {}
    shares = {"student": softmax(logits_BC, axis=1)}
    if ensemble_BC is not None:
        shares["ensemble"] = ensemble_BC
    results = {name: reliability(p_BC, predictions.labels_B) for name, p_BC in shares.items()}
    return plot_calibration(results, split), results


def _encodable(values: Sequence[Any]) -> list[Any]:
    """The values. Lone surrogates in texts become question marks: UTF-8 cannot hold them."""
    return [
        value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for value in values
    ]


def _as_lists(values_BC: NDArray[Any]) -> "pa.ListArray":
    import pyarrow as pa

    offsets = np.arange(len(values_BC) + 1, dtype=np.int32) * values_BC.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_BC.reshape(-1)))


def _as_array(lists: "pa.ChunkedArray") -> NDArray[Any]:
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in lists.chunks])
    return values.reshape(len(lists), -1)


def _copy_aside(source: Path, target: Path) -> None:
    with written_aside(target) as aside:
        shutil.copyfile(source, aside)


def _link_folder(source: Path, target: Path) -> None:
    """Make `target` a folder of hard links to the files of `source`, or of copies where the file
    system has no hard links."""

    def link(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:
            shutil.copyfile(file, place)

    with folder_aside(target) as aside:
        shutil.copytree(source, aside, copy_function=link, dirs_exist_ok=True)
