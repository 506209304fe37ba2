"""The demo over ten seeds of the built-in task: is there something real to gain from teachers?

    python benchmarks/demo_seeds.py --work DIR [--seeds 10]

Runs `sead-dist demo` as `make demo` does, once per seed, and writes docs/results/demo.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from sead_dist.demo import SEEDS, dev_scores

RESULT = Path(__file__).parent.parent / "docs" / "results" / "demo.md"


def run_seed(work: Path, seed: int) -> list[float]:
    """ensemble, mean of students alone, mean of distilled students, seconds."""
    output = work / f"seed-{seed}"
    began = time.perf_counter()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    demo = ["-m", "sead_dist", "demo", "--output-dir", str(output), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (work / f"seed-{seed}.log").open("w")
    subprocess.run([sys.executable, *command, *demo], check=True, env=environment, stdout=log)
    seconds = time.perf_counter() - began
    alone = [dev_scores(output / f"alone-{n}")["student"] for n in range(SEEDS)]
    taught = [dev_scores(output / f"distilled-{n}")["student"] for n in range(SEEDS)]
    ensemble = dev_scores(output / "distilled-0")["ensemble"]
    return [ensemble, statistics.mean(alone), statistics.mean(taught), seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(args.seeds):
        rows.append(run_seed(args.work, seed))
        print(seed, *(f"{value:.3f}" for value in rows[-1]), flush=True)
    ensemble_wins = sum(row[0] > row[1] for row in rows)
    distilled_wins = sum(row[2] > row[1] for row in rows)
    lines = [
        "# The demo over ten seeds",
        "",
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
        f"The ensemble beats the student alone in {ensemble_wins} of {len(rows)} seeds, the",
        f"distilled student beats it in {distilled_wins} of {len(rows)}.",
        "",
    ]
    RESULT.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
