"""What a run has before it, and how long that takes at known rates.

N teachers, S steps, M micro-batches, R rows of a request.
"""

from dataclasses import replace

import numpy as np
import pytest
from small import (
    TASK,
    config,
    example_set,
    load_teachers,
    make_source,
    model_inputs,
    save_teacher,
    sentences,
)

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.data.order import BatchStream, make_split
from sead_dist.data.splits import RunExamples
from sead_dist.planning.workload import (
    Work,
    batch_shapes,
    bound,
    make_work,
    needed_share,
    spread,
    teachers_seconds,
    training_seconds,
)
from sead_dist.store.store import StoreFolder
from sead_dist.teachers.base import Request
from sead_dist.teachers.placement import share_rows
from sead_dist.teachers.rates import Rate

RATE = Rate((16, 64), (0.1, 0.4), batch_s=1.0, once_s=5.0)


def part(name, count, seed):
    return example_set(sentences(count, seed), split=name)


EXAMPLES = RunExamples(
    part("train", 50, 0), part("selection", 10, 1), {"validation": part("validation", 20, 2)}, 0, 0
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return load_teachers([save_teacher(root / "a"), save_teacher(root / "b", seed=1)])


def work_of(teachers, store=None, done=0, **changes):
    given = config(**{"max_length": 32, "num_train_epochs": 2, **changes})
    return make_work(given, TASK.name, EXAMPLES, model_inputs(), teachers, store, done)


def test_the_teachers_have_every_row_of_every_split_once(teachers):
    work = work_of(teachers)
    assert work.passes == 2 * (50 + 10 + 20)
    assert work.steps == 2 * 7
    assert work.examples == 2 * 50
    # requests are of at most prefetch_rows rows
    assert [len(rows) for rows in work_of(teachers, prefetch_rows=20).requests_N[0][:3]] == [
        17,
        17,
        16,
    ]


def test_a_resumed_run_and_a_short_one_have_fewer_steps(teachers):
    assert work_of(teachers, done=4).steps == 10
    short = work_of(teachers, max_steps=3)
    assert short.steps == 3
    assert short.passes == 2 * (round(50 * 3 / 7) + 10 + 20)


def test_what_the_store_holds_is_no_work(teachers, tmp_path):
    source = make_source(teachers[:1], tmp_path / "st", tmp_path / "run")
    split = make_split(EXAMPLES.train, grammar_tokenizer(), 32)
    asked = np.arange(30)
    source.submit(Request(split, asked, None, "a test")).result()
    source.close()
    work = work_of(teachers, StoreFolder(tmp_path / "st"))
    assert [sum(map(len, requests)) for requests in work.requests_N] == [80 - 30, 80]
    # of a run that asks for 21 of the rows they are the first that it finds
    short = work_of(teachers, StoreFolder(tmp_path / "st"), max_steps=3)
    assert [sum(map(len, requests)) for requests in short.requests_N] == [30, 21 + 30]


def test_batches_are_those_that_a_pass_makes(teachers, tmp_path, monkeypatch):
    split = make_split(EXAMPLES.train, grammar_tokenizer(), 32)
    source = make_source(teachers[:1], tmp_path / "st", tmp_path / "run")
    model = source._load(0, split)
    seen = []

    def counting(*, input_ids, **inputs):
        seen.append((input_ids.shape[1], input_ids.shape[0]))
        return type(model).forward(model, input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", counting)
    source.submit(Request(split, np.arange(len(split.ids_U2)), None, "a test")).result()
    source.close()
    lengths_P, rows_P = batch_shapes(teachers[0], work_of(teachers).requests_N[0][:1], "cpu")
    assert [length for length, _ in seen] == lengths_P
    # a batch without padding has one row more, the guard
    more = [rows - planned for (_, rows), planned in zip(seen, rows_P, strict=True)]
    assert set(more) <= {0, 1}


def test_micro_batches_are_as_long_as_those_of_the_run(teachers):
    split = make_split(EXAMPLES.train, grammar_tokenizer(), 32)
    stream = BatchStream(split, 0, 8, 2, 2, None, 0, 1)
    real = [
        batch.inputs["input_ids"].shape[1]
        for number in range(stream.steps_per_epoch)
        for batch in stream.step(number).batches
    ]
    planned = work_of(teachers).lengths_SM
    assert planned.shape == (7, 4)
    assert abs(planned.mean() - np.mean(real)) < 1


def test_asked_share_follows_the_method(teachers):
    def shares(**changes):
        return needed_share(config(**changes), teachers, EXAMPLES.train, 2)

    assert shares() == [1.0, 1.0]
    assert shares(ensemble="random") == [0.75, 0.75]
    assert shares(ensemble="single", teacher="b") == [0.0, 1.0]
    routed = replace(EXAMPLES.train, routes_B=np.array([0] * 40 + [1] * 10))
    assert needed_share(config(ensemble="routed"), teachers, routed, 2) == [0.8, 0.2]
    free = [
        teachers[0],
        replace(teachers[1], entry=teachers[1].entry.model_copy(update={"weight": 0})),
    ]
    assert needed_share(config(ensemble="fixed"), free, EXAMPLES.train, 2) == [1.0, 0.0]


def test_lengths_that_stand_for_more_rows_are_distributed_alike():
    few = np.array([3, 9, 5])
    assert spread(few, 3).tolist() == [3, 5, 9]
    assert np.bincount(spread(few, 300))[[3, 5, 9]].tolist() == [100, 100, 100]
    assert len(spread(np.zeros(0, int), 0)) == 0


def plain(rows_N, steps=(), micro_batch=2):
    """Work of rows of 16 tokens, and of steps whose micro-batches have so many."""
    lengths_SM = np.array(steps or [[16]])
    requests_N = [[np.full(rows, 16)] for rows in rows_N]
    return Work(
        requests_N, lengths_SM, np.full_like(lengths_SM, micro_batch), len(lengths_SM), 100, 1
    )


def test_in_a_step_all_ranks_wait_for_the_longest_micro_batch():
    work = plain([], [[16, 64, 16], [16, 16, 16]])
    short, long = 1.0 + 2 * 0.1, 1.0 + 2 * 0.4
    alone = 5 * short + long + 2 * 5.0
    assert training_seconds(work, RATE, 1) == pytest.approx(alone)
    # two turns in each step: the second of one rank alone
    assert training_seconds(work, RATE, 2) == pytest.approx(3 * short + long + 2 * 5.0)


def test_the_first_batch_of_a_shape_is_paid_for_once_in_a_run():
    slow = Rate((16, 64), (0.0, 0.0), batch_s=0.0, once_s=0.0, shape_s=1.0)
    work = plain([], [[16, 64, 16], [16, 16, 16]])
    assert training_seconds(work, slow, 1) == pytest.approx(2.0)
    assert training_seconds(replace(work, steps=10 * work.steps), slow, 1) == pytest.approx(2.0)
    assert training_seconds(replace(work, steps=0), slow, 1) == 0.0


def test_the_last_rank_decides_when_the_teachers_are_done(teachers):
    whole = [replace(teacher, cut=replace(teacher.cut, free_rows=2)) for teacher in teachers]
    work = plain([63, 63])
    rates_N = [RATE, RATE]
    one_s = 5.0 + 1.0 + 63 * 0.1
    own = np.eye(2)
    assert teachers_seconds(work, whole, rates_N, own, "cpu") == pytest.approx(one_s)
    on_one = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert teachers_seconds(work, whole, rates_N, on_one, "cpu") == pytest.approx(2 * one_s)
    # half of the rows of each, but both to load
    half = np.full((2, 2), 0.5)
    expected = 2 * (5.0 + 1.0 + 32 * 0.1)
    assert teachers_seconds(work, whole, rates_N, half, "cpu") == pytest.approx(expected)


def test_no_plan_is_quicker_than_the_bound(teachers):
    work = work_of(teachers)
    free = replace(RATE, once_s=0.0, shape_s=2.0)
    for size in (1, 2, 3):
        most = bound(work, teachers, [free, free], free, size, "cpu")
        for placement in ("colocated", "partitioned"):
            share_NW = share_rows(teachers, [placement] * 2, [1.0, 1.0], size, 1 << 40)
            seconds = teachers_seconds(work, teachers, [free, free], share_NW, "cpu")
            seconds += training_seconds(work, free, size)
            assert work.examples / seconds <= most * (1 + 1e-9)
