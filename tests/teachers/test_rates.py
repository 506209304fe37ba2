"""What a batch takes, by measured points; what is remembered; and what is scaled by operations."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from small import CPU, load_teachers, save_teacher
from transformers import AutoConfig

from sead_dist.teachers.rates import (
    Rate,
    Stopwatch,
    costs,
    default_rates,
    known_costs,
    lengths_to_measure,
    measure_batches,
    operations,
    remember,
    remembered,
    scaled_rate,
    teacher_key,
    this_machine,
)

RATE = Rate((16, 64), (0.1, 0.5), batch_s=1.0, once_s=3.0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    small = save_teacher(root / "a")
    return load_teachers(
        [small, save_teacher(root / "b", seed=1), f"{{path: {small}, dtype: bf16}}"]
    )


def test_a_row_takes_what_was_measured_and_between_the_points_a_straight_line():
    found = RATE.row_s([8, 16, 40, 64, 128])
    np.testing.assert_allclose(found, [0.05, 0.1, 0.3, 0.5, 1.0])


def test_batches_take_their_rows_and_a_fixed_part_each():
    assert RATE.seconds([16, 64], [10, 4]) == pytest.approx(2 * 1.0 + 10 * 0.1 + 4 * 0.5)
    assert RATE.seconds([], []) == 0.0
    # and something for the first batch of each shape
    shapes = replace(RATE, shape_s=7.0)
    more_s = shapes.seconds([16, 16, 16, 64], [4, 4, 8, 4]) - RATE.seconds(
        [16, 16, 16, 64], [4, 4, 8, 4]
    )
    assert more_s == pytest.approx(3 * 7.0)


def test_operations_are_the_known_ones_of_bert_base_and_shared_layers_count_as_they_run():
    # 22.3 GFLOP for 128 tokens
    assert operations(AutoConfig.for_model("bert"), 128) == pytest.approx(22.3e9, rel=0.01)
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    shared = AutoConfig.for_model("albert", embedding_size=32, num_hidden_layers=6, **fields)
    own = AutoConfig.for_model("bert", num_hidden_layers=6, **fields)
    assert operations(shared, 32) == pytest.approx(operations(own, 32), rel=0.2)


def test_a_scaled_rate_says_so_and_takes_as_many_times_longer():
    twice = scaled_rate(RATE, 2.0)
    assert twice.scaled
    assert not RATE.scaled
    np.testing.assert_allclose(twice.row_s([16, 64]), 2 * RATE.row_s([16, 64]))


def test_rates_are_remembered_beside_others_and_an_unusable_file_is_no_error(tmp_path):
    path = tmp_path / "deep" / "rates.json"
    assert remembered(path) == {}
    remember(path, {"one": RATE})
    remember(path, {"two": replace(RATE, batch_s=0.0)})
    assert remembered(path) == {"one": RATE, "two": replace(RATE, batch_s=0.0)}
    for text in ("{", "[]", '{"format": 1, "rates": {"one": {"lengths_K": 3}}}'):
        path.write_text(text)
        assert remembered(path) == {}
    remember(path, {"one": RATE})
    assert set(json.loads(path.read_text())["rates"]) == {"one"}


def test_a_rate_is_found_by_shape_numbers_and_machine_whatever_the_weights(teachers):
    machine = this_machine(CPU)
    one, same_shape, other_numbers = (teacher_key(t, machine) for t in teachers)
    assert one == same_shape
    assert one != other_numbers
    assert one != teacher_key(teachers[0], replace(machine, threads=machine.threads + 1))
    assert one != teacher_key(teachers[0], replace(machine, ranks=2))


def test_teachers_cost_their_seconds_where_all_are_known_else_their_parameters(
    teachers, tmp_path, monkeypatch
):
    parameters = [float(teacher.parameters) for teacher in teachers]
    assert costs(teachers, [RATE, RATE, None]) == parameters
    # at 32 tokens, the longest that these take
    expected = float(RATE.row_s(32))
    assert costs(teachers, [RATE, scaled_rate(RATE, 3), RATE])[1] == pytest.approx(3 * expected)
    monkeypatch.setenv("SEAD_DIST_RATES", str(tmp_path / "rates.json"))
    assert known_costs(teachers, CPU) == parameters
    machine = this_machine(CPU)
    remember(default_rates(), {teacher_key(teacher, machine): RATE for teacher in teachers})
    assert known_costs(teachers, CPU) == [pytest.approx(expected)] * 3


def test_lengths_are_measured_around_those_of_the_task():
    assert lengths_to_measure(np.array([5, 20]), 128) == [8, 16, 32]
    assert lengths_to_measure(np.array([20, 40]), 48) == [16, 32, 48]
    assert lengths_to_measure(np.array([600]), 2048) == [512]


class Pretended(Stopwatch):
    """A clock by which batches take what RATE says."""

    def time(self, do, work):
        left = super().time(lambda: None, work)
        return None if left is None else do()


def pretended(speed, until):
    timer = Pretended(CPU, until)
    timer.speed = speed
    return measure_batches(
        timer,
        [16, 64],
        lambda _length: 32,
        lambda rows, length: lambda: RATE.seconds([length], [rows]),
        float,
    )


def test_measured_points_are_taken_apart_into_batch_and_rows():
    lengths_K, row_s_K, batch_s = pretended(None, time.monotonic() + 60)
    assert lengths_K == (16, 64)
    assert batch_s == pytest.approx(RATE.batch_s)
    np.testing.assert_allclose(row_s_K, RATE.row_s_K)


def test_what_would_take_too_long_is_measured_with_fewer_rows_or_left_out():
    asked = []

    class Slow(Pretended):
        def time(self, do, work):
            asked.append(work)
            return do() if work <= 8 * 16 else None

    found = measure_batches(
        Slow(CPU, 0.0),
        [16, 64],
        lambda _length: 32,
        lambda rows, length: lambda: RATE.seconds([length], [rows]),
        float,
    )
    assert found[0] == (16,)
    np.testing.assert_allclose(found[1], [0.1])
    assert asked == [4 * 16, 32 * 16, 8 * 16, 32 * 64, 8 * 64, 4 * 64]


def test_a_hiccup_in_the_few_rows_does_not_make_rows_free():
    class Hiccup(Pretended):
        def time(self, do, work):
            return 1000.0 if work == 4 * 16 else do()

    lengths_K, row_s_K, batch_s = measure_batches(
        Hiccup(CPU, 0.0),
        [16, 64],
        lambda _length: 32,
        lambda rows, length: lambda: RATE.seconds([length], [rows]),
        float,
    )
    assert lengths_K == (16, 64)
    assert min(row_s_K) > 0
    assert batch_s < RATE.seconds([16], [32])
