"""A student's epoch on a GPU over an empty store: one stream against two.

The training loop of the package, teachers computing as it goes, with their forwards in a stream of
their own, as they are, and in the student's.
"""

import statistics
import tempfile
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from gpu import wait
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


def epoch_seconds(words: dict[str, object], device: str, streams: int) -> float:
    """One epoch of the training loop, teachers computing."""
    with ExitStack() as stack:
        setup = build(run_config(words), alone(device), stack, StopFlag())
        assert setup.source is not None
        if streams == 1:
            setup.source.stream = None
        ended: list[float] = []

        def end_of_epoch(step: int) -> EvalResult:
            wait()
            ended.append(time.perf_counter())
            nothing = np.zeros((0, 2), np.float32)
            return EvalResult("sst2", "selection", step, 0, {"accuracy": 0.0}, 0.0, 1.0, nothing)

        trainer = replace(make_trainer(setup, prepare_teachers(setup)), select=end_of_epoch)
        wait()
        began = time.perf_counter()
        trainer.run(TrainState())
        return ended[0] - began


def two_streams(work: Path, data: Path, tokenizer: Path, args: Namespace) -> list[dict[str, float]]:
    found, batch = [], 8 if args.smoke else 64
    for turn in range(args.repeat + 1):
        taken = {}
        for streams in (1, 2) if turn % 2 else (2, 1):
            folder = Path(tempfile.mkdtemp(dir=work))
            words: dict[str, object] = {
                "data.path": data,
                "student.shape": shape_file(work / f"{args.student}.yaml", args.student),
                "student.tokenizer": tokenizer,
                "teachers": [random_classifier(work / args.teacher, args.teacher, tokenizer, 1)],
                "teacher_precision": "bf16",
                "precision": "bf16",
                "num_train_epochs": 1,
                "micro_batch_size": batch,
                "global_batch_size": batch,
                "teacher_validation": "off",
                "save_steps": 0,
                "store": folder / "store",
                "output_dir": folder / "run",
            }
            taken[str(streams)] = epoch_seconds(words, args.device, streams)
        if turn > 0:  # the first wakes up kernels and memory
            found.append(taken)
    return found


def main() -> None:
    parser = common_arguments(__doc__, rows=4096, repeat=5)
    device_argument(parser)
    parser.add_argument("--student", default="L6-H384")
    parser.add_argument("--teacher", default="L12-H768")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.student, args.teacher = 60, 1, "L1-H32", "L1-H32"
    set_threads(args.threads, args.device)
    with laid_out(args) as (work, data, tokenizer):
        turns = two_streams(work, data, tokenizer, args)
    medians = [statistics.median(turn[key] for turn in turns) for key in ("1", "2")]
    ratios = [turn["1"] / turn["2"] for turn in turns]
    row = [f"{args.student} of {args.teacher}", *medians, spread(ratios)]
    text = f"{args.rows} rows of SST-2, bf16, batches of 64, {args.repeat} turns.\n\n" + table(
        ["student", "one stream, s", "two streams, s", "one / two"], [row]
    )
    write_result("gpu_streams", "Teachers in a stream of their own", text, turns, args)


if __name__ == "__main__":
    main()
