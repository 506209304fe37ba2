"""The student's step with teachers read from the store, against the same step with no teacher.

All runs are the package's own training loop. `alone` has the hard loss alone, `taught` the teachers
besides, over the same rows in the same order. `text` and `copies` are `taught` with half of the
labelled rows: the others are text without labels, or copies of the first half are there instead.
Every repetition builds all runs again over a store that was filled before, and trains as many steps
of each as one epoch of the rows has, so reading the blocks from disk is counted. Building, scoring
and saving are not. Target: `taught` at most 3% more than `alone`; `text` and `copies` at most 3%
more than `taught`. A copy that leaves out words is shorter than its row.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from inputs import alone, laid_out, random_classifier, run_config, shape_file
from result_file import (
    common_arguments,
    device_argument,
    set_threads,
    spread,
    table,
    write_result,
)

from sead_dist.runs.distillation import make_trainer
from sead_dist.runs.prepared_teachers import prepare_teachers
from sead_dist.runs.setup import build
from sead_dist.runtime.distributed import StopFlag
from sead_dist.training.checkpoint import TrainState
from sead_dist.training.evaluation import EvalResult

TARGET = 1.03
# by column, the run and the one that it is held against
RATIOS = {
    "taught / alone": ("taught", "alone"),
    "text / taught": ("text", "taught"),
    "copies / taught": ("copies", "taught"),
}


def step_seconds(words: dict[str, object], device: str) -> float:
    """Seconds of a step, over all steps of the training loop."""
    with ExitStack() as stack:
        setup = build(run_config(words), alone(device), stack, StopFlag())
        ended: list[float] = []

        def end_of_run(step: int) -> EvalResult:
            ended.append(time.perf_counter())
            nothing = np.zeros((0, 2), np.float32)
            return EvalResult("sst2", "selection", step, 0, {"accuracy": 0.0}, 0.0, 1.0, nothing)

        trainer = replace(make_trainer(setup, prepare_teachers(setup)), select=end_of_run)
        began = time.perf_counter()
        trainer.run(TrainState())
        return (ended[-1] - began) / setup.batches.total_steps


def main() -> None:
    parser = common_arguments(__doc__, rows=2000, repeat=7)
    parser.add_argument("--students", nargs="+", default=["L6-H256", "L2-H128"])
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--precision", default="fp32")
    device_argument(parser)
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.students = 100, 2, ["L2-H128"]
    set_threads(args.threads, args.device)
    with laid_out(args) as (work, data, tokenizer):
        teachers = [
            random_classifier(work / f"teacher-{n}", "L2-H128", tokenizer, n)
            for n in range(args.teachers)
        ]
        raw: dict[str, list[dict[str, float]]] = {}
        for shape in args.students:
            common: dict[str, object] = {
                "data.path": data,
                "student.shape": shape_file(work / f"{shape}.yaml", shape),
                "student.tokenizer": tokenizer,
                "max_steps": args.rows // args.micro_batch,
                "micro_batch_size": args.micro_batch,
                "global_batch_size": args.micro_batch,
                "precision": args.precision,
                "teacher_validation": "off",
                "save_steps": 0,
            }
            taught = {
                **common,
                **{"teachers": teachers, "store": work / "store"},
                **{"unlabeled.rest": False, "augment.copies": None},
            }
            half = {**taught, "data.max_train_examples": args.rows // 2}
            runs = {
                "alone": common,
                "taught": taught,
                "text": {**half, "unlabeled.rest": True},
                "copies": {**half, "augment.copies": 1},
            }
            raw[shape] = []
            # the first turn fills the store and is not counted
            for turn in range(args.repeat + 1):
                seconds: dict[str, float] = {}
                for name in runs if turn % 2 else reversed(runs):
                    output = Path(tempfile.mkdtemp(dir=work)) / name
                    seconds[name] = step_seconds({**runs[name], "output_dir": output}, args.device)
                if turn > 0:
                    raw[shape].append(seconds)
    rows = []
    for shape, turns in raw.items():
        milliseconds = [1000 * statistics.median(turn[name] for turn in turns) for name in runs]
        ratios = [[turn[a] / turn[b] for turn in turns] for a, b in RATIOS.values()]
        reached = all(statistics.median(of) <= TARGET for of in ratios)
        rows.append([shape, *milliseconds, *map(spread, ratios), "yes" if reached else "no"])
    text = "\n\n".join(
        [
            f"{__doc__.partition(chr(10))[0]} {args.teachers} teachers, {args.rows} rows of SST-2, "
            f"batches of {args.micro_batch} in {args.precision}, {args.repeat} interleaved "
            "repetitions; median (least-most).",
            table(
                ["student", *(f"{name}, ms" for name in runs), *RATIOS, f"<= {TARGET}"],
                rows,
            ),
        ]
    )
    write_result("student_step", "The student's step with and without teachers", text, raw, args)


if __name__ == "__main__":
    main()
