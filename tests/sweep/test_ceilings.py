"""What teachers reach, and what students keep of the gap to the ensemble that taught them."""

from pathlib import Path

import pytest

from sead_dist.sweep.ceilings import TeacherScores, ceilings, read_teacher_scores, shares
from sead_dist.sweep.grid import make_grid

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "table" / "runs"
TEACHERS = {"a": 0.80, "b": 0.82}


def taught(method, kind, ensemble, seed=0, task="t", **more):
    return TeacherScores(task, method, seed, kind, kind == "single", TEACHERS, ensemble, **more)


def cell(method, *scores, task="t"):
    return {"task": task, "method": method, "scores": list(scores)}


def kept_grid(tasks):
    """Of the table's runs that are kept, seed 0."""
    given = ["student=l3", "encoders=[E,E,E]", f"output_dir={KEPT}", "data.path=data/{task}"]
    arms = ROOT / "benchmarks" / "sweeps" / "table.yaml"
    return make_grid([str(arms), f"tasks=[{','.join(tasks)}]", "seeds=[0]", *given])


def test_an_ensemble_is_shown_for_each_way_of_combining_where_they_differ():
    two = [taught("mean", "mean_logits", 0.84), taught("sead", "mean_probabilities", 0.85)]
    shown = {of["who"]: of["score"] for of in ceilings([*two, taught("single", "single", 0.82)])}
    teachers = {"a": 0.80, "b": 0.82}
    own = {"ensemble (mean_logits)": 0.84, "ensemble (mean_probabilities)": 0.85}
    assert shown == teachers | own
    # the order of the arms decides nothing but the rows' order
    assert {of["who"]: of["score"] for of in ceilings(two[::-1])} == shown
    alike = [taught("mean", "mean_logits", 0.84), taught("sead", "mean_probabilities", 0.84)]
    (row,) = [of for of in ceilings(alike) if of["who"] not in teachers]
    assert row["who"] == "ensemble (mean_logits, mean_probabilities)"
    # on all tasks alike, or rows of their own on each
    other = [taught(of.method, of.kind, 0.9, task="u") for of in alike]
    assert len([of for of in ceilings([*two, *other]) if of["who"] not in teachers]) == 4
    assert ceilings([]) == []


def test_a_student_is_held_against_the_ensemble_of_its_own_run():
    found = [taught("mean", "mean_logits", 0.84), taught("sead", "mean_probabilities", 0.88)]
    cells = [cell("finetune", 0.78), cell("mean", 0.81), cell("sead", 0.83)]
    mean, sead = shares(found, cells, [0])
    assert (mean["method"], mean["over"], mean["ensemble"]) == ("mean", "finetune", 0.84)
    assert mean["of_ensemble"] == pytest.approx(0.03 / 0.06)
    assert sead["of_ensemble"] == pytest.approx(0.05 / 0.10)
    # the best of the teachers is passed
    assert (sead["best"], sead["of_best"]) == (0.82, pytest.approx(0.05 / 0.04))


def test_a_share_is_over_the_seeds_of_both_and_undefined_without_a_gap():
    found = [taught("sead", "mean_probabilities", 0.84, seed) for seed in (0, 1, 2)]
    cells = [cell("finetune", 0.78, 0.80, None), cell("control", 0.83, None, None)]
    cells.append(cell("sead", 0.81, 0.83, 0.1))
    fine, control = shares(found, cells, [0, 1, 2])
    assert fine["of_ensemble"] == pytest.approx(0.03 / 0.05)
    assert control["of_ensemble"] == pytest.approx(-2)
    assert control["of_best"] is None
    # another task's arm is none to compare with, nor is one without a run
    assert shares(found, [cell("finetune", 0.1, 0.1, 0.1, task="u"), cells[2]], [0, 1, 2]) == []


def test_a_run_that_ends_while_the_scores_are_read_has_no_share_yet():
    found = [taught("sead", "mean_probabilities", 0.84, seed) for seed in (0, 1)]
    cells = [cell("finetune", 0.78, 0.80), cell("sead", 0.81, None)]
    (row,) = shares(found, cells, [0, 1])
    assert row["of_ensemble"] == pytest.approx(0.03 / 0.06)
    assert shares(found, [cells[0], cell("sead", None, None)], [0, 1]) == []
    assert shares(found, cells[:1], [0, 1]) == []


def test_an_ensemble_of_some_rows_alone_has_no_share():
    part = taught("sead", "mean_probabilities", 0.84, whole=False)
    assert shares([part], [cell("finetune", 0.78), cell("sead", 0.81)], [0]) == []
    assert len(ceilings([part])) == 3


def test_the_kept_runs_of_the_table_have_an_ensemble_for_mean_and_one_for_sead():
    grid = kept_grid(["sst2", "stsb"])
    found = [
        *read_teacher_scores(grid, "sst2", "validation", "accuracy"),
        *read_teacher_scores(grid, "stsb", "validation", "pearson"),
    ]
    assert {of.method for of in found} == {"single", "mean", "sead"}
    shown = {(of["task"], of["who"]): round(of["score"], 4) for of in ceilings(found)}
    assert shown["sst2", "ensemble (mean_logits)"] == 0.8326
    assert shown["sst2", "ensemble (mean_probabilities)"] == 0.8314
    assert shown["stsb", "ensemble (mean_logits)"] == 0.8349
    assert shown["sst2", "teacher-2"] == 0.8257
