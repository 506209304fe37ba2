"""The methods of a finished sweep against one of them, by the sweep's own test. It shows what each
element of a method is worth.

    python benchmarks/ablation.py REFERENCE CONFIG|KEY=VALUE ...
    python benchmarks/ablation.py --smoke       # makes a sweep of a few steps and compares in it

The words are those of the sweep's command. For each method of the sweep it prints the method's mean
minus that of REFERENCE on every task and on all tasks together (tasks have equal weights), with the
95% interval and p.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from inputs import alone, shape_file, small_folder
from result_file import smoke_argument, table

from sead_dist.cli.exits import attempt
from sead_dist.data.significance import Difference, mean_difference, units_of
from sead_dist.errors import UserError
from sead_dist.sweep.checks import prepare_grid
from sead_dist.sweep.grid import make_grid
from sead_dist.sweep.results import read_runs, versus
from sead_dist.sweep.run import run_sweep


def difference_cells(of: Difference) -> list[object]:
    low, high = of.interval
    return [f"{of.value:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{of.p:.3f}"]


def small_sweep(work: Path) -> list[str]:
    """What was given of a finished sweep of two methods and three seeds on the built-in task."""
    task = small_folder(work / "grammar", 60)
    shape = shape_file(work / "shape.yaml", "L1-H32")
    words = [
        f"tasks=[{task / 'task.yaml'}]",
        f"data.path={work}/{{task}}",
        "methods=[finetune,mean]",
        "seeds=3",
        f"encoders=[{shape},{shape}]",
        f"student={shape}",
        f"student.tokenizer={task / 'tokenizer'}",
        "num_train_epochs=1",
        "teacher_validation=off",
        f"output_dir={work / 'sweep'}",
    ]
    run_sweep(words, alone())
    return words


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", nargs="?", metavar="REFERENCE", help="a method of the sweep")
    parser.add_argument("words", nargs="*", metavar="CONFIG|KEY=VALUE", help="of the sweep")
    smoke_argument(parser)
    args = parser.parse_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as temporary:
            print(compare("finetune", small_sweep(Path(temporary))))
    elif args.words:
        print(compare(args.reference, args.words))
    else:
        sys.exit(parser.format_help())


def compare(reference: str, words: list[str]) -> str:
    """The table of every method minus the reference."""
    unchecked = make_grid(words)
    grid, read = prepare_grid(unchecked, filter(unchecked.students, unchecked.tasks))
    if reference not in grid.methods:
        raise UserError(
            f"REFERENCE {reference} is not a method of this sweep; give one of "
            f"{', '.join(grid.methods)}"
        )
    rows: list[list[object]] = []
    found: dict[str, list[Difference]] = {}
    for task, data in read.items():
        runs = {method: read_runs(grid, data, method) for method in grid.methods}
        units = int(units_of(data.dev).max()) + 1
        for method in grid.methods:
            difference = versus(runs[method], runs[reference], units)
            if method != reference and difference is not None:
                found.setdefault(method, []).append(difference)
                rows.append([method, task, len(runs[method].scores), *difference_cells(difference)])
    for method, over in found.items():
        rows.append([method, f"mean of {len(over)}", "", *difference_cells(mean_difference(over))])
    columns = ["method", "task", "seeds", f"minus {reference}", "95% interval", "p"]
    return table(columns, sorted(rows, key=lambda row: grid.methods.index(str(row[0]))))


if __name__ == "__main__":
    sys.exit(attempt(main))
