"""Scores and intervals of the table's finished runs, from their kept predictions alone.

    python benchmarks/intervals.py docs/results/table/runs --page docs/results/table.md
    python benchmarks/intervals.py docs/results/table/PART --page docs/results/table.md --part PART
    python benchmarks/intervals.py --smoke

For each task of the folder: every arm's score by the task's main metric, what `sead` has more, and
the 95% interval of that. With one seed it is the paired interval over rows (`paired_gap`), with
three or more it is over rows and seeds, as in a sweep's report; of two seeds there is none. At the
end, of several tasks, `sead` less `control`, and less `finetune`, over all of them, which count
alike. --page puts all of it into the part of a page that is marked for it, which --part names.
Tasks whose rows stand in groups are not read.

Shapes: T tasks, B rows, C classes, S seeds, R resamples.
"""

import argparse
import statistics
import sys
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from result_file import put_into, smoke_argument, table

from sead_dist.data.significance import (
    RESAMPLES,
    Difference,
    Floats,
    compare,
    mean_difference,
    paired_gap,
    resampled_scores,
)
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.reporting.report import read_predictions, write_predictions
from sead_dist.runtime.run_log import is_finished, read_as, write_json

# the part of the page for the runs of the table's core
PART = "intervals"
FIRST, CONTROL = "sead", "control"
# arms without teachers, over which FIRST is given for all tasks together
WITHOUT = (CONTROL, "finetune")
COLUMNS = ("arm", "seeds", "steps", "{metric}", "`sead` has more", "95% interval", "seconds")


@dataclass(frozen=True)
class Rows:
    """What the metrics of the table's tasks read of a split."""

    labels_B: Any
    groups_B: None = None
    answers: None = None


@dataclass(frozen=True)
class Run:
    """A finished run: its scores of the evaluation split, its summary, its logits_BC."""

    scores: Mapping[str, Any]
    summary: Mapping[str, Any]
    logits_BC: Any


@dataclass(frozen=True)
class TaskRuns:
    """The finished runs of a task by arm and seed, the lowest score first; their rows."""

    task: TaskSpec
    split: str
    rows: Rows
    arms: dict[str, dict[int, Run]]

    @property
    def metric(self) -> str:
        return self.task.metrics[0]

    def score(self, arm: str, seed: int) -> float:
        return float(self.arms[arm][seed].scores["student"][self.metric])

    def common(self, arm: str, other: str) -> list[int]:
        return sorted(self.arms[arm].keys() & self.arms[other].keys())

    def resampled_SR(self, arm: str, seeds: Sequence[int]) -> Floats:
        """The same draws of rows for every arm of a task, others for another task."""
        logits_SBC = [self.arms[arm][seed].logits_BC for seed in seeds]
        draws = zlib.crc32(self.task.name.encode())
        return resampled_scores(self.metric, self.task.task_kind, logits_SBC, self.rows, draws)

    def difference(self, arm: str) -> Difference:
        """FIRST less an arm, over rows and the seeds that both have, at least three."""
        seeds = self.common(FIRST, arm)
        return compare(
            [self.score(FIRST, seed) for seed in seeds],
            [self.score(arm, seed) for seed in seeds],
            self.resampled_SR(FIRST, seeds),
            self.resampled_SR(arm, seeds),
            len(self.rows.labels_B),
        )


def read_task(folder: Path) -> TaskRuns:
    """Ends the script where two runs were scored on different rows."""
    arms: dict[str, dict[int, Run]] = {}
    split, first = "", None
    for path in sorted(folder.glob("*/seed-*")):
        if not is_finished(path):
            continue
        splits = read_as(dict[str, Any], path / "scores.json")["splits"]
        split = next(name for name in splits if name != "selection")
        predictions = read_predictions(path / "predictions" / f"{split}.parquet")
        first = first or predictions
        if not np.array_equal(predictions.ids_B2, first.ids_B2):
            sys.exit(f"{path} was scored on other rows than the runs before it")
        summary = read_as(dict[str, Any], path / "run_summary.json")
        run = Run(splits[split], summary, predictions.student_logits_BC)
        arms.setdefault(path.parent.name, {})[int(path.name.removeprefix("seed-"))] = run
    if first is None or FIRST not in arms:
        sys.exit(f"{folder} holds no finished run of {FIRST}")
    found = TaskRuns(load_task(folder.name), split, Rows(first.labels_B), arms)
    order = sorted(arms, key=lambda arm: mean(found.score(arm, seed) for seed in arms[arm]))
    return replace(found, arms={arm: arms[arm] for arm in order})


def mean(values: Iterable[float]) -> float:
    return statistics.mean(list(values))


def arm_cells(of: TaskRuns, arm: str) -> list[object]:
    """An arm's line."""
    runs = list(of.arms[arm].values())
    spent = [run.summary["train_s"] - run.summary["teacher_wait_s"] for run in runs]
    score = mean(of.score(arm, seed) for seed in of.arms[arm])
    more, interval = ("", "") if arm == FIRST else difference_cells(of, arm)
    steps = max(run.summary["steps"] for run in runs)
    seconds = f"{statistics.median(spent):.0f}"
    return [arm, len(runs), steps, f"{score:.4f}", more, interval, seconds]


def difference_cells(of: TaskRuns, arm: str) -> tuple[str, str]:
    """(what FIRST has more than an arm, the interval of that)."""
    seeds = of.common(FIRST, arm)
    if not seeds:
        return "", ""
    if len(seeds) == 2:
        return f"{mean_gap(of, arm):+.4f}", "two seeds"
    if len(seeds) == 1:
        (mine, other) = (of.arms[name][seeds[0]].logits_BC for name in (FIRST, arm))
        gap = paired_gap(of.metric, of.task.task_kind, mine, other, of.rows)
        return f"{gap.value:+.4f}", interval_text(gap.interval)
    difference = of.difference(arm)
    return f"{difference.value:+.4f}", interval_text(difference.interval)


def mean_gap(of: TaskRuns, arm: str) -> float:
    """What FIRST has more than an arm, mean over the seeds that both have."""
    return mean(of.score(FIRST, s) - of.score(arm, s) for s in of.common(FIRST, arm))


def interval_text(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def teachers(of: TaskRuns) -> list[list[object]]:
    """Lines of the teachers, and of each arm's own ensemble where arms have different ones; of the
    first seed that there is."""
    lines: list[list[object]] = []
    ensembles: dict[float, list[str]] = {}
    for arm, runs in of.arms.items():
        scores = runs[min(runs)].scores
        if len(scores["teachers"]) > 1 and scores["ensemble"] and arm != "single":
            ensembles.setdefault(scores["ensemble"][of.metric], []).append(f"`{arm}`")
    first = of.arms[FIRST][min(of.arms[FIRST])].scores["teachers"]
    each = ", ".join(f"{teacher['metrics'][of.metric]:.4f}" for teacher in first)
    lines.append(["teachers", "", "", each, "", "", ""])
    for score, arms in ensembles.items():
        lines.append([f"ensemble of {', '.join(arms)}", "", "", f"{score:.4f}", "", "", ""])
    return lines


def pooled(tasks: Sequence[TaskRuns], arm: str) -> str:
    """The sentence on FIRST less an arm over all tasks."""
    having = [of for of in tasks if arm in of.arms and of.common(FIRST, arm)]
    if not having:
        return ""
    names = ", ".join(of.task.name for of in having)
    seeds = [len(of.common(FIRST, arm)) for of in having]
    if min(seeds) >= 3:
        over = mean_difference([of.difference(arm) for of in having])
        value, interval = over.value, over.interval
        how = f"over rows and seeds, as in the sweep's report; {min(seeds)} seeds or more"
    else:
        value = mean(mean_gap(of, arm) for of in having)
        drawn_TR = [drawn_R(of, arm) for of in having]
        low, high = np.percentile(np.mean(drawn_TR, axis=0), [2.5, 97.5])
        interval = float(low), float(high)
        how = f"rows drawn anew within each task, {RESAMPLES:,} times, percentiles; the spread "
        how += "between seeds is not in it"
    return (
        f"`{FIRST}` less `{arm}`, mean over {names}, which count alike: {value:+.4f} "
        f"(95% interval {interval_text(interval)}: {how})."
    )


def drawn_R(of: TaskRuns, arm: str) -> Floats:
    """FIRST less an arm on resampled rows, mean over their seeds."""
    seeds = of.common(FIRST, arm)
    both = [of.resampled_SR(one, seeds).mean(axis=0) for one in (FIRST, arm)]
    return both[0] - both[1]


def page_of(folder: Path) -> str:
    """The tables of all tasks of a folder, and the sentences over them."""
    tasks = [read_task(path) for path in sorted(folder.iterdir()) if any(path.glob("*/seed-*"))]
    parts = []
    for of in tasks:
        lines = [arm_cells(of, arm) for arm in of.arms] + teachers(of)
        columns = [column.format(metric=of.metric) for column in COLUMNS]
        parts.append(f"{of.task.name}, {of.split}, {len(of.rows.labels_B):,} rows:")
        parts.append(table(columns, lines))
    over = [pooled(tasks, arm) for arm in WITHOUT] if len(tasks) > 1 else []
    return "\n\n".join([*parts, *filter(None, over)])


def made_up(folder: Path) -> Path:
    """Runs of three arms on two tasks, one seed, as a sweep keeps them."""
    chance = np.random.default_rng(0)
    for name, gold_B in (("sst2", chance.integers(0, 2, 60)), ("stsb", chance.uniform(0, 5, 60))):
        ids_B2 = chance.integers(0, 9**9, (60, 2))
        metric = load_task(name).metrics[0]
        for arm in ("finetune", CONTROL, FIRST):
            run = folder / name / arm / "seed-0"
            wide = 2 if name == "sst2" else 1
            logits_BC = chance.normal(size=(60, wide)).astype(np.float32)
            logits_BC[:, -1] += gold_B
            file = run / "predictions" / "validation.parquet"
            write_predictions(file, ids_B2, gold_B, logits_BC, None)
            of: dict[str, Any] = {"student": {metric: 0.5}, "teachers": [], "ensemble": None}
            if arm == FIRST:
                teacher = {"name": "t", "metrics": {metric: 0.5}}
                of |= {"teachers": [teacher] * 2, "ensemble": {metric: 0.6}}
            write_json(run / "scores.json", {"splits": {"validation": of}})
            spent = {"finished": True, "steps": 1, "train_s": 1.0, "teacher_wait_s": 0.0}
            write_json(run / "run_summary.json", spent)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="?", help="folder of TASK/ARM/seed-N")
    parser.add_argument("--page", type=Path, help="where the tables are put")
    parser.add_argument("--part", default=PART, help="the page's part for them; %(default)s")
    smoke_argument(parser)
    args = parser.parse_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as temporary:
            print(page_of(made_up(Path(temporary))))
    elif args.runs is None:
        sys.exit(parser.format_help())
    else:
        text = page_of(args.runs)
        print(text)
        if args.page is not None:
            put_into(args.page, text, args.part)


if __name__ == "__main__":
    main()
