"""The demo over ten seeds of the built-in task: how much the student gains from its teachers.

    python benchmarks/demo_seeds.py --work DIR [--seeds 10]

Runs `sead-dist demo` as `make demo` does, once per seed, and writes docs/results/demo.md.
`--smoke` runs one seed of a few steps in its own process, and writes nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inputs import alone
from result_file import smoke_argument, write_page

from sead_dist.cli import demo

RESULT = Path(__file__).parent.parent / "docs" / "results" / "demo.md"


def run_seed(work: Path, seed: int) -> list[float]:
    """ensemble, mean of students alone, mean of distilled students, seconds."""
    output = work / f"seed-{seed}"
    began = time.perf_counter()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "sead_dist", "demo", "--output-dir", str(output), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (work / f"seed-{seed}.log").open("w")
    subprocess.run([sys.executable, *command, *words], check=True, env=environment, stdout=log)
    return [*scores_of(output), time.perf_counter() - began]


def scores_of(output: Path) -> list[float]:
    """ensemble, mean of students alone, mean of distilled students."""
    without, taught = (
        [demo.dev_scores(output / f"{way}-{n}")["student"] for n in range(demo.SEEDS)]
        for way in ("alone", "distilled")
    )
    ensemble = demo.dev_scores(output / "distilled-0")["ensemble"]
    return [ensemble, statistics.mean(without), statistics.mean(taught)]


def run_short(work: Path, seed: int) -> list[float]:
    """The same of two steps a run and fewer of them."""
    began = time.perf_counter()
    lengths = ("max_steps=", "eval_steps=")
    for name in ("TEACHER_WORDS", "STUDENT_WORDS"):
        kept = [word for word in getattr(demo, name) if not word.startswith(lengths)]
        setattr(demo, name, (*kept, "max_steps=2", "eval_steps=2"))
    demo.SOFT_WORDS += ("teacher_validation=off",)  # its teachers have learned nothing
    demo.SEEDS = 2
    demo.run_demo(work, seed, alone())
    return [*scores_of(work), time.perf_counter() - began]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary")
    parser.add_argument("--seeds", type=int, default=10)
    smoke_argument(parser)
    args = parser.parse_args()
    run = run_short if args.smoke else run_seed
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for seed in range(1 if args.smoke else args.seeds):
            rows.append(run(work, seed))
            print(seed, *(f"{value:.3f}" for value in rows[-1]), flush=True)
    text = page(rows)
    if args.smoke:
        print(text)
    else:
        write_page(RESULT, "The demo over ten seeds", text)


def page(rows: list[list[float]]) -> str:
    ensemble_wins = sum(row[0] > row[1] for row in rows)
    distilled_wins = sum(row[2] > row[1] for row in rows)
    lines = [
        "Dev accuracy on the built-in task; students are means of three seeds each. Each line is",
        "one `sead-dist demo --seed N` in two processes of one thread, as `make demo` runs it.",
        "Command: `python benchmarks/demo_seeds.py --work DIR`.",
        "",
        "| seed | ensemble | student alone | distilled student | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {seed} | {row[0]:.3f} | {row[1]:.3f} | {row[2]:.3f} | {row[3]:.0f} |"
            for seed, row in enumerate(rows)
        ),
        "| mean | "
        + " | ".join(f"{statistics.mean(row[i] for row in rows):.3f}" for i in range(3))
        + f" | {statistics.mean(row[3] for row in rows):.0f} |",
        "",
        f"The ensemble is better than the student alone in {ensemble_wins} of {len(rows)} seeds.",
        f"The distilled student is better than it in {distilled_wins} of {len(rows)}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
