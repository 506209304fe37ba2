"""The arguments of each command of the command line."""

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from sead_dist.config.names import did_you_mean
from sead_dist.errors import one_line

WORDS = (
    "shipped names (sst2) or YAML files, then KEY=VALUE; each overrides the defaults and those "
    "before it"
)
ROOT = "folder that lists submitted runs; default: sead_dist/jobs in the user's state folder"


class Parser(argparse.ArgumentParser):
    """A parser that prints a mistake in one line, as every command does, and ends with exit code 2.

    Parsers of subcommands are of the same class.
    """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sead-dist: {one_line(message)}; see '{self.prog} --help'\n")

    def check_command(self, given: Sequence[str], names: Sequence[str]) -> None:
        """End with exit code 2 where the first word is none of the commands `names`."""
        first = next((word for word in given if not word.startswith("-")), None)
        if first is not None and first not in names:
            hint = did_you_mean(first, names, f"commands: {', '.join(names)}")
            self.error(f"{first!r} is not a command; {hint}")


def unknown(rest: Sequence[str], args: argparse.Namespace) -> str:
    """The error for words that a command does not accept.

    For a key that is written as an option, and an option that is written as a key, it gives the
    right form.
    """
    from sead_dist.config.keys import all_keys  # it needs pydantic

    line = f"unrecognized arguments: {' '.join(rest)}"
    word = next((word for word in rest if word.startswith("-")), rest[0])
    name, equals, value = word.lstrip("-").partition("=")
    if not equals:
        value = next(iter(rest[rest.index(word) + 1 :]), "VALUE")
    if hasattr(args, "words") and name.replace("-", "_") in {key.name for key in all_keys()}:
        return f"{line}; keys have no dashes: {name.replace('-', '_')}={value}"
    option = name.partition(".")[0]
    if equals and re.search(rf"--{re.escape(option)} [A-Z]", args.parser.format_usage()):
        return f"{line}; write --{option} {value}"
    return line


def add_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="+", metavar="CONFIG|KEY=VALUE", help=WORDS)


def add_recipe(command: argparse.ArgumentParser) -> None:
    add_words(command)
    command.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved value of every key and the number of rows; train nothing",
    )


def add_keys(command: argparse.ArgumentParser) -> None:
    help_ = "a key, a section, or any text to search for"
    command.add_argument("name", nargs="?", metavar="NAME", help=help_)


def add_teach(command: argparse.ArgumentParser) -> None:
    add_words(command)
    help_ = "this is worker I of N workers, which share the work; default: 1/1"
    command.add_argument("--worker", default="1/1", metavar="I/N", help=help_)


def positive(text: str) -> int:
    """A number from 1 to 999999, for argparse, which catches the error for any other text."""
    if re.fullmatch("[0-9]{1,6}", text) is None or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 999999; give one")
    return int(text)


def add_plan(command: argparse.ArgumentParser) -> None:
    add_words(command)
    help_ = "number of ranks; default: those of the launcher, else 1"
    command.add_argument("--ranks", type=int, metavar="N", help=help_)
    help_ = "memory of each rank's GPU, such as 24GB or 80GiB"
    command.add_argument("--gpu-memory", metavar="SIZE", help=help_)
    help_ = "YAML or JSON file with the speeds of other hardware"
    command.add_argument("--rates", metavar="FILE", help=help_)
    help_ = "measure all speeds again, and use none that were kept"
    command.add_argument("--fresh", action="store_true", help=help_)
    command.add_argument("--json", metavar="FILE", help="also write the plan here")


def add_data(command: argparse.ArgumentParser) -> None:
    add_words(command)
    command.add_argument("--show", type=positive, default=20, metavar="N", help="rows to print")


def add_labels(command: argparse.ArgumentParser) -> None:
    add_words(command)
    what = command.add_mutually_exclusive_group(required=True)
    kinds = ".jsonl .parquet .csv .tsv"
    what.add_argument("--rows", metavar="FILE", help=f"write the run's rows here: {kinds}")
    help_ = f"write the teachers' predictions for these rows here: {kinds}"
    what.add_argument("--output", metavar="FILE", help=help_)
    help_ = f"write the gold labels that look wrong here: {kinds}"
    what.add_argument("--errors", metavar="FILE", help=help_)


def add_evaluate(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument("--data", help="folder of the task's files; default: the run's own")
    command.add_argument("--split", help="default: every evaluation split of the task")
    command.add_argument("--json", metavar="FILE", help="also write the scores here")


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="run directory, model folder or hub id")
    command.add_argument("--task", help="task name or YAML file; default: the run's own")
    command.add_argument("--labels", help="the model's class order: a,b,c or task_order")


def add_predict(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "file",
        help="TSV, CSV, JSONL, Parquet or Arrow with the task's columns, or .txt with a text on "
        "each line; - is standard input",
    )
    command.add_argument(
        "--output",
        help="file to write, .tsv .csv .jsonl .parquet; default: NAME.predicted.tsv for NAME.tsv; "
        "- is standard output, in the format of the input",
    )
    command.add_argument(
        "--kind",
        choices=["tsv", "csv", "jsonl", "json", "txt"],
        help="format of FILE, where its name does not give it; default for standard input: jsonl",
    )
    command.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="rows of one forward pass"
    )
    command.add_argument(
        "--skip-malformed",
        action="store_true",
        help="skip rows that cannot be read (no text field, too few fields), and print their "
        "number and their places",
    )


def add_export(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument("--to", choices=["onnx"], default="onnx", help="the format")
    command.add_argument("--quantize", choices=["int8"], help="write a file with 8-bit weights too")
    command.add_argument("--output", metavar="DIR", help="default: MODEL/onnx")
    command.add_argument("--data", help="folder of the task's files; default: the run's own")


def add_push(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", help="run directory")
    command.add_argument("--to", metavar="ID", help="owner/name; default: the run's, or the card's")
    command.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )


def add_reproduce(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", nargs="?", metavar="NAME", help="such as sst2-h256")
    command.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides, as for distill")
    help_ = "number of teachers from each encoder; default: 3"
    command.add_argument("--teachers", type=int, default=3, metavar="N", help=help_)


def add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output-dir", default="demo-run", help="default: demo-run")
    help_ = "seed of the built-in task; default: 0"
    command.add_argument("--seed", type=int, default=0, help=help_)


def add_submit(command: argparse.ArgumentParser) -> None:
    add_words(command)
    command.add_argument(
        "--slurm",
        metavar="NAME|FILE",
        help="settings of the job: a YAML file, or a shipped name (gpus, preemptible)",
    )
    for option in ("partition", "account", "qos", "constraint", "gres", "mem"):
        command.add_argument(f"--{option}", help="as sbatch's")
    help_ = "time limit of each start: MINUTES, H:MM:SS or DAYS-HH:MM:SS"
    command.add_argument("--time", help=help_)
    command.add_argument("--nodes", type=int, help="as sbatch's")
    help_ = "GPUs of a node, with one task each; default: one task per node, on the CPU"
    command.add_argument("--gpus-per-node", type=int, help=help_)
    command.add_argument("--cpus-per-task", type=int, help="as sbatch's")
    command.add_argument("--exclusive", action="store_true", default=None, help="as sbatch's")
    help_ = "seconds of notice before the time limit"
    command.add_argument("--signal-delay", type=int, metavar="S", help=help_)
    help_ = "seeds, such as 0-4: an array with a job for each, in OUTPUT/seed-N"
    command.add_argument("--seeds", metavar="SEEDS", help=help_)
    help_ = "largest number of jobs of --seeds that run at a time"
    command.add_argument("--concurrent", type=int, metavar="N", help=help_)
    help_ = "number of a sweep's workers: an array of jobs that share its runs"
    command.add_argument("--workers", type=positive, metavar="N", help=help_)
    command.add_argument(
        "--teacher-workers",
        type=positive,
        metavar="N",
        help="set placement=pool, and submit an array of N pool workers too",
    )
    help_ = "settings of the pool workers; default: those of the student's job"
    command.add_argument("--teacher-slurm", metavar="NAME|FILE", help=help_)
    help_ = "largest number of new starts after a rank was lost"
    command.add_argument("--restarts", type=int, metavar="N", help=help_)
    help_ = "print the sbatch file, and submit nothing"
    command.add_argument("--dry-run", action="store_true", help=help_)
    help_ = "wait until the jobs have ended; the exit code is that of distill"
    command.add_argument("--wait", action="store_true", help=help_)
    command.add_argument("--root", metavar="DIR", help=ROOT)


def add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--root", metavar="DIR", help=ROOT)
    verbs = command.add_subparsers(dest="verb", metavar="VERB")
    for verb, help_ in (
        ("logs", "print a run's log"),
        ("cancel", "cancel a run's job"),
        ("wait", "wait until a run's job has ended; the exit code is that of distill"),
    ):
        one = verbs.add_parser(verb, help=help_)
        one.add_argument("name", metavar="RUN", help="name, job number or run directory")
        one.add_argument("--root", metavar="DIR", default=argparse.SUPPRESS, help=ROOT)
        if verb == "logs":
            follow = "print new lines until the job ends"
            one.add_argument("-f", "--follow", action="store_true", help=follow)
            rank = "the rank whose log is printed; default: 0"
            one.add_argument("--rank", type=int, default=0, metavar="N", help=rank)


def add_store(command: argparse.ArgumentParser) -> None:
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, help_ in (
        ("ls", "list the kept predictions by teacher, task and split, with their size"),
        ("verify", "check every block; exit code 3 where one is bad"),
        ("compact", "merge small blocks"),
        ("rm", "list predictions by teacher, task, age or size; --yes removes them"),
        ("export", "copy predictions into a folder for another store, without texts and paths"),
        ("import", "copy the predictions of an exported folder into the store"),
    ):
        one = verbs.add_parser(verb, help=help_)
        folder = "folder of the store; default: SEAD_DIST_STORE, else the user's cache"
        one.add_argument("--store", metavar="DIR", help=folder)
        if verb == "verify":
            repair = "move bad blocks to quarantine/"
            one.add_argument("--repair", action="store_true", help=repair)
        if verb in ("export", "import"):
            one.add_argument("folder", metavar="DIR", help="the exported folder")
        if verb in ("rm", "export"):
            teacher = "a teacher's name, or the first digits (6 or more) of its fingerprint"
            one.add_argument("--teacher", metavar="NAME", help=teacher)
            one.add_argument("--task", metavar="NAME", help="a task's name")
        if verb == "rm":
            age = "blocks older than this, e.g. 12h or 30d"
            one.add_argument("--older-than", metavar="AGE", help=age)
            size = "the oldest blocks, until the store is as small as this, e.g. 10GB"
            one.add_argument("--keep", metavar="SIZE", help=size)
            one.add_argument("--yes", action="store_true", help="remove; without it only print")
