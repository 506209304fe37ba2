"""`sead-dist plan`: what it prints and writes, what it remembers, and what it refuses."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from small import (
    ALONE,
    CPU,
    config,
    load_teachers,
    save_teacher,
    student_shape,
    words,
    write_task,
)
from store_world import files_of, make_older
from transformers import AutoConfig

from sead_dist.cli.commands import print_plan
from sead_dist.config.load import load_config
from sead_dist.config.yaml_text import parse_yaml
from sead_dist.errors import UserError
from sead_dist.models.sequence_classifier import outline
from sead_dist.planning import rates as planrates
from sead_dist.planning.scenario import FULL, bytes_at_work, student_bytes, teacher_bytes
from sead_dist.planning.table import free_of, plan
from sead_dist.runs.distillation import distill
from sead_dist.runtime.distributed import World
from sead_dist.teachers.placement import share_rows
from sead_dist.teachers.rates import Rate, default_rates, remembered, teacher_key, this_machine

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The built-in task, a teacher of one layer and one of three, and a student's shape."""
    root = tmp_path_factory.mktemp("plan")
    data = write_task(root / "data")
    teachers = [save_teacher(root / "a"), save_teacher(root / "b", seed=1, num_hidden_layers=3)]
    student_shape(data)
    return data, teachers


@pytest.fixture
def rates(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAD_DIST_RATES", str(tmp_path / "rates.json"))
    # other tests run beside this one
    monkeypatch.setattr(planrates.OtherProcesses, "are_busy", lambda *_given: False)
    return tmp_path / "rates.json"


def planned(task, tmp_path, ranks=None, gpu_memory=None, given=None, fresh=False, **changes):
    """The plan's JSON."""
    data, teachers = task
    run = load_config(words(data, teachers, tmp_path / "run", **changes))
    print_plan(plan(run, ALONE, ranks, gpu_memory, given, fresh, tmp_path / "plan.json"))
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_plan_has_passes_store_times_and_the_choice_and_writes_no_run(
    task, tmp_path, rates, capsys
):
    found = planned(task, tmp_path, ranks=2)
    # 60 rows of train and selection, 20 of dev, two teachers, two classes of 4 bytes
    assert found["teacher_forwards"] == 2 * 80
    assert found["store_bytes"] == 2 * 80 * 8
    assert found["steps"] == 7
    assert [one["placement"] for one in found["placements"]] == [
        "colocated",
        "partitioned",
        "sharded",
        "pool",
    ]
    for one in found["placements"]:
        assert (one["teachers_s"] > 0) == (one["placement"] != "pool")
        assert one["seconds"] == pytest.approx(one["teachers_s"] + one["training_s"])
        # a pool's student has nothing to wait for, and may reach the bound
        assert 0 < one["examples_per_second"] <= one["bound"] * (1 + 1e-9)
    colocated, partitioned, sharded, pool = found["placements"]
    assert partitioned["teacher_bytes"] <= colocated["teacher_bytes"]
    assert sharded["at_least"]
    assert pool["teacher_bytes"] == 0
    # two ranks have half of the rows each, a worker alone has all of them
    alone_s = planned(task, tmp_path)["placements"][0]["teachers_s"]
    assert pool["workers"] == math.ceil(alone_s / pool["training_s"])
    assert pool["bound"] > colocated["bound"]
    assert found["auto"] == ["colocated", "colocated"]
    said = capsys.readouterr().out
    assert f"auto takes {found['reason']}" in said
    assert "pool: the student need not wait with" in said
    assert "rates: 3 measured now, 0 remembered" in said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "store").exists()


def test_what_was_measured_is_remembered_and_measured_again_only_when_asked(
    task, tmp_path, rates, monkeypatch
):
    planned(task, tmp_path)
    before = rates.read_bytes()
    assert len(remembered(rates)) == 3

    def measured(*_args):
        raise AssertionError("it measures again")

    with monkeypatch.context() as patch:
        patch.setattr(planrates, "measure_teacher", measured)
        patch.setattr(planrates, "measure_student", measured)
        planned(task, tmp_path)
    assert rates.read_bytes() == before
    planned(task, tmp_path, fresh=True)
    assert rates.read_bytes() != before


def test_what_time_does_not_allow_is_scaled_marked_and_not_remembered(
    task, tmp_path, rates, monkeypatch, capsys
):
    monkeypatch.setattr(planrates, "LOAD_PER_S", 0)
    found = planned(task, tmp_path)
    assert [one["scaled"] for one in found["rates"]] == [False, True, True]
    assert len(remembered(rates)) == 1
    said = capsys.readouterr().out
    assert said.count(" scaled ") == 2
    assert "scaled: not measured up to" in said
    # a teacher of three layers does nearly three times as much as one of one layer
    small, large = (one["examples_per_second"] for one in found["rates"][1:])
    assert 2 < small / large < 3


def test_measuring_ends_with_its_time(task, tmp_path, rates, monkeypatch):
    monkeypatch.setattr(planrates, "BUDGET_S", 0.0)
    found = planned(task, tmp_path)
    assert len(found["rates"]) == 3
    assert any(one["scaled"] for one in found["rates"])


def test_a_warm_store_costs_nothing_and_is_left_as_it_is(task, tmp_path, rates, capsys):
    data, teachers = task
    distill(load_config(words(data, teachers, tmp_path / "other")), ALONE, show_table=False)
    make_older(tmp_path / "store")
    before = files_of(tmp_path / "store")
    found = planned(task, tmp_path)
    assert files_of(tmp_path / "store") == before
    assert found["teacher_forwards"] == 0
    assert [one["teachers_s"] for one in found["placements"]] == [0, 0, 0, 0]
    assert found["placements"][3]["workers"] == 0
    assert "the store holds every prediction" in capsys.readouterr().out


def test_a_run_without_teachers_is_planned_too(task, tmp_path, rates):
    found = planned(task, tmp_path, method="finetune")
    assert found["teacher_forwards"] == 0
    assert len(found["rates"]) == 1
    assert [one["placement"] for one in found["placements"]] == ["no teachers"]


def test_a_mixture_of_placements_has_a_row_of_its_own_and_says_who_goes_where(
    task, tmp_path, rates, capsys
):
    data, teachers = task
    pooled_s = planned((data, teachers[1:]), tmp_path)["placements"][0]["teachers_s"]
    capsys.readouterr()
    entries = f"[{teachers[0]}, {{path: {teachers[1]}, placement: pool}}]"
    run = load_config([*words(data, teachers, tmp_path / "run"), f"teachers={entries}"])
    print_plan(plan(run, ALONE, 2, None, None, False, tmp_path / "plan.json"))
    found = json.loads((tmp_path / "plan.json").read_text())
    own, colocated = found["placements"][-1], found["placements"][0]
    assert own["placement"] == "this run"
    assert own["placements"] == found["this_run"] == ["colocated", "pool"]
    # one of the two teachers is left, and workers for the other
    assert 0 < own["teacher_bytes"] < colocated["teacher_bytes"]
    assert 0 < own["teachers_s"] < colocated["teachers_s"]
    assert own["workers"] == math.ceil(pooled_s / own["seconds"])
    said = capsys.readouterr().out
    assert "this run takes placement colocated, pool: " in said
    assert "; a colocated, b pool\n" in said
    assert "auto takes" not in said


def test_a_partly_measured_rate_is_not_measured_again_where_time_would_not_suffice(
    task, tmp_path, rates, monkeypatch
):
    planned(task, tmp_path)
    known = json.loads(rates.read_text())
    for rate in known["rates"].values():  # as of a model so slow that only 4 tokens were measured
        rate.update(lengths_K=[4], row_s_K=[30.0])
    rates.write_text(json.dumps(known))
    with monkeypatch.context() as patch:
        patch.setattr(planrates, "measure_teacher", None)
        patch.setattr(planrates, "measure_student", None)
        found = planned(task, tmp_path)
    assert all(one["scaled"] for one in found["rates"])
    for rate in known["rates"].values():  # these are quick: there is time for the task's lengths
        rate.update(row_s_K=[1e-6])
    rates.write_text(json.dumps(known))
    assert not any(one["scaled"] for one in planned(task, tmp_path)["rates"])


def test_rates_that_cannot_be_kept_do_not_lose_the_plan(task, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEAD_DIST_RATES", str(tmp_path / "file" / "rates.json"))
    found = planned(task, tmp_path)
    assert not any(one["scaled"] for one in found["rates"])
    said = capsys.readouterr().out
    assert f"the rates cannot be written to {tmp_path / 'file' / 'rates.json'} (" in said
    assert "), so the next plan measures them again; name another file with SEAD_DIST_RATES" in said


def test_where_the_plan_cannot_be_written_is_found_out_first(task, tmp_path, rates, monkeypatch):
    data, teachers = task
    monkeypatch.setattr("sead_dist.planning.table.check_run", None)
    run = load_config(words(data, teachers, tmp_path / "run"))
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "plan", "does not exist")):
        with pytest.raises(UserError, match=f"--json .*{said}"):
            plan(run, ALONE, None, None, None, False, path)


def test_ranks_that_are_not_there_share_this_machines_memory(monkeypatch):
    monkeypatch.setattr("sead_dist.planning.table.least_free", lambda _world: 1000)
    assert [free_of(ALONE, size) for size in (1, 4)] == [1000, 250]
    assert free_of(World(0, 2, CPU), 4) == 500
    # GPUs bring their own
    assert free_of(World(0, 1, torch.device("cuda", 0)), 4) == 1000


GIVEN = """
hardware: another machine
forward: {fp32: 2.0e+9}
training: {fp32: 1.0e+9}
link: 1.0e+9
"""


def test_rates_of_other_hardware_are_scaled_by_operations(task, tmp_path, rates):
    path = tmp_path / "given.yaml"
    path.write_text(GIVEN)
    slow = planned(task, tmp_path, ranks=2, given=path)
    assert slow["hardware"] == "another machine"
    assert all(one["scaled"] for one in slow["rates"])
    assert not slow["placements"][2]["at_least"]
    assert not rates.exists()
    path.write_text(json.dumps({**parse_yaml(GIVEN, "here"), "training": {"fp32": 4e9}}))
    quick = planned(task, tmp_path, ranks=2, given=path)
    ratio = slow["placements"][0]["training_s"] / quick["placements"][0]["training_s"]
    assert ratio == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hardware: x\nforwards: {fp32: 1.0}", "forward: field required; its keys are hardware"),
        (GIVEN + "speed: 3", "speed: there is no such key; its keys are hardware, device, forward"),
        (GIVEN.replace("2.0e+9", "-1"), "forward.fp32: input should be greater than 0, not -1"),
        (GIVEN.replace("{fp32: 2.0e+9}", "{bf16: 2.0e+9}"), "forward has no fp32, which the run"),
        (GIVEN.replace("2.0e+9}", "2.0e+9"), "is not valid YAML"),
        ("- 1", "has no keys"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_of_rates_is_refused_in_one_line(task, tmp_path, rates, text, said):
    path = tmp_path / "given.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        planned(task, tmp_path, given=path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu_memory": "24"}, "--gpu-memory '24' is not a number with a unit"),
        ({"gpu_memory": "1kB"}, "the student's training state alone takes"),
        ({"ranks": 0}, "--ranks 0 must be at least 1"),
        (
            {"encoders": "[L6-H256-A8]"},
            "encoders is a key of finetune; give the teachers to distil",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(task, tmp_path, rates, changes, said):
    with pytest.raises(UserError) as caught:
        planned(task, tmp_path, **changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_given_memory_decides_the_choice_and_what_fits(task, tmp_path, rates):
    _, teachers = task
    small, large = load_teachers(teachers)
    parts = planned(task, tmp_path, ranks=2)["placements"][0]
    assert parts["teacher_bytes"] == small.bytes + large.bytes
    both = planned(task, tmp_path, ranks=2, gpu_memory="1GB")
    assert both["auto"] == ["colocated", "colocated"]
    assert all(one["fits"] for one in both["placements"])
    # half of it holds the large one, not both
    size = 2 * large.bytes + small.bytes
    one = planned(task, tmp_path, ranks=2, gpu_memory=f"{size}B")
    assert one["auto"] == ["partitioned", "partitioned"]


def test_where_no_placement_fits_the_plan_says_so(task, tmp_path, rates, capsys):
    _, teachers = task
    _, large = load_teachers(teachers)
    student = planned(task, tmp_path, ranks=2)["placements"][0]["student_bytes"]
    capsys.readouterr()
    tight = f"{int(student / FULL) + large.bytes // 20}B"
    found = planned(task, tmp_path, ranks=2, gpu_memory=tight)
    assert not any(one["fits"] for one in found["placements"][:3])
    assert "no placement on these ranks fits into" in capsys.readouterr().out
    assert any("no placement on these ranks fits" in line for line in found["notes"])


def test_the_students_bytes_are_those_of_the_table():
    student = AutoConfig.for_model("bert", **SIZES)
    parameters = sum(p.numel() for p in outline(student).parameters())
    for stage, each in ((None, 16), ("zero1", 9.5), ("zero2", 6), ("zero3", 2.5)):
        given = config(global_batch_size=16, **({} if stage is None else {"deepspeed": stage}))
        assert student_bytes(student, given, 8) == pytest.approx(each * parameters, rel=1e-6)
    assert student_bytes(student, config(optim="sgd"), 1) == 8 * parameters
    # on its GPU an offloaded student leaves its parameters, or the layers at work
    given = config(global_batch_size=16, deepspeed="zero2_offload")
    assert student_bytes(student, given, 8) == 4 * parameters
    given = config(global_batch_size=16, deepspeed="zero3_offload")
    assert student_bytes(student, given, 8) == bytes_at_work(student, "fp32", False)


def test_the_teachers_bytes_are_of_the_rank_that_holds_most(task):
    _, folders = task
    small, large = load_teachers(folders)
    whole = small.bytes + large.bytes
    for placement, expected in (
        ("colocated", whole),
        ("partitioned", large.bytes),
        (
            "sharded",
            -(-small.bytes // 2)
            - (-large.bytes // 2)
            + max(bytes_at_work(t.config, "fp32", False) for t in (small, large)),
        ),
    ):
        placements = [placement] * 2
        # no room to split a teacher
        share_NW = share_rows([small, large], placements, [1.0, 2.0], 2, 0)
        assert teacher_bytes([small, large], placements, share_NW, False) == expected
    assert teacher_bytes([], [], np.ones((0, 2)), False) == 0


def test_a_teacher_is_found_by_its_shape(task, tmp_path, rates):
    planned(task, tmp_path)
    machine = this_machine(CPU)
    known = remembered(default_rates())
    for teacher in load_teachers(task[1]):
        assert teacher_key(teacher, machine) in known


def test_what_a_busy_machine_measured_is_marked_and_measured_again(
    task, tmp_path, rates, capsys, monkeypatch
):
    monkeypatch.setattr(planrates.OtherProcesses, "are_busy", lambda *_given: True)
    planned(task, tmp_path)
    said = capsys.readouterr().out
    assert "WARNING: other processes used the processors while 3 of the rates were" in said
    assert all(rate.busy for rate in remembered(rates).values())
    monkeypatch.setattr(planrates.OtherProcesses, "are_busy", lambda *_given: False)
    planned(task, tmp_path)
    said = capsys.readouterr().out
    assert "3 measured again, since the machine was busy the time before" in said
    assert "WARNING" not in said
    assert not any(rate.busy for rate in remembered(rates).values())
    planned(task, tmp_path)
    assert "rates: 0 measured now, 3 remembered" in capsys.readouterr().out


def test_where_the_machine_was_busy_and_there_is_time_it_is_measured_twice(monkeypatch):
    found = iter([True, False])
    monkeypatch.setattr(planrates.OtherProcesses, "are_busy", lambda *_given: next(found))
    made = iter([2.0, 1.0])
    kept = planrates.timed_quietly(lambda _until: Rate((8,), (next(made),), 0, 0), 1e12, CPU)
    assert (kept.row_s_K, kept.busy) == ((1.0,), False)


def test_processes_that_take_the_processors_are_in_the_way():
    """All processors are taken by others, and one more thread wants to work."""
    cores = os.cpu_count() or 1
    others = planrates.OtherProcesses()
    loads = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2 * cores)]
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        sum(range(10_000))
    for load in loads:
        load.wait()
    assert others.are_busy(CPU)
    assert not planrates.OtherProcesses().are_busy(CPU)  # too short to tell


SPIN = "import time; end = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"


@pytest.mark.slow
def test_the_memory_of_a_plan_is_that_of_the_run(task, tmp_path, rates, cli):
    data, teachers = task
    given = words(data, teachers, tmp_path / "run", teacher_validation="off", max_steps=4)
    given = [word for word in given if not word.startswith("student.shape=")]
    given += ["student.shape=L6-H256-A8", "global_batch_size=32", "micro_batch_size=32"]
    report = tmp_path / "plan.json"
    for command in (("plan", "--json", report), ("distill",)):
        done = cli(*command, *given, launched=True)
        assert done.returncode == 0, done.stderr
    one = json.loads(report.read_text())["placements"][0]
    told = one["student_bytes"] + one["teacher_bytes"] + one["other_bytes"]
    summary = json.loads((tmp_path / "run" / "run_summary.json").read_text())
    assert told == pytest.approx(summary["peak_memory_bytes"][0], rel=0.2)


@pytest.mark.slow
def test_a_run_s_peak_is_its_own_whatever_started_it():
    """The system's account of a process begins with the memory of the one that started it."""
    ballast = np.ones(120_000_000)
    ask = "import torch; from sead_dist.runs.results import peak_memory; "
    ask += "print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < ballast.nbytes
