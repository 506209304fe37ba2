"""A finished sweep's methods against one of them, by the paired bootstrap: what each element of a
method is worth.

    python benchmarks/ablation.py REFERENCE WORDS OF THE SWEEP...

prints, for each method of the sweep, its mean minus that of REFERENCE on every task and on all
tasks together (tasks count alike and are resampled each for itself), with the 95% interval and p.
"""

import sys

import numpy as np
from outcome_file import table

from sead_dist.bootstrap import Difference, summarise
from sead_dist.sweep import read_task
from sead_dist.sweepplan import make_plan
from sead_dist.sweepscores import read_runs, versus


def told(of: Difference) -> list[object]:
    low, high = of.interval
    return [f"{of.value:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{of.p:.3f}"]


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit((__doc__ or "").strip())
    reference, plan = sys.argv[1], make_plan(sys.argv[2:])
    rows: list[list[object]] = []
    found: dict[str, list[Difference]] = {}
    for task in plan.tasks:
        data = read_task(plan, task)
        runs = {method: read_runs(plan, data, method) for method in plan.methods}
        for method in plan.methods:
            difference = versus(runs[method], runs[reference], data.draws)
            if method != reference and difference is not None:
                found.setdefault(method, []).append(difference)
                rows.append([method, task, len(runs[method].scores), *told(difference)])
    for method, over in found.items():
        mean_R = np.mean([of.resampled_R for of in over], axis=0)
        together = summarise(float(np.mean([of.value for of in over])), mean_R)
        rows.append([method, f"mean of {len(over)}", "", *told(together)])
    columns = ["method", "task", "seeds", f"minus {reference}", "95% interval", "p"]
    print(table(columns, sorted(rows, key=lambda row: plan.methods.index(str(row[0])))))


if __name__ == "__main__":
    main()
