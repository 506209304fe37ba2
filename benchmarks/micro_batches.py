"""How large a micro-batch should be, and whether it is cut by rows or by padded tokens.

The package's own loop, without teachers, runs on global batches of 32 random rows of three tasks.
The figures are seconds of an optimiser step. Cut by rows, every micro-batch has the same number of
rows, longest first. A run cuts by tokens. All variants are measured in turns, in one process.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from inputs import alone, laid_out, shape_file
from result_file import common_arguments, set_threads, table, write_result

from sead_dist.config.load import load_config
from sead_dist.data import order as data
from sead_dist.runs.distillation import make_trainer
from sead_dist.runs.prepared_teachers import prepare_teachers
from sead_dist.runs.setup import build
from sead_dist.runtime.distributed import StopFlag
from sead_dist.training.checkpoint import TrainState
from sead_dist.training.evaluation import EvalResult

SIZES = (32, 16, 8, 4)


def cut_by_rows(lengths_G: np.ndarray, parts: int) -> list[int]:
    return [len(part) for part in np.array_split(lengths_G, min(parts, len(lengths_G)))]


@contextmanager
def cut(how: str) -> Iterator[None]:
    """Within the block, micro-batches are cut in this way: "rows" or "tokens"."""
    if how == "tokens":
        yield
        return
    with mock.patch.object(data, "cut_by_tokens", cut_by_rows):
        yield


def measure(words: list[str]) -> tuple[float, float]:
    """(seconds of a step, padding's share of the tokens), over the steps of one run."""
    with ExitStack() as stack:
        setup = build(load_config(words), alone(), stack, StopFlag())
        ended: list[float] = []

        def end(step: int) -> EvalResult:
            ended.append(time.perf_counter())
            nothing = np.zeros((0, 2), np.float32)
            scores = {setup.task.metrics[0]: 0.0}
            return EvalResult(setup.task.name, "selection", step, 0, scores, 0.0, 1.0, nothing)

        trainer = replace(make_trainer(setup, prepare_teachers(setup)), select=end)
        began = time.perf_counter()
        state = trainer.run(TrainState())
        steps = setup.batches.total_steps
        return (ended[-1] - began) / steps, state.totals["padding"] / state.totals["tokens"]


def main() -> None:
    parser = common_arguments(__doc__, rows=1000, repeat=5)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb", "mrpc"])
    parser.add_argument("--student", default="L6-H256")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    sizes = SIZES
    if args.smoke:
        sizes, args.rows, args.tasks = (32, 8), 100, ["sst2"]
        args.student, args.repeat = "L1-H32", 1
    set_threads(args.threads)
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    with laid_out(args) as (work, small, tokenizer):
        folders = {"sst2": small}
        if not args.smoke:
            folders = {task: Path(os.environ["SEAD_DIST_DATA"]) / task for task in args.tasks}
        shape = shape_file(work / "student.yaml", args.student)
        for _ in range(args.repeat):
            for task in args.tasks:
                for size in sizes:
                    for how in ("rows", "tokens") if size < 32 else ("tokens",):
                        with tempfile.TemporaryDirectory(dir=work) as run, cut(how):
                            words = [
                                task, f"data.path={folders[task]}", "method=finetune",
                                f"data.max_train_examples={args.rows}", f"student.shape={shape}",
                                f"student.tokenizer={tokenizer}", f"micro_batch_size={size}",
                                f"precision={args.precision}", "num_train_epochs=1",
                                "max_length=128", "save_steps=0", f"output_dir={run}/run",
                            ]  # fmt: skip
                            found.setdefault((task, how, size), []).append(measure(words))
    lines = []
    for (task, how, size), seen in found.items():
        step_s = statistics.median(seconds for seconds, _ in seen)
        whole = statistics.median(seconds for seconds, _ in found[task, "tokens", 32])
        times = f"{min(s for s, _ in seen):.3f}-{max(s for s, _ in seen):.3f}"
        lines.append([task, size, how, step_s, times, seen[0][1], step_s / whole])
    lines.sort(key=lambda line: (args.tasks.index(line[0]), -line[1], line[2]))
    columns = [
        "task",
        "micro_batch_size",
        "cut by",
        "s/step",
        "range",
        "padding",
        "of one micro-batch",
    ]
    raw = [[*key, seen] for key, seen in found.items()]
    title = "Micro-batches: their size, and how a global batch is cut"
    write_result("micro_batches", title, table(columns, lines), raw, args)


if __name__ == "__main__":
    main()
