"""A `sead-dist distill` of few rows as a whole process, against what it cannot do without.

The floor is a process that imports torch, transformers, accelerate and datasets, and loads three
models with their tokenisers. Each turn starts a process of every kind. Processor seconds are what
the process itself used, with its end: other processes of the machine slow them down less than
seconds of the clock. Targets: a run at most 1.4 times the floor, and the command of a finished run,
given again, at most 2 seconds of the clock. Writes docs/results/whole_process.md.

Two runs are measured. The first has the built-in task's 40 validation rows, so that teachers and
training take about half a second. The second has all 872 validation rows of SST-2, for which most
of what it takes beyond the floor is the models' arithmetic.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from inputs import laid_out, random_classifier, shape_file, small_folder
from result_file import common_arguments, set_threads, spread, table, write_result

PAGES = Path(__file__).parents[1] / "docs" / "results"
TARGET, TARGET_S = 1.4, 2.0
RUNS = {
    "few": "distill, 40 validation rows of the built-in task",
    "distill": "distill, 872 validation rows of SST-2",
}
FLOOR = """
import sys
import torch, transformers, accelerate, datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer
for folder in sys.argv[1:]:
    AutoTokenizer.from_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(folder)
"""


def measure(*words: object) -> dict[str, float]:
    """Processor seconds and seconds of the clock of a Python process. Raises CalledProcessError
    where it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": used, "clock": seconds}


def one_turn(
    models: Sequence[Path], words: Sequence[str], data: dict[str, Path], output: Path
) -> dict[str, dict[str, float]]:
    measured = {"floor": measure("-c", FLOOR, *models)}
    for kind, folder in data.items():
        run = [f"data.path={folder}", f"output_dir={output}-{kind}", f"store={output}-{kind}-store"]
        distill = ["-m", "sead_dist", "distill", *words, *run]
        measured[kind] = measure(*distill)
    return {**measured, "again": measure(*distill)}


def report(turns: Sequence[dict[str, dict[str, float]]], args: argparse.Namespace) -> str:
    ratios = {kind: [turn[kind]["cpu"] / turn["floor"]["cpu"] for turn in turns] for kind in RUNS}
    again_s = statistics.median(turn["again"]["clock"] for turn in turns)
    rows = [
        [name, *(spread([turn[kind][unit] for turn in turns]) for unit in ("cpu", "clock"))]
        for kind, name in (
            ("floor", "imports and three models"),
            *RUNS.items(),
            ("again", "the last command again"),
        )
    ]
    reached = [
        f"{RUNS[kind]} / floor, processor seconds: {spread(of_kind)}; at most {TARGET}: "
        f"{_said(statistics.median(of_kind) <= TARGET)}."
        for kind, of_kind in ratios.items()
    ]
    return "\n\n".join(
        [
            f"`sead-dist distill` of {args.rows} training rows with two teachers and a student "
            "L2-H128 of random weights, one epoch, as a whole process. The floor imports torch, "
            "transformers, accelerate and datasets, and loads three such models with their "
            f"tokenisers. {args.repeat} interleaved repetitions; median (least-most).",
            table(["process", "processor, s", "clock, s"], rows),
            *reached,
            f"The last command again: {again_s:.3f} s; at most {TARGET_S}: "
            f"{_said(again_s <= TARGET_S)}.",
            "Processor seconds are those of the process and its end. The first repetition reads "
            "the packages from the disk and is not counted: a first command takes longer. The "
            "figures do not hold for larger models, nor for runs of several processes.",
        ]
    )


def _said(reached: bool) -> str:
    return "yes" if reached else "no"


def main() -> None:
    parser = common_arguments(__doc__, rows=200, repeat=7)
    parser.set_defaults(results=PAGES)
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat = 40, 1
    set_threads(args.threads)
    with laid_out(args) as (work, data, tokenizer):
        os.environ["SEAD_DIST_RATES"] = str(work / "rates.json")
        os.environ["SEAD_DIST_HASHES"] = str(work / "hashes")
        teachers = [
            random_classifier(work / f"model-{n}", "L2-H128", tokenizer, n) for n in range(2)
        ]
        words = [
            "sst2",
            f"teachers=[{teachers[0]},{teachers[1]}]",
            f"student.shape={shape_file(work / 'student.yaml', 'L2-H128')}",
            "num_train_epochs=1",
            "teacher_validation=off",
        ]
        models = [*teachers, teachers[0]]
        folders = {"few": small_folder(work / "few", args.rows), "distill": data}
        turns = [
            one_turn(models, words, folders, work / f"run-{turn}")
            for turn in range(args.repeat + 1)
        ]
    # the first turn reads the packages from the disk, and is not counted
    text = report(turns[1:], args)
    title = "A small distillation as a whole process"
    write_result("whole_process", title, text, turns[1:], args, dated=False)


if __name__ == "__main__":
    main()
