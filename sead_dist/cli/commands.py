"""The command line. Heavy imports happen in the command that needs them."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sead_dist import __version__
from sead_dist.cli import arguments
from sead_dist.cli.exits import attempt, leave
from sead_dist.errors import UserError

if TYPE_CHECKING:
    from sead_dist.planning.table import Plan
    from sead_dist.slurm.jobs import Job
    from sead_dist.slurm.settings import SlurmSettings


@contextmanager
def importing() -> Iterator[None]:
    """Within the block, which holds heavy imports, the garbage collector is off.

    It would visit a million new objects many times, which takes a fifth of the imports' time. Later
    collections skip these objects too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_recipe(name: str, words: Sequence[str]) -> None:
    """Run `distill`, `finetune` or `teach I/N` (a worker of the pool), under any launcher."""
    from sead_dist.config.load import load_config

    config = load_config(words)
    if name == "distill":
        # this comes before the import of torch, which takes longer
        from sead_dist.runs.checks import nothing_to_do, reject_untaught

        done = None if "WORLD_SIZE" in os.environ else nothing_to_do(config)
        if done is not None:
            print(done, flush=True)
            return
        if not config.encoders:
            reject_untaught(config)
    with importing():
        from sead_dist.runs import distillation as recipes
        from sead_dist.runs.pool_worker import teach as fill_store
        from sead_dist.runtime.distributed import in_world
        from sead_dist.runtime.surroundings import quiet_libraries

    recipe, _, worker = name.partition(" ")
    with in_world(config.heartbeat, (*name.split(), *words)) as world:
        quiet_libraries(world)
        if recipe == "teach":
            fill_store(config, worker, world)
        elif recipe == "finetune":
            recipes.finetune(config, world)
        else:
            recipes.distill(config, world)


def run_sweep(words: Sequence[str]) -> None:
    with importing():
        from sead_dist.runtime.distributed import in_world
        from sead_dist.sweep import run as sweep

    with in_world(command=("sweep", *words)) as world:
        sweep.run_sweep(words, world)


def attempt_recipe(name: str, words: Sequence[str]) -> int | None:
    """Run `distill`, `finetune`, `teach I/N` or `sweep` in a job. Returns as `attempt` does."""
    return attempt(lambda: run_sweep(words) if name == "sweep" else run_recipe(name, words))


def distill(args: argparse.Namespace) -> None:
    print_config(args.words) if args.print_config else run_recipe("distill", args.words)


def finetune(args: argparse.Namespace) -> None:
    print_config(args.words) if args.print_config else run_recipe("finetune", args.words)


def print_config(words: Sequence[str]) -> None:
    """Print the resolved configuration as YAML, then the lines of `resolve_all` as comments."""
    from sead_dist.config.load import load_config
    from sead_dist.config.yaml_text import dump_config
    from sead_dist.runtime.redact import without_secrets

    config = load_config(words)
    with importing():
        from sead_dist.runs.shown import resolve_all
        from sead_dist.runtime.distributed import in_world

    with in_world() as world:
        found, notes = resolve_all(config, world)
        if world.is_main:
            print(without_secrets(dump_config(found)), end="")
            print("".join(f"# {note}\n" for note in notes), end="")


def keys(args: argparse.Namespace) -> None:
    from sead_dist.cli.keys import print_keys

    print_keys(args.name)


def sweep(args: argparse.Namespace) -> None:
    run_sweep(args.words)


def teach(args: argparse.Namespace) -> None:
    run_recipe(f"teach {args.worker}", args.words)


def plan(args: argparse.Namespace) -> None:
    from sead_dist.config.load import load_config

    config = load_config(args.words)
    with importing():
        from sead_dist.planning.table import plan as plan_run
        from sead_dist.runtime.distributed import in_world

    rates, report = (None if path is None else Path(path) for path in (args.rates, args.json))
    with in_world(config.heartbeat) as world:
        found = plan_run(config, world, args.ranks, args.gpu_memory, rates, args.fresh, report)
    if found is not None:
        print_plan(found)


def print_plan(found: "Plan") -> None:
    from sead_dist.runtime.console import print_table

    for title, columns, rows in found.tables:
        print_table(title, columns, rows)
    for line in found.notes:
        print(line)


def data(args: argparse.Namespace) -> None:
    """Print the training rows by kind, what was left out, and some rows of each kind."""
    from sead_dist.config.load import read_layers, resolve
    from sead_dist.runs.shown import show_data
    from sead_dist.runtime.console import print_table
    from sead_dist.runtime.distributed import in_world
    from sead_dist.runtime.surroundings import quiet_libraries

    with in_world() as world:
        # nothing is written, so no output_dir need be given
        config = resolve([{"output_dir": "unnamed"}, *read_layers(args.words)])
        quiet_libraries(world)
        found = show_data(config, args.show)
        if not world.is_main:
            return
        for note in found.notes:
            print(note)
        print_table("training rows", ["kind", "rows"], list(found.rows.items()))
        if found.removed:
            print_table("left out", ["what", "rows"], list(found.removed.items()))
        for row in found.shown:
            print(f"[{row.kind}] {row.label}: {row.texts}")


def labels(args: argparse.Namespace) -> None:
    from sead_dist.config.load import load_config

    config = load_config(args.words)
    with importing():
        from sead_dist.runs.teacher_labels import write_errors, write_labels, write_rows
        from sead_dist.runtime.distributed import in_world

    if args.rows is not None:
        return write_rows(config, Path(args.rows))
    with in_world(config.heartbeat) as world:
        write = write_labels if args.errors is None else write_errors
        write(config, Path(args.errors or args.output), world)


def evaluate(args: argparse.Namespace) -> None:
    with importing():
        from sead_dist.runs.prediction import evaluate_model, read_class_order

    labels = read_class_order(args.labels)
    evaluate_model(args.model, args.task, args.data, labels, args.split, args.json)


def predict(args: argparse.Namespace) -> None:
    with importing():
        from sead_dist.runs.predicted_rows import predict_file
        from sead_dist.runs.prediction import read_class_order

    labels = read_class_order(args.labels)
    output = None if args.output is None else Path(args.output)
    more = (args.kind, args.batch_size, args.skip_malformed)
    text = predict_file(args.model, Path(args.file), args.task, output, labels, *more)
    if text is not None:
        print(text, end="")


def export(args: argparse.Namespace) -> None:
    with importing():
        from sead_dist.runs.onnx_export import export_onnx
        from sead_dist.runs.prediction import read_class_order

    labels = read_class_order(args.labels)
    export_onnx(args.model, args.quantize == "int8", args.output, args.task, args.data, labels)


def push(args: argparse.Namespace) -> None:
    from sead_dist.reporting.hub import push_run

    print(f"uploaded to {push_run(Path(args.run_folder), args.to, args.private)}")


def store(args: argparse.Namespace) -> None:
    from sead_dist.cli import store as storecli

    storecli.run(args)


def submit(args: argparse.Namespace) -> None:
    from sead_dist.slurm.jobs import state_folder, wait
    from sead_dist.slurm.settings import SlurmSettings, load_settings

    options = {key: getattr(args, key, None) for key in SlurmSettings.model_fields}
    made = queue(args, load_settings(args.slurm, options), state_folder(args.root))
    if args.wait:
        wait(made)


def queue(args: argparse.Namespace, settings: "SlurmSettings", root: Path) -> "list[Job]":
    """Submit a sweep, a run with a pool of teachers, or a run for each seed."""
    from sead_dist.sweep.grid import is_sweep

    sweeps, pools = is_sweep(args.words), args.teacher_workers is not None
    if args.seeds is not None and (sweeps or pools):
        raise UserError(
            f"--seeds {args.seeds} is for a single run, and this is a sweep; give the key seeds=5 "
            "or seeds=[0,1]"
            if sweeps
            else f"--seeds {args.seeds} and --teacher-workers {args.teacher_workers} cannot both "
            "be given; leave --seeds out, and submit a run for each seed"
        )
    if args.workers is not None and not sweeps:
        raise UserError(
            f"--workers {args.workers} is for a sweep (tasks=[...] methods=[...]), and this is a "
            "single run; leave --workers out"
        )
    if sweeps and pools:
        raise UserError(
            f"--teacher-workers {args.teacher_workers} is for a single run, and this is a sweep; "
            "give --workers N"
        )
    if sweeps:
        from sead_dist.cli.submit import submit_sweep

        return submit_sweep(args.words, settings, args.workers or 1, args.dry_run, root)
    if pools:
        from sead_dist.cli.submit import submit_pool
        from sead_dist.slurm.settings import load_settings

        own = settings if args.teacher_slurm is None else load_settings(args.teacher_slurm, {})
        workers = args.teacher_workers
        return submit_pool(args.words, settings, own, workers, args.dry_run, root)
    from sead_dist.cli.submit import submit as submit_run

    return submit_run(args.words, settings, args.seeds, args.dry_run, root)


def jobs(args: argparse.Namespace) -> None:
    from sead_dist.runtime.console import print_table
    from sead_dist.slurm import jobs, settings

    root = jobs.state_folder(args.root)
    if args.verb is None:
        found = jobs.registered(root)
        if found:
            print_table("", jobs.COLUMNS, jobs.rows_of(found))
        else:
            print(f"no submitted runs in {root}; sead-dist submit adds them")
    elif args.verb == "logs":
        for text in jobs.log_text(jobs.find(root, args.name), args.rank, args.follow):
            print(text, end="", flush=True)
    elif args.verb == "cancel":
        job = jobs.find(root, args.name)
        settings.cancel(job.job)
        print(f"{job.name}: job {job.job} cancelled; submit the same command again to continue")
    else:
        jobs.wait([jobs.find(root, args.name)])


def reproduce(args: argparse.Namespace) -> None:
    from sead_dist.cli import reproduce
    from sead_dist.runtime.distributed import in_world

    if args.checkpoint is None:
        reproduce.show_checkpoints()
        return
    with in_world(command=args.given) as world:
        reproduce.reproduce(args.checkpoint, args.words, args.teachers, world)


def demo(args: argparse.Namespace) -> None:
    with importing():
        from sead_dist.cli.demo import run_demo
        from sead_dist.runtime.distributed import in_world
        from sead_dist.runtime.surroundings import quiet_libraries

    with in_world(command=args.given) as world:
        quiet_libraries(world)
        run_demo(Path(args.output_dir), args.seed, world)


def all_commands() -> tuple[tuple[Callable[..., None], Callable[..., None], str], ...]:
    """For each command: its function, the function that adds its arguments, its line of help."""
    return (
        (distill, arguments.add_recipe, "distil teachers into a student, or continue a killed run"),
        (finetune, arguments.add_recipe, "fine-tune teachers: OUTPUT/teacher-0, teacher-1, ..."),
        (
            sweep,
            arguments.add_words,
            "run tasks x methods x seeds and write one report: tasks=[...] methods=[...]",
        ),
        (teach, arguments.add_teach, "compute a run's teacher predictions, as a pool worker"),
        (keys, arguments.add_keys, "list keys with default and meaning; NAME searches in them"),
        (plan, arguments.add_plan, "estimate memory and time of a distillation before it"),
        (data, arguments.add_data, "count a run's rows by kind, and print some of them"),
        (labels, arguments.add_labels, "write a run's rows, or its teachers' predictions for them"),
        (evaluate, arguments.add_evaluate, "score a model on a task's dev split"),
        (predict, arguments.add_predict, "label a file's rows"),
        (export, arguments.add_export, "write an ONNX file, checked against PyTorch"),
        (push, arguments.add_push, "upload a finished run's model to the hub"),
        (store, arguments.add_store, "list, check, shrink or copy the kept teacher predictions"),
        (submit, arguments.add_submit, "submit a run as a SLURM job, queued again until finished"),
        (jobs, arguments.add_jobs, "list the submitted runs; print the log of one, or cancel it"),
        (
            reproduce,
            arguments.add_reproduce,
            "train a published checkpoint again; without a NAME: list all sixteen",
        ),
        (demo, arguments.add_demo, "fine-tune and distil on a built-in task, offline"),
    )


def parser() -> arguments.Parser:
    about = "Distil an ensemble of teachers into one small student."
    top = arguments.Parser(prog="sead-dist", description=about)
    help_ = "print the whole traceback of an error; allowed after any command"
    top.add_argument("--debug", action="store_true", help=help_)
    top.add_argument("--version", action="version", version=f"sead-dist {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, add, help_ in all_commands():
        command = commands.add_parser(run.__name__, help=help_)
        add(command)
        command.set_defaults(run=run, parser=command)
    return top


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments. Words are allowed before and after options."""
    given = list(sys.argv[1:] if argv is None else argv)
    top, names = parser(), [run.__name__ for run, _, _ in all_commands()]
    top.check_command(given, names)
    args, rest = top.parse_known_args([word for word in given if word != "--debug"])
    args.debug, args.given = "--debug" in given, given
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "words")):
        args.parser.error(arguments.unknown(rest, args))
    if rest:
        args.words = [*args.words, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done, and those of `attempt`."""
    args = parse(argv)
    code = attempt(lambda: args.run(args), args.debug)
    if code is not None:
        leave(code)
    # without this, a last collection at the end of the process takes a second and frees nothing
    gc.freeze()


if __name__ == "__main__":
    main()
