"""The report tried before the first step, so that a name which it cannot hold ends no long run.

Shapes: C classes.
"""

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sead_dist.data.examples import subset
from sead_dist.errors import RunError, UserError, reason, refusal
from sead_dist.reporting.report import write_predictions, write_report
from sead_dist.runs.results import closing_table, for_people
from sead_dist.runs.setup import Parts
from sead_dist.runtime.console import print_table
from sead_dist.runtime.run_log import write_json
from sead_dist.training.evaluation import EvalResult

ROWS = 2


def rehearse(parts: Parts) -> None:
    """Write predictions, plots, card and closing table of two rows under the run's own names, in a
    folder that goes at once. Rank 0 calls this.

    Raises UserError, or RunError for the environment's failures.
    """
    run = Path(parts.config.output_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=run) as folder:
            write_rehearsal(parts, run, Path(folder))
    except (UserError, RunError):
        raise
    except Exception as error:
        raise refusal(
            f"the report of this run, tried on {ROWS} rows before training, cannot be written: "
            f"{reason(error)}; give other names to the task, its splits or the teachers",
            error,
        ) from error


def write_rehearsal(parts: Parts, run: Path, folder: Path) -> None:
    for name in ("config.yaml", "environment.json", "teacher_manifest.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    metrics = dict.fromkeys(parts.task.metrics, 0.5)
    splits = {"selection": parts.splits.selection, **parts.splits.official}
    scores: dict[str, Any] = {}
    results: dict[str, float] = {}
    for name, split in splits.items():
        examples = split.examples
        labels_B = examples.labels_B[:ROWS]
        logits_BC = np.zeros((len(labels_B), parts.task.num_labels), np.float32)
        write_predictions(
            folder / "predictions" / f"{name}.parquet", examples.ids_B2[:ROWS], labels_B, logits_BC,
            np.full_like(logits_BC, 1 / parts.task.num_labels) if parts.teachers else None,
            for_people(parts, subset(examples, np.arange(len(labels_B))), logits_BC),
        )  # fmt: skip
        result = EvalResult(parts.task.name, name, 1, ROWS, metrics, 1.0, 1.0, logits_BC)
        results.update(result.card(f"eval_{name}"))
        scores[name] = {
            "student": metrics,
            "ensemble": metrics if parts.teachers else None,
            "teachers": [{"name": one.name, "metrics": metrics} for one in parts.teachers],
        }
    write_json(
        folder / "scores.json",
        {
            "task": parts.task.name,
            "metric": parts.task.metrics[0],
            "splits": scores,
            "labels": list(parts.task.labels),
        },
    )
    write_json(folder / "eval_results.json", results)
    write_report(folder)
    print_table(*closing_table(parts, scores), file=io.StringIO())
