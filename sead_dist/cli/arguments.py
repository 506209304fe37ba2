"""The arguments of each command of the command line."""

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from sead_dist.config.names import did_you_mean
from sead_dist.errors import one_line

WORDS = "YAML files or shipped names (sst2), laid over the defaults in order, then KEY=VALUE"
ROOT = "folder where submitted runs register; default: the user's state folder"


class Parser(argparse.ArgumentParser):
    """A parser that prints a mistake in one line, as every command does, and ends with exit code 2.

    Parsers of subcommands are of the same class.
    """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sead-dist: {one_line(message)}; see '{self.prog} --help'\n")

    def check_command(self, given: Sequence[str], names: Sequence[str]) -> None:
        """End with exit code 2 where the first word is none of the commands `names`."""
        asked = next((word for word in given if not word.startswith("-")), None)
        if asked is not None and asked not in names:
            hint = did_you_mean(asked, names, f"commands: {', '.join(names)}")
            self.error(f"{asked!r} is not a command; {hint}")


def unknown(rest: Sequence[str], args: argparse.Namespace) -> str:
    """The error for words that a command does not take.

    For a key that is written as an option, and an option that is written as a key, it names the
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
        help="print every key as it is resolved, count the rows, and stop",
    )


def add_keys(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", metavar="NAME", help="a key, a section, or any text")


def add_teach(command: argparse.ArgumentParser) -> None:
    add_words(command)
    command.add_argument("--worker", default="1/1", metavar="I/N", help="which of how many workers")


def positive(text: str) -> int:
    """A number from 1 to 999999, for argparse, which catches the error for any other text."""
    if re.fullmatch("[0-9]{1,6}", text) is None or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 999999; give one")
    return int(text)


def add_plan(command: argparse.ArgumentParser) -> None:
    add_words(command)
    command.add_argument("--ranks", type=int, metavar="N", help="default: as started, or 1")
    command.add_argument("--gpu-memory", metavar="SIZE", help="of each rank's GPU: 24GB, 80GiB")
    command.add_argument("--rates", metavar="FILE", help="speeds of other hardware: YAML or JSON")
    command.add_argument("--fresh", action="store_true", help="measure again what is remembered")
    command.add_argument("--json", metavar="FILE", help="also write the plan here")


def add_data(command: argparse.ArgumentParser) -> None:
    add_words(command)
    command.add_argument("--show", type=positive, default=20, metavar="N", help="rows to print")


def add_labels(command: argparse.ArgumentParser) -> None:
    add_words(command)
    what = command.add_mutually_exclusive_group(required=True)
    kinds = ".jsonl .parquet .csv .tsv"
    what.add_argument("--rows", metavar="FILE", help=f"the rows to be answered: {kinds}")
    what.add_argument("--output", metavar="FILE", help=f"what teachers say of them: {kinds}")
    what.add_argument("--errors", metavar="FILE", help=f"gold labels that look wrong: {kinds}")


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
        help="file to write, .tsv .csv .jsonl .parquet; default: FILE's.predicted.tsv; - is "
        "standard output, in the kind of the input",
    )
    command.add_argument(
        "--kind",
        choices=["tsv", "csv", "jsonl", "json", "txt"],
        help="what FILE holds, where its name does not say it; default of standard input: jsonl",
    )
    command.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="rows of a forward"
    )
    command.add_argument(
        "--skip-malformed",
        action="store_true",
        help="pass over rows that cannot be read (no text field, too few fields); they are counted "
        "and listed",
    )


def add_export(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument("--to", choices=["onnx"], default="onnx", help="the format")
    command.add_argument("--quantize", choices=["int8"], help="also a file with 8-bit weights")
    command.add_argument("--output", metavar="DIR", help="default: MODEL/onnx")
    command.add_argument("--data", help="folder of the task's files; default: the run's own")


def add_push(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", help="run directory")
    command.add_argument("--to", metavar="ID", help="owner/name; default: the run's, or the card's")
    command.add_argument(
        "--private", action="store_true", default=None, help="where the repository is made again"
    )


def add_reproduce(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", nargs="?", metavar="NAME", help="such as sst2-h256")
    command.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for distill")
    command.add_argument("--teachers", type=int, default=3, help="of each encoder; default: 3")


def add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output-dir", default="demo-run")
    command.add_argument("--seed", type=int, default=0, help="of the built-in task")


def add_submit(command: argparse.ArgumentParser) -> None:
    add_words(command)
    command.add_argument(
        "--slurm",
        metavar="NAME|FILE",
        help="settings: a file, or a shipped name (gpus, preemptible)",
    )
    for option in ("partition", "account", "qos", "constraint", "gres", "mem"):
        command.add_argument(f"--{option}", help="as sbatch's")
    command.add_argument("--time", help="limit of one start: MINUTES, H:MM:SS or DAYS-HH:MM:SS")
    command.add_argument("--nodes", type=int)
    command.add_argument(
        "--gpus-per-node", type=int, help="as many tasks; default: one, on the CPU"
    )
    command.add_argument("--cpus-per-task", type=int)
    command.add_argument("--exclusive", action="store_true", default=None, help="whole nodes")
    command.add_argument("--signal-delay", type=int, metavar="S", help="notice before the limit")
    command.add_argument("--seeds", metavar="0-4", help="an array: a job and OUTPUT/seed-N each")
    command.add_argument(
        "--concurrent", type=int, metavar="N", help="most jobs of --seeds at a time"
    )
    command.add_argument(
        "--workers", type=positive, metavar="N", help="of a sweep: an array that shares its runs"
    )
    command.add_argument(
        "--teacher-workers",
        type=positive,
        metavar="N",
        help="placement=pool, an array of N workers",
    )
    command.add_argument(
        "--teacher-slurm", metavar="NAME|FILE", help="the workers' settings; default: the student's"
    )
    command.add_argument("--restarts", type=int, help="most new starts after a rank was lost")
    command.add_argument("--dry-run", action="store_true", help="print the sbatch file only")
    command.add_argument("--wait", action="store_true", help="until done; exit code as distill's")
    command.add_argument("--root", metavar="DIR", help=ROOT)


def add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--root", metavar="DIR", help=ROOT)
    verbs = command.add_subparsers(dest="verb", metavar="VERB")
    for verb, help_ in (
        ("logs", "print what a run said"),
        ("cancel", "end a run's job"),
        ("wait", "until a run is done; exit code as distill's"),
    ):
        one = verbs.add_parser(verb, help=help_)
        one.add_argument("name", metavar="RUN", help="name, job number or run directory")
        one.add_argument("--root", metavar="DIR", default=argparse.SUPPRESS, help=ROOT)
        if verb == "logs":
            one.add_argument("-f", "--follow", action="store_true", help="until the job ends")
            one.add_argument("--rank", type=int, default=0)


def add_store(command: argparse.ArgumentParser) -> None:
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, help_ in (
        ("ls", "which predictions are kept, of which teacher, task and split, how large"),
        ("verify", "check every block; exit code 3 where one is bad"),
        ("compact", "merge small blocks"),
        ("rm", "remove by teacher, task, age or size; prints first, removes with --yes"),
        ("export", "copy predictions into a folder, to be read elsewhere: no texts, no paths"),
        ("import", "copy the predictions of an exported folder into the store"),
    ):
        one = verbs.add_parser(verb, help=help_)
        one.add_argument("--store", help="default: SEAD_DIST_STORE or the user's cache")
        if verb == "verify":
            one.add_argument("--repair", action="store_true", help="move bad blocks out of use")
        if verb in ("export", "import"):
            one.add_argument("folder", metavar="DIR", help="the exported folder")
        if verb in ("rm", "export"):
            one.add_argument("--teacher", help="name or start of the fingerprint")
            one.add_argument("--task")
        if verb == "rm":
            one.add_argument("--older-than", metavar="AGE", help="e.g. 12h, 30d")
            one.add_argument("--keep", metavar="SIZE", help="oldest first, down to e.g. 10GB")
            one.add_argument("--yes", action="store_true", help="remove; without it only print")
