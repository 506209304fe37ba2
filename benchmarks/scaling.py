"""From 1 to 64 teachers on 1, 2 and 4 ranks: the speed of a run against what its parts allow.

Each case is a run of its own in as many processes (torch.distributed.run, gloo) and starts with
an empty store. The bound: on devices that student and teachers share a row costs at least the
student's time and that of every teacher, so examples/s = 1 / (1/student + sum of 1/teacher). These
rates are measured in the same processes right after the run, all ranks running, by a bare loop
(length-sorted batches of 64 rows for teachers, DDP for the student).

examples/s: rows trained, by the seconds of the training loop with its waiting for teachers. The
first step's time is from the building of the run to the first step that has its teachers' answers.
Memory is what the process has grown by, against the growth with no teacher and the weights of an
equal share of the teachers. Reading weights is compared with from_pretrained of as many.
Targets: 0.9 of the bound; memory within 10%; nothing else of the start-up grows with N.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import laid_out, random_classifier, run_config
from outcome_file import common_arguments, set_threads, table, write_result
from peers import TEACHER_ROWS, batches_of_like_length, load, pad, rows_of
from placement import counted_bytes
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from sead_dist.checkpoint import TrainState
from sead_dist.distributed import StopFlag, World, barrier, gather_objects, join_world, leave_world
from sead_dist.parts import build
from sead_dist.recipes import make_trainer, prepare_teachers
from sead_dist.teachers import source as source_module

BATCH = 32
STUDENT = "L2-H128"
MIXES = {"equal": ("L2-H128",), "mixed": ("L2-H128", "L2-H256", "L4-H128", "L4-H256")}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def slowest(world: World, do: Callable[[], None]) -> float:
    """Seconds until the last rank has done it, all beginning together."""
    barrier(world)
    began = time.perf_counter()
    do()
    return max(gather_objects(world, time.perf_counter() - began))


class Bare:
    """The bare loops over this rank's share of the rows."""

    def __init__(self, setting: dict[str, Any], world: World) -> None:
        self.world, self.student = world, setting["student"]
        texts, self.labels = rows_of(Path(setting["data"]) / "train.tsv")
        self.words = AutoTokenizer.from_pretrained(setting["student"])
        self.tokens = self.words(texts, truncation=True, max_length=128)["input_ids"]
        self.lengths_R = np.array([len(row) for row in self.tokens])

    def teacher_row_s(self, folder: str, rows: int | None = None) -> float:
        """Seconds of a row, all ranks working on rows of their own."""
        model = load(Path(folder), "fp32").eval()
        mine_R = np.arange(len(self.tokens))[self.world.rank :: self.world.size][:rows]
        mine_R = mine_R[np.argsort(-self.lengths_R[mine_R], kind="stable")]

        @torch.inference_mode()
        def forward() -> None:
            for start in range(0, len(mine_R), TEACHER_ROWS):
                model(**pad(self.tokens, mine_R[start : start + TEACHER_ROWS], self.words))

        return slowest(self.world, forward) / len(self.tokens)

    def student_row_s(self, rows: int | None = None) -> float:
        """Seconds of a row in training, gradients exchanged."""
        model = load(Path(self.student), "fp32").train()
        step_model = DistributedDataParallel(model) if self.world.size > 1 else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        labels = torch.tensor(self.labels)

        def epoch() -> None:
            for which_R in batches_of_like_length(self.lengths_R[:rows], BATCH, 0):
                if len(which_R) < BATCH:
                    continue
                mine_R = which_R[self.world.rank :: self.world.size]
                logits = step_model(**pad(self.tokens, mine_R, self.words)).logits
                torch.nn.functional.cross_entropy(logits, labels[mine_R]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return slowest(self.world, epoch) / (len(self.tokens) // BATCH * BATCH)

    def warm_up(self, folders: list[str], shapes: list[str]) -> None:
        """A few batches of each, and the memory given back: neither side pays for being first."""
        for folder in dict(zip(shapes, folders, strict=True)).values():
            self.teacher_row_s(folder, 2 * TEACHER_ROWS)
        self.student_row_s(2 * BATCH)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def example_s(self, folders: list[str], shapes: list[str]) -> float:
        """Seconds of one example at the bound: one teacher of each shape is measured."""
        one_of = dict(zip(shapes, folders, strict=True))
        count = Counter(shapes)
        teachers_s = sum(count[shape] * self.teacher_row_s(one_of[shape]) for shape in count)
        return self.student_row_s() + teachers_s


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
    """Stands where the run's watch is, to note when the first step has its lesson."""

    def __init__(self, watch: Any) -> None:
        self.watch, self.at = watch, 0.0

    def move(self, doing: str) -> None:
        self.at = self.at or time.perf_counter()
        self.watch.move(doing)


def our_run(setting: dict[str, Any], world: World) -> dict[str, Any]:
    """This rank's figures of one run."""
    words: dict[str, object] = {
        "data.path": setting["data"],
        "student": setting["student"],
        "teachers": setting["folders"],
        "ensemble": "mean_logits" if setting["folders"] else "none",
        "placement": "colocated" if world.size == 1 else "partitioned",
        "epochs": 1,
        "global_batch": BATCH,
        "micro_batch": BATCH // world.size,
        "gate": "off",
        "checkpoint.every_steps": 0,
        "store": Path(setting["work"]) / "store",
        "output_dir": Path(setting["work"]) / "run",
    }
    before = resident_mib()
    began = time.perf_counter()
    with ExitStack() as stack:
        parts = build(run_config(words), world, stack, StopFlag())
        built_s = time.perf_counter() - began
        exchanges = setting["folders"] and world.size > 1
        exchanged = stack.enter_context(counted_bytes()) if exchanges else []
        loads = stack.enter_context(timed_loading())
        first = FirstStep(parts.watch)
        trainer = replace(make_trainer(parts, prepare_teachers(parts)), watch=first)
        state = trainer.run(TrainState(world_size=world.size))
        source = parts.source
        models = {} if source is None else source.models
        held = sum(p.nbytes for model in models.values() for p in model.parameters())
        return {
            "rows": state.totals["rows"],
            "train_s": state.totals["train_s"],
            "first_step_s": first.at - began,
            "built_s": built_s,
            "load_s": sum(loads),
            "loaded": len(loads),
            "grown_mib": resident_mib() - before,
            "teacher_mib": held / 2**20,
            "exchanged_bytes": sum(exchanged),
        }


def read_weights(folders: list[str], world: World) -> float:
    """Seconds in which every rank reads an equal share of the teachers once."""
    mine = folders[world.rank :: world.size]
    return slowest(world, lambda: [load(Path(folder), "fp32") for folder in mine] and None)


def work(setting: dict[str, Any]) -> None:
    """What each of the ranks does; rank 0 writes the figures."""
    set_threads(setting["threads"])
    world = join_world()
    bare = Bare(setting, world)
    bare.warm_up(setting["folders"], setting["shapes"])
    ours = gather_objects(world, our_run(setting, world))
    example_s = bare.example_s(setting["folders"], setting["shapes"])
    read_s = read_weights(setting["folders"], world)
    if world.is_main:
        figures = {
            "bound": 1 / example_s,
            "examples_per_s": ours[0]["rows"] / max(of["train_s"] for of in ours),
            "bytes_per_example": sum(of["exchanged_bytes"] for of in ours) / ours[0]["rows"],
            "read_s": read_s,
            **{
                key: max(of[key] for of in ours)
                for key in ("first_step_s", "built_s", "load_s", "loaded", "grown_mib")
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


def report(figures: list[dict[str, Any]], args: argparse.Namespace) -> None:
    columns = ["teachers", "ranks", "examples/s", "of the bound", "teachers' MiB of a rank"]
    columns += ["of N/ranks", "grown by, MiB", "of student + N/ranks", "bytes an example"]
    columns += ["first step after, s", "built in, s", "weights read in, s", "bare, s"]
    alone = {
        of["ranks"]: statistics.median(
            one["grown_mib"]
            for one in figures
            if not one["teachers"] and one["ranks"] == of["ranks"]
        )
        for of in figures
    }
    cases: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for of in figures:
        cases.setdefault((of["mix"], of["teachers"], of["ranks"]), []).append(of)
    rows = []
    for (mix, count, ranks), turns in cases.items():

        def middle(key: str, turns: list[dict[str, Any]] = turns) -> float:
            return statistics.median(of[key] for of in turns)

        share = turns[0]["weights_mib"] / ranks
        ratio = statistics.median(of["examples_per_s"] / of["bound"] for of in turns)
        row: list[object] = [f"{count} {mix}" if count else "none", ranks]
        row += [middle("examples_per_s"), ratio, middle("teacher_mib")]
        row += [middle("teacher_mib") / share if count else "", middle("grown_mib")]
        row += [middle("grown_mib") / (alone[ranks] + share), middle("bytes_per_example")]
        row += [middle("first_step_s"), middle("built_s"), middle("load_s"), middle("read_s")]
        rows.append(row)
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
        args.rows, args.repeat, args.ranks, args.teachers, args.mixed = 200, 1, [1, 2], [2], []
    set_threads(args.threads)
    cases = [("equal", 0)]
    cases += [("equal", n) for n in args.teachers] + [("mixed", n) for n in args.mixed]
    figures = []
    with laid_out(args.work, args.rows) as (folder, data, tokenizer):
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
