"""A teacher that would be the tail is split over ranks, by measured cost: the same student."""

import json
import os
from dataclasses import replace

import pytest
from ranks import run_ranks
from small import (
    CPU,
    load_teachers,
    model_bytes,
    read,
    save_teacher,
    student_shape,
    words,
    write_task,
)

from sead_dist.config.load import load_config
from sead_dist.planning.table import plan
from sead_dist.runs.distillation import distill
from sead_dist.teachers.rates import Rate, remember, remembered, teacher_key, this_machine

RANKS = 2


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The built-in task and four teachers of three shapes; the first is told to be slow."""
    root = tmp_path_factory.mktemp("shares")
    data = write_task(root / "data")
    student_shape(data)
    teachers = [
        save_teacher(root / "large", num_hidden_layers=2),
        save_teacher(root / "b", "roberta", seed=1, labels=("positive", "negative")),
        save_teacher(root / "c", seed=2),
        save_teacher(root / "d", seed=3),
    ]
    return data, teachers


def write_rates(path, folders, seconds):
    """What a plan would remember of these teachers on a machine with so many ranks."""
    machine = replace(this_machine(CPU), threads=1, ranks=RANKS)
    rates = {
        teacher_key(teacher, machine): Rate((32,), (row_s,), 0.0, 0.0)
        for teacher, row_s in zip(load_teachers(folders), seconds, strict=True)
    }
    remember(path, rates)


def run_and_plan(world, given, store, rates):
    """The run, then the plan of a run that has all of its work to do, by what is remembered."""
    os.environ["SEAD_DIST_RATES"] = str(rates)
    distill(load_config(given), world, show_table=False)
    again = load_config([*given, f"store={store}", f"output_dir={store}-run"])
    plan(again, world, None, None, None, False, store.with_suffix(".json"))


def rows_of(run):
    """{teacher: {rank: rows it computed}} of the journals."""
    found = {}
    for path in (run / "teacher_rows").glob("rank-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            ranks = found.setdefault(line["teacher"], {})
            rank = int(path.stem.partition("-")[2])
            ranks[rank] = ranks.get(rank, 0) + line["rows"]
    return found


@pytest.mark.slow
def test_invariant_03_and_08_a_teacher_is_split_by_measured_cost_and_the_student_is_the_same(
    tmp_path, task
):
    data, teachers = task
    seconds = [9.0, 1.0, 1.0, 1.0]
    rates = tmp_path / "rates.json"
    write_rates(rates, teachers, seconds)
    for placement in ("colocated", "partitioned"):
        run = tmp_path / placement / "run"
        given = words(data, teachers, run, placement=placement, global_batch_size=16)
        store = tmp_path / f"{placement}-new"
        run_ranks(RANKS, tmp_path / "ranks", run_and_plan, given, store, rates, timeout_s=240.0)
    assert model_bytes(tmp_path / "partitioned" / "run") == model_bytes(
        tmp_path / "colocated" / "run"
    )
    computed = rows_of(tmp_path / "partitioned" / "run")
    assert {name: sum(ranks.values()) for name, ranks in computed.items()} == {
        name: 80 for name in ("large", "b", "c", "d")
    }
    # both ranks have as much to do, though one teacher costs three quarters of it all
    cost_of = dict(zip(("large", "b", "c", "d"), seconds, strict=True))
    load = [
        sum(cost * computed[name].get(rank, 0) for name, cost in cost_of.items())
        for rank in range(RANKS)
    ]
    assert max(load) <= 1.1 * sum(load) / RANKS
    assert len(computed["large"]) == RANKS
    log = (tmp_path / "partitioned" / "run" / "log.txt").read_text()
    assert "partitioned: large on rank 0 (67%), 1 (33%); b on rank 1 (100%)" in log
    # both ranks measured the student; the teachers' three shapes were known
    assert len(remembered(rates)) == 3 + 1
    planned = read(tmp_path / "partitioned-new.json")
    assert planned["ranks"] == RANKS
    assert planned["teacher_forwards"] == 4 * 80
