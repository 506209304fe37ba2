"""Teachers in fewer bits against themselves in fp32. N teachers, R requested examples, C classes."""

import json

import numpy as np
import pytest
from small import load_teachers, make_source, save_teacher, small_split

from sead_dist.teachers.base import Request
from sead_dist.teachers.validation import MOST_ROWS, Drift, compare, describe_drift, measure_drift

SPLIT = small_split(40, split="selection")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("t") / "one")


def answers(entry, folder):
    source = make_source(load_teachers([entry]), folder / "st", folder / "run")
    request = Request(SPLIT, np.arange(40), None, "a test")
    logits_RC = source.submit(request).result().logits_NBC[0].numpy()
    source.close()
    return logits_RC


def test_the_largest_difference_and_the_changed_predictions():
    fp32_RC = np.array([[1.0, 0.0], [0.1, 0.0], [0.0, 2.0]], np.float32)
    moved_RC = fp32_RC + np.array([[0.0, 0.0], [0.0, 0.25], [0.5, 0.0]], np.float32)
    assert compare(moved_RC, fp32_RC) == Drift(3, 0.5, 1)
    assert compare(moved_RC[:, :1], fp32_RC[:, :1]) == Drift(3, 0.5, None)
    assert "by at most 0.5, 1 predictions changed (33.33%)" in describe_drift(Drift(3, 0.5, 1))
    assert "changed" not in describe_drift(Drift(3, 0.5, None))


def test_only_a_teacher_in_fewer_bits_is_compared_and_the_runs_counts_do_not_show_it(
    folder, tmp_path
):
    reduced = f"{{path: {folder}, dtype: bf16}}"
    expected = np.abs(answers(reduced, tmp_path / "bf16") - answers(folder, tmp_path / "fp32"))
    assert expected.max() > 1e-4
    source = make_source(load_teachers([folder, reduced]), tmp_path / "st", tmp_path / "run")
    source.submit(Request(SPLIT, np.arange(40), None, "a test")).result()
    whole, drift = measure_drift(source, SPLIT)
    assert whole is None
    assert drift is not None
    assert (drift.rows, drift.largest) == (40, pytest.approx(float(expected.max())))
    assert source.counts() == (80, 0)
    source.close()


def test_of_a_large_split_an_even_sample_is_compared(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sead_dist.teachers.validation.MOST_ROWS", 7)
    source = make_source(
        load_teachers([f"{{path: {folder}, dtype: bf16}}"]), tmp_path / "st", tmp_path / "run"
    )
    (drift,) = measure_drift(source, SPLIT)
    assert drift is not None
    assert drift.rows == 7 < MOST_ROWS
    assert source.touched["selection"].nonzero()[1].tolist() == [0, 6, 13, 19, 26, 32, 39]
    source.close()


def test_a_runs_drift_stands_in_the_validation_and_in_the_card(words, distil, tmp_path, teachers):
    given = words(
        tmp_path / "run", f"teachers=[{teachers[0]},{{path: {teachers[1]}, dtype: bf16}}]"
    )
    run = distil([*given, "teacher_validation=fp32", f"store={tmp_path / 'st'}"])
    whole, reduced = json.loads((run / "teacher_validation.json").read_text())
    assert whole["drift"] is None
    assert reduced["drift"]["rows"] > 20
    assert 0 < reduced["drift"]["largest"] < 1
    card = (run / "README.md").read_text()
    changed = f"{reduced['drift']['changed']} of {reduced['drift']['rows']}"
    assert f"| bf16 | {reduced['drift']['largest']:.4g} | {changed} |" in card
    assert "| fp32 | - | - |" in card
    assert "against fp32 on" in (run / "log.txt").read_text()
