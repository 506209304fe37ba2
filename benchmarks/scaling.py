"""From 1 to 64 teachers on 1, 2 and 4 ranks: the speed of a run against a bound.

Each case is a run of its own in as many processes (torch.distributed.run, gloo) and starts with
an empty store. The bound: on devices that student and teachers share a row costs at least the
student's time and that of every teacher, so examples/s = 1 / (1/student + sum of 1/teacher). These
rates are measured in the same processes right after the run, all ranks running, by a bare loop
(length-sorted batches of 64 rows for teachers, DDP for the student). Where our run without a
teacher is faster than the bare student's loop, the bound has our time: the stricter of the two.

examples/s: rows trained, by the seconds of the training loop with its waiting for teachers. The
first step's time is from the building of the run to the first step that has its teachers' answers.
Memory is what the process has grown by once freed memory is given back to the system, against the
growth with no teacher and the weights of an equal share of the teachers; a second column counts
freed memory that the allocator keeps too. Reading weights is compared with from_pretrained of as
many. Targets: 0.9 of the bound; memory within 10%; nothing else of the start-up grows with N.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bare_ranks import BATCH, Bare, give_back_memory, read_weights
from inputs import laid_out, random_classifier, run_config
from placement import counted_bytes
from result_file import common_arguments, set_threads, table, write_result

from sead_dist.runs.distillation import make_trainer
from sead_dist.runs.prepared_teachers import prepare_teachers
from sead_dist.runs.setup import build
from sead_dist.runtime.distributed import StopFlag, World, gather_objects, join_world, leave_world
from sead_dist.teachers import source as source_module
from sead_dist.training.checkpoint import TrainState

STUDENT = "L2-H128"
MIXES = {"equal": ("L2-H128",), "mixed": ("L2-H128", "L2-H256", "L4-H128", "L4-H256")}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def timed_loading() -> Iterator[list[float]]:
    """Seconds of each teacher that this process loads meanwhile."""
    spent: list[float] = []
    own = source_module.load_whole

    def timing(*given: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        model = own(*given, **keywords)
        spent.append(time.perf_counter() - began)
        return model

    source_module.load_whole = timing
    try:
        yield spent
    finally:
        source_module.load_whole = own


class FirstStep:
    """Replaces the run's heartbeat, to measure when the predictions of the first step are there."""

    def __init__(self, heartbeat: Any) -> None:
        self.heartbeat, self.at = heartbeat, 0.0

    def count_progress(self, doing: str) -> None:
        self.at = self.at or time.perf_counter()
        self.heartbeat.count_progress(doing)


def our_run(setting: dict[str, Any], world: World) -> dict[str, Any]:
    """This rank's figures of one run."""
    words: dict[str, object] = {
        "data.path": setting["data"],
        "student": setting["student"],
        "teachers": setting["folders"],
        "ensemble": "mean_logits" if setting["folders"] else "none",
        "placement": "colocated" if world.size == 1 else "partitioned",
        "num_train_epochs": 1,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH // world.size,
        "teacher_validation": "off",
        "save_steps": 0,
        "store": Path(setting["work"]) / "store",
        "output_dir": Path(setting["work"]) / "run",
    }
    before = resident_mib()
    began = time.perf_counter()
    with ExitStack() as stack:
        setup = build(run_config(words), world, stack, StopFlag())
        built_s = time.perf_counter() - began
        exchanges = setting["folders"] and world.size > 1
        exchanged = stack.enter_context(counted_bytes()) if exchanges else []
        loads = stack.enter_context(timed_loading())
        first = FirstStep(setup.heartbeat)
        trainer = replace(make_trainer(setup, prepare_teachers(setup)), heartbeat=first)
        state = trainer.run(TrainState(world_size=world.size))
        source = setup.source
        models = {} if source is None else source.models
        held = sum(p.nbytes for model in models.values() for p in model.parameters())
        grown_mib = resident_mib() - before
        give_back_memory()
        return {
            "rows": state.totals["rows"],
            "train_s": state.totals["train_s"],
            "first_step_s": first.at - began,
            "built_s": built_s,
            "load_s": sum(loads),
            "loaded": len(loads),
            "grown_mib": grown_mib,
            "held_mib": resident_mib() - before,
            "teacher_mib": held / 2**20,
            "exchanged_bytes": sum(exchanged),
        }


def work(setting: dict[str, Any]) -> None:
    """What each of the ranks does; rank 0 writes the figures."""
    set_threads(setting["threads"])
    world = join_world()
    bare = Bare(setting, world)
    bare.warm_up(setting["folders"], setting["shapes"])
    ours = gather_objects(world, our_run(setting, world))
    student_row_s = bare.student_row_s()
    teachers_row_s = bare.teachers_row_s(setting["folders"], setting["shapes"])
    read_s = read_weights(setting["folders"], world)
    if world.is_main:
        figures = {
            "student_row_s": student_row_s,
            "teachers_row_s": teachers_row_s,
            "examples_per_s": ours[0]["rows"] / max(of["train_s"] for of in ours),
            "bytes_per_example": sum(of["exchanged_bytes"] for of in ours) / ours[0]["rows"],
            "read_s": read_s,
            **{
                key: max(of[key] for of in ours)
                for key in ("first_step_s", "built_s", "load_s", "loaded", "grown_mib", "held_mib")
            },
            "teacher_mib": max(of["teacher_mib"] for of in ours),
        }
        Path(setting["figures"]).write_text(json.dumps(figures), encoding="utf-8")
    leave_world(world)


def launch(setting: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The figures of one case, run in processes of its own."""
    with tempfile.TemporaryDirectory(dir=setting["folder"]) as work_folder:
        case = {**setting, "work": work_folder, "figures": f"{work_folder}/figures.json"}
        file = Path(work_folder) / "setting.json"
        file.write_text(json.dumps(case), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), __file__, str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(Path(case["figures"]).read_text(encoding="utf-8"))
        return figures


def weights_mib(folders: list[str]) -> float:
    return sum((Path(folder) / "model.safetensors").stat().st_size for folder in folders) / 2**20


def median_of(figures: list[dict[str, Any]], key: str) -> float:
    return statistics.median(of[key] for of in figures)


def row_of(turns: list[dict[str, Any]], alone: list[dict[str, Any]]) -> list[object]:
    """One line of the table, from a case's repetitions and those without a teacher."""
    count, ranks = turns[0]["teachers"], turns[0]["ranks"]
    share = turns[0]["weights_mib"] / ranks
    student_row_s = median_of(turns, "student_row_s")
    if count:  # a bare loop that is slower than ours is not a limit
        student_row_s = min(student_row_s, 1 / median_of(alone, "examples_per_s"))
    rate = median_of(turns, "examples_per_s")
    of_bound = rate * (student_row_s + median_of(turns, "teachers_row_s"))
    row: list[object] = [f"{count} {turns[0]['mix']}" if count else "none", ranks, rate, of_bound]
    row += [median_of(turns, "teacher_mib")]
    row += [median_of(turns, "teacher_mib") / share if count else ""]
    row += [median_of(turns, "held_mib")]
    row += [median_of(turns, "held_mib") / (median_of(alone, "held_mib") + share)]
    row += [median_of(turns, "grown_mib"), median_of(turns, "bytes_per_example")]
    keys = ("first_step_s", "built_s", "load_s", "read_s")
    return row + [median_of(turns, key) for key in keys]


def report(figures: list[dict[str, Any]], args: argparse.Namespace) -> None:
    columns = ["teachers", "ranks", "examples/s", "of the bound", "teachers' MiB of a rank"]
    columns += ["of N/ranks", "held, MiB", "of student + N/ranks", "with the allocator's, MiB"]
    columns += ["bytes an example", "first step after, s", "built in, s", "weights read in, s"]
    columns += ["bare, s"]
    cases: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for of in figures:
        cases.setdefault((of["mix"], of["teachers"], of["ranks"]), []).append(of)
    rows = [row_of(turns, cases["equal", 0, ranks]) for (_, _, ranks), turns in cases.items()]
    text = (
        f"Student {STUDENT}; teachers with random weights, equal ({', '.join(MIXES['equal'])}) or "
        f"mixed ({', '.join(MIXES['mixed'])} in turn), fp32; {args.rows} rows of SST-2 before a "
        f"tenth is held out, one epoch, an empty store; gloo, {args.threads} thread each rank, "
        f"{os.cpu_count()} cores; {args.repeat} repetitions, medians.\n\n{table(columns, rows)}"
    )
    write_result("scaling", "From 1 to 64 teachers", text, figures, args)


def main() -> None:
    if "RANK" in os.environ:
        work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        return
    parser = common_arguments(__doc__, rows=2000, repeat=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    counts = [1, 2, 4, 8, 16, 32, 64]
    parser.add_argument("--teachers", type=int, nargs="+", default=counts, help="equal ones")
    parser.add_argument("--mixed", type=int, nargs="*", default=[8, 64], help="mixed ones")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.ranks, args.teachers, args.mixed = 100, 1, [2], [2], []
    set_threads(args.threads)
    cases = [("equal", 0)]
    cases += [("equal", n) for n in args.teachers] + [("mixed", n) for n in args.mixed]
    figures = []
    with laid_out(args) as (folder, data, tokenizer):
        student = random_classifier(folder / "student", STUDENT, tokenizer, 0)
        for turn in range(args.repeat):
            for ranks in args.ranks:
                for mix, count in cases if turn % 2 == 0 else cases[::-1]:
                    shapes = [MIXES[mix][n % len(MIXES[mix])] for n in range(count)]
                    folders = [
                        str(random_classifier(folder / f"{shape}-{n}", shape, tokenizer, n + 1))
                        for n, shape in enumerate(shapes)
                    ]
                    setting = {
                        "threads": args.threads,
                        "folder": str(folder),
                        "data": str(data),
                        "student": str(student),
                        "folders": folders,
                        "shapes": shapes,
                    }
                    case = {"mix": mix, "teachers": count, "ranks": ranks}
                    case["weights_mib"] = weights_mib(folders)
                    figures.append({**case, **launch(setting, ranks)})
                    print(json.dumps(figures[-1]), flush=True)
    report(figures, args)


if __name__ == "__main__":
    main()
