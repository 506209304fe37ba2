"""Two ranks, teachers partitioned against teachers colocated: time and bytes exchanged.

Without a launcher the script starts itself in two processes (torch.distributed.run, gloo). Each
repetition runs the teachers' pass of both placements over an empty store, and then one epoch of the
student. The pass ends when the last rank has every prediction. Bytes are those that each rank sends
in the exchange of logits (examples x classes x 4, padded to the largest rank's share), counted at
the collective. There is no target: with equal work the placements take the same time. They differ
in memory, and in how evenly whole teachers are divided over the ranks.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from inputs import laid_out, random_classifier, run_config
from result_file import common_arguments, set_threads, spread, table, write_result

from sead_dist.runs.distillation import make_trainer
from sead_dist.runs.prepared_teachers import prepare_teachers
from sead_dist.runs.results import peak_memory
from sead_dist.runs.setup import build
from sead_dist.runtime.distributed import (
    StopFlag,
    World,
    barrier,
    gather_objects,
    join_world,
    leave_world,
)
from sead_dist.teachers.base import Request
from sead_dist.training.checkpoint import TrainState

RANKS = 2
PLACEMENTS = ("partitioned", "colocated")


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes of every tensor that this rank gives to all_gather meanwhile."""
    given: list[int] = []
    gather = dist.all_gather

    def counting(got: list[torch.Tensor], sent: torch.Tensor, **keywords: Any) -> Any:
        given.append(sent.nbytes)
        return gather(got, sent, **keywords)

    dist.all_gather = counting
    try:
        yield given
    finally:
        dist.all_gather = gather
    assert given, "logits are not exchanged by dist.all_gather; count the bytes of the call that is"


def one_turn(words: dict[str, object], world: World) -> dict[str, float]:
    """Figures of one placement, the same on every rank: the slowest's seconds, all ranks' bytes."""
    with ExitStack() as stack:
        setup = build(run_config(words), world, stack, StopFlag())
        source, split = setup.source, setup.splits.train
        assert source is not None
        asked = Request(split, np.arange(len(split.ids_U2)), None, "the pass")
        barrier(world)
        with counted_bytes() as given:
            began = time.perf_counter()
            source.submit(asked).result()
            pass_s = time.perf_counter() - began
        trainer = make_trainer(setup, prepare_teachers(setup))
        barrier(world)
        began = time.perf_counter()
        trainer.run(TrainState(world_size=world.size))
        train_s = time.perf_counter() - began
        loaded = sum(p.nbytes for model in source.models.values() for p in model.parameters())
        mine = (pass_s, train_s, sum(given), loaded, peak_memory(world.device))
        passes, trainings, bytes_, loads, peaks = zip(*gather_objects(world, mine), strict=True)
        return {
            "pass_s": max(passes),
            "train_s": max(trainings),
            "examples": len(split.ids_U2),
            "bytes_per_example": sum(bytes_) / len(split.ids_U2),
            "teacher_mib_of_a_rank": max(loads) / 2**20,
            "peak_mib_of_a_rank": max(peaks) / 2**20,
        }


def work(setting: dict[str, Any]) -> None:
    """What each of the ranks does; rank 0 writes the figures."""
    set_threads(setting["threads"])
    world = join_world()
    figures = []
    for turn in range(setting["repeat"]):
        for count in setting["teachers"]:
            for placement in PLACEMENTS if turn % 2 else PLACEMENTS[::-1]:
                folder = Path(setting["work"]) / f"{turn}-{count}-{placement}"
                words: dict[str, object] = {
                    "data.path": setting["data"],
                    "student": setting["student"],
                    "teachers": setting["folders"][:count],
                    "placement": placement,
                    "num_train_epochs": 1,
                    "micro_batch_size": 16,
                    "teacher_validation": "off",
                    "store": folder / "store",
                    "output_dir": folder / "run",
                }
                turned = one_turn(words, world)
                figures.append({"teachers": count, "placement": placement, **turned})
    if world.is_main:
        Path(setting["figures"]).write_text(json.dumps(figures), encoding="utf-8")
    leave_world(world)


def report(figures: list[dict[str, Any]], args: argparse.Namespace) -> None:
    columns = ["teachers", "pass, s: partitioned", "colocated", "pass, partitioned / colocated"]
    columns += ["epoch, s: partitioned", "colocated", "bytes per example: partitioned"]
    columns += ["colocated", "teachers' MiB of a rank: partitioned", "colocated"]
    rows = []
    for count in args.teachers:
        by = {
            placement: [
                f for f in figures if f["teachers"] == count and f["placement"] == placement
            ]
            for placement in PLACEMENTS
        }

        def middle(key: str, by: dict[str, list[dict[str, Any]]] = by) -> list[float]:
            return [statistics.median(f[key] for f in by[p]) for p in PLACEMENTS]

        pairs = zip(*by.values(), strict=True)
        ratios = [one["pass_s"] / other["pass_s"] for one, other in pairs]
        memory = middle("teacher_mib_of_a_rank")
        row = [count, *middle("pass_s"), spread(ratios), *middle("train_s")]
        rows.append([*row, *middle("bytes_per_example"), *memory])
    text = (
        f"Two ranks, {args.threads} thread each, gloo; teachers {args.shape} with random weights, "
        f"student L2-H128, {args.rows} rows of SST-2 before a tenth is held out, "
        f"{args.repeat} interleaved repetitions; medians, ratios with (least-most). The epoch's "
        "time is after the pass, so the teachers are read from the store. Bytes are what both "
        f"ranks together send in the exchange for one example and all teachers.\n\n"
        f"{table(columns, rows)}"
    )
    write_result("placement", "Partitioned against colocated teachers", text, figures, args)


def main() -> None:
    if "RANK" in os.environ:
        work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        return
    parser = common_arguments(__doc__, rows=4000, repeat=3)
    parser.add_argument("--shape", default="L4-H256", help="of the teachers, random weights")
    parser.add_argument("--teachers", type=int, nargs="+", default=[3, 4], help="how many")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.shape, args.teachers = 100, 1, "L1-H32", [3]
    set_threads(args.threads)
    with laid_out(args) as (folder, data, tokenizer):
        folders = [
            random_classifier(folder / f"{args.shape}-{n}", args.shape, tokenizer, n)
            for n in range(max(args.teachers))
        ]
        setting = {
            "threads": args.threads,
            "repeat": args.repeat,
            "teachers": args.teachers,
            "work": tempfile.mkdtemp(dir=folder),
            "data": str(data),
            "student": str(random_classifier(folder / "student", "L2-H128", tokenizer, 0)),
            "folders": [str(path) for path in folders],
            "figures": str(folder / "figures.json"),
        }
        (folder / "setting.json").write_text(json.dumps(setting), encoding="utf-8")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(RANKS), __file__, str(folder / "setting.json")]
        subprocess.run(launch, check=True)
        report(json.loads((folder / "figures.json").read_text(encoding="utf-8")), args)


if __name__ == "__main__":
    main()
