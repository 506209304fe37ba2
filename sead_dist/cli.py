"""The command line. Heavy imports happen in the command that needs them."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from sead_dist import __version__
from sead_dist.errors import RunError, UserError


def run_recipe(name: str, words: Sequence[str]) -> None:
    """`distill` and `finetune`: the same under any launcher."""
    from sead_dist.config import load_config

    config = load_config(words)
    from sead_dist import recipes
    from sead_dist.distributed import join_world, leave_world

    world = join_world()
    recipe: Callable[..., object] = {"distill": recipes.distill, "finetune": recipes.finetune}[name]
    recipe(config, world)
    leave_world(world)


def distill(args: argparse.Namespace) -> None:
    run_recipe("distill", args.words)


def finetune(args: argparse.Namespace) -> None:
    run_recipe("finetune", args.words)


def evaluate(args: argparse.Namespace) -> None:
    from sead_dist.apply import evaluate_model

    evaluate_model(args.model, args.task, args.data, args.labels, args.split, args.json)


def predict(args: argparse.Namespace) -> None:
    from sead_dist.apply import predict_file

    output = None if args.output is None else Path(args.output)
    predict_file(args.model, Path(args.file), args.task, output, args.labels)


def store(args: argparse.Namespace) -> None:
    from sead_dist import storecli

    storecli.run(args)


def demo(args: argparse.Namespace) -> None:
    from sead_dist.demo import run_demo
    from sead_dist.distributed import join_world, leave_world

    world = join_world()
    run_demo(Path(args.output_dir), args.seed, world)
    leave_world(world)


GRACE_S = 1.0
WORDS = "YAML files or shipped names (sst2), laid over base.yaml in order, then KEY=VALUE"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="sead-dist",
        description="Distil an ensemble of teachers into one small student.",
    )
    top.add_argument("--version", action="version", version=f"sead-dist {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, help_, run in (
        ("distill", "teach a student, or go on where a killed run stopped", distill),
        ("finetune", "fine-tune teachers: OUTPUT/teacher-0, teacher-1, ...", finetune),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("words", nargs="+", metavar="CONFIG|KEY=VALUE", help=WORDS)
        command.set_defaults(run=run)

    command = commands.add_parser("evaluate", help="score a model on a task's dev split")
    command.add_argument("model", help="run folder, model folder or hub id")
    command.add_argument("--task", required=True, help="task name or YAML file")
    command.add_argument("--data", help="folder of the task's files; default: the hub")
    command.add_argument("--split", help="default: every evaluation split of the task")
    command.add_argument("--labels", help="the model's class order: a,b,c or task_order")
    command.add_argument("--json", metavar="FILE", help="also write the scores here")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("predict", help="label a file's rows")
    command.add_argument("model", help="run folder, model folder or hub id")
    command.add_argument("file", help="TSV, CSV, JSONL, Parquet or Arrow with the task's columns")
    command.add_argument("--task", help="task name or YAML file; default: the run's own")
    command.add_argument(
        "--output", help="file to write, .tsv .csv .jsonl .parquet; default: FILE's.predicted.tsv"
    )
    command.add_argument("--labels", help="the model's class order: a,b,c or task_order")
    command.set_defaults(run=predict)

    add_store(commands.add_parser("store", help="look after kept teacher predictions"))

    command = commands.add_parser("demo", help="the whole way on a built-in task, offline")
    command.add_argument("--output-dir", default="demo-run")
    command.add_argument("--seed", type=int, default=0, help="of the built-in task")
    command.set_defaults(run=demo)
    return top


def add_store(command: argparse.ArgumentParser) -> None:
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, help_ in (
        ("ls", "which predictions are kept, of which teacher, task and split, how large"),
        ("verify", "check every block; exit code 3 where one is bad"),
        ("compact", "merge small blocks"),
        ("rm", "remove by teacher, task, age or size; prints first, removes with --yes"),
    ):
        one = verbs.add_parser(verb, help=help_)
        one.add_argument("--store", help="default: SEAD_DIST_STORE or the user's cache")
        one.set_defaults(run=store)
        if verb == "verify":
            one.add_argument("--repair", action="store_true", help="move bad blocks out of use")
        if verb == "rm":
            one.add_argument("--teacher", help="name or start of the fingerprint")
            one.add_argument("--task")
            one.add_argument("--older-than", metavar="AGE", help="e.g. 12h, 30d")
            one.add_argument("--keep", metavar="SIZE", help="oldest first, down to e.g. 10GB")
            one.add_argument("--yes", action="store_true", help="remove; without it only print")


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done, 2 a person's mistake, 3 a failure during a run."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (UserError, RunError) as error:
        if is_main_process():
            print(f"sead-dist: {error}", file=sys.stderr, flush=True)
        else:
            # a launcher ends all ranks with the first: rank 0 has to say its line before
            time.sleep(GRACE_S)
        leave(2 if isinstance(error, UserError) else 3)
    except BrokenPipeError:
        leave(0)
    except OSError as error:  # a full disk, a folder that went away: no traceback helps
        print(f"sead-dist: {error}; mend it, then give the same command again", file=sys.stderr)
        leave(3)
    except KeyboardInterrupt:
        leave(130)
    except Exception:
        traceback.print_exc()
        leave(1)


def leave(code: int) -> None:
    """End at once: other threads and process groups may be in the middle of something."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
