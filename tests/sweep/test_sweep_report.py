"""report.md says what report.json holds, and no more than the runs allow."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from sead_dist.data.kinds import Classification
from sead_dist.data.significance import Difference, resampled_scores
from sead_dist.sweep.report import arms, markdown, write_sweep_report
from sead_dist.sweep.results import Runs, add_holm, mean_over_tasks, shared_tasks, versus


def cell(task, method, mean, **more):
    empty = dict.fromkeys(("spread", "difference", "interval", "p", "beyond_chance"))
    cost = {"seconds": 12.34, "teacher_forwards": 40, "steps": 7, "own_steps": None}
    cost |= {"labelled_rows": 30, "unlabelled_rows": 0 if method == "finetune" else 20}
    return {"task": task, "method": method, "scores": [mean], "mean": mean, **empty, **cost, **more}


def compared(difference, low, high, beyond):
    told = {"difference": difference, "interval": [low, high], "p": 0.0312}
    return {"spread": 0.0123, "beyond_chance": beyond, **told}


def report(**changes):
    made = {"sead_dist": "1", "torch": "2", "transformers": "5", "device": "a CPU"}
    mean = {"method": "mean", "score": 0.8, "tasks": 1}
    mean |= dict.fromkeys(("difference", "interval", "beyond_chance"))
    return {
        "title": "2 tasks, 2 methods, 2 seeds",
        "command": ["sead-dist", "sweep", "tasks=[cola,rte]"],
        "made_with": made,
        "ranks": 2,
        "seeds": [0, 1],
        "methods": ["finetune", "mean"],
        "reference": "finetune",
        "arms": [],
        "equal_steps": True,
        "selected_on_dev": False,
        "tasks": [{"name": "cola", "metric": "mcc"}, {"name": "rte", "metric": "accuracy"}],
        "mean_tasks": ["cola"],
        "cells": [
            cell("cola", "finetune", 0.7, spread=0.02),
            cell("cola", "mean", 0.8, **compared(0.1, 0.05, 0.15, beyond=True)),
            cell("rte", "finetune", 0.6, **compared(0.01, -0.05, 0.07, beyond=False)),
        ],
        "means": [{**mean, "method": "finetune", "score": 0.7}, mean],
        "ceilings": [{"task": "cola", "who": "teacher-0", "score": 0.85}],
        "published": [
            {"task": "rte", "who": "A", "metric": "accuracy", "score": 0.7, "note": "on dev"}
        ],
        "failed": [],
        "missing": [],
        "not_applicable": [],
        **changes,
    }


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_means_spreads_and_marks_are_those_of_the_cells():
    text = markdown(report())
    assert "| cola | mcc | 0.7000 ± 0.0200 | 0.8000 ± 0.0123\\* |" in rows(text)
    # no difference where the interval holds 0, nothing where there is no run
    assert "| rte | accuracy | 0.6000 ± 0.0123 | - |" in rows(text)
    # means are over the tasks that every method has, which are named
    assert "| mean |  | 0.7000 | 0.8000 |" in rows(text)
    assert "have a score of every method: cola. Left out: rte." in text
    assert "| cola | mean | +0.1000 | +0.0500 to +0.1500 | 0.031 | - |" in rows(text)
    assert "| rte | A | accuracy | 0.7000 | on dev |" in rows(text)
    assert "| cola | teacher-0 | 0.8500 |" in rows(text)
    assert "| cola | finetune | 30 | 0 | 7 | 12.3 | 40 |" in rows(text)
    assert "| cola | mean | 30 | 20 | 7 | 12.3 | 40 |" in rows(text)


def test_a_difference_has_its_p_alone_and_its_p_among_all():
    alone = compared(0.1, 0.05, 0.15, beyond=True)
    text = markdown(report(cells=[cell("cola", "mean", 0.8, **alone, p_holm=0.0624)]))
    assert "| task | method | difference | 95% interval | p | p, Holm |" in rows(text)
    assert "| cola | mean | +0.1000 | +0.0500 to +0.1500 | 0.031 | 0.062 |" in rows(text)
    assert "p, Holm: corrected for all comparisons of the tasks together" in text


def test_the_share_of_the_gap_is_told_or_that_there_is_none():
    kept = {"task": "cola", "method": "mean", "over": "finetune", "ensemble": 0.8, "best": 0.69}
    text = markdown(report(shares=[{**kept, "of_ensemble": 1.25, "of_best": None}]))
    assert "| cola | mean | finetune | 0.8000 | 125% | 0.6900 | no gap |" in rows(text)
    assert "Above 100% the student is better than the ensemble or the teacher" in text
    assert "Share of the gap" not in markdown(report())


def test_the_report_says_whether_methods_took_as_many_steps():
    assert "as the longest one (equal_steps=on)." in markdown(report())
    lengthened = [cell("cola", "finetune", 0.7, own_steps=4), cell("cola", "mean", 0.8)]
    text = markdown(report(cells=lengthened))
    assert "(equal_steps=on). Fewer by their own rows: finetune on cola 4." in text
    assert "its own keys and rows give (equal_steps=off)" in markdown(report(equal_steps=False))


def test_what_is_not_there_has_no_heading():
    text = markdown(report(published=[], ceilings=[]))
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## Scores", "## Differences from finetune", "## Cost"]


def test_what_failed_is_missing_or_does_not_apply_is_told_with_its_reason():
    place = {"task": "rte", "method": "mean"}
    text = markdown(
        report(
            failed=[{**place, "seed": 1, "reason": "a | b"}],
            missing=[{**place, "seed": 0}],
            not_applicable=[{**place, "reason": "needs classes"}],
        )
    )
    assert "| rte | mean | 1 | a \\| b |" in rows(text)
    assert "## Not run yet" in text
    assert "| rte | mean | needs classes |" in rows(text)


def test_single_runs_are_called_so():
    text = markdown(report(seeds=[3], cells=[cell("cola", "finetune", 0.7)]))
    assert "Single runs" in text
    assert "±" not in text


def test_scores_that_were_selected_on_dev_are_marked():
    text = markdown(report(selected_on_dev=True))
    assert "(selected on dev)" in text.splitlines()[0]
    assert "nothing was selected" not in text
    assert "nothing was selected" in markdown(report())


def test_the_files_hold_the_report(tmp_path):
    write_sweep_report(report(), tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report()
    assert (tmp_path / "report" / "report.md").read_text() == markdown(report())


def test_means_are_over_the_tasks_of_every_method_that_has_a_score():
    cells = [
        cell("cola", "finetune", 0.5),
        cell("cola", "mean", 0.7),
        cell("cola", "sead", None),
        cell("rte", "finetune", 0.6),
        cell("rte", "sead", None),
    ]
    assert shared_tasks(cells) == ["cola"]
    differences = {"cola": Difference(0.2, (0.1, 0.3), 0.01, 0.0025, 20.0)}
    found = mean_over_tasks("mean", cells, differences, ["cola"])
    assert found["difference"] == 0.2
    assert (found["score"], found["tasks"], found["beyond_chance"]) == (0.7, 1, True)
    assert mean_over_tasks("finetune", cells, {}, ["cola"])["score"] == 0.5
    nothing = mean_over_tasks("sead", cells, {}, ["cola"])
    assert (nothing["score"], nothing["beyond_chance"]) == (None, None)
    assert shared_tasks([cell("cola", "finetune", None)]) == []


def test_the_p_of_all_together_is_made_of_the_p_that_holds_at_every_level():
    cells = [cell(task, "mean", 0.7) for task in ("cola", "rte", "wic")]
    differences = {
        "cola": Difference(0.2, (0.1, 0.3), 0.001, 0.0025, 20.0, p_among=0.02),
        "rte": Difference(0.2, (0.1, 0.3), 0.001, 0.0025, 20.0, p_among=0.03),
    }
    add_holm(cells, {"mean": differences})
    assert [of["p_holm"] for of in cells[:2]] == pytest.approx([0.04, 0.04])
    assert "p_holm" not in cells[2]


def test_the_keys_of_an_arm_stand_as_they_are_typed():
    keys = {"max_steps": None, "augment": {"gold_labels": True}, "final_checkpoint": "auto"}
    (row,) = arms({"arms": [{"name": "long", "method": "finetune", "keys": keys}]})
    typed = "max_steps=null, augment={gold_labels: true}, final_checkpoint=auto"
    assert row["keys of its own"] == typed


class Least(Classification):
    """A kind whose metric is the least recall of the classes; it needs rows of all classes."""

    @staticmethod
    def compute(names, logits_BC, inputs):
        shares = []
        for of in range(logits_BC.shape[1]):
            right_B = logits_BC[inputs.labels_B == of].argmax(axis=1) == of
            if not len(right_B):
                raise ValueError("no rows of a class")
            shares.append(float(right_B.mean()))
        return {name: min(shares) for name in names}


def test_draws_on_which_a_metric_is_undefined_do_not_count():
    """Four rows of one class among thirty: one draw in a hundred has none of them."""
    rows = SimpleNamespace(labels_B=np.arange(30) // 26, groups_B=None, answers=None)

    def runs(method, wrong):
        said_SB = [np.where(np.arange(30) % 5 < n, 1 - rows.labels_B, rows.labels_B) for n in wrong]
        logits_SBC = [np.eye(2, dtype=np.float32)[said_B] for said_B in said_SB]
        scores = {n: Least.compute(["r"], of, rows)["r"] for n, of in enumerate(logits_SBC)}
        return Runs("t", method, scores, {}, resampled_scores("r", Least(), logits_SBC, rows, 0))

    mine, theirs = runs("mean", [1, 1, 0, 0]), runs("finetune", [2, 1, 2, 1])
    assert 0 < np.isnan(mine.resampled_SR).any(axis=0).mean() < 0.05
    found = versus(mine, theirs, 30)
    low, high = found.interval
    assert low < found.value < high
    assert 0 < found.p < 1
    # a run without a score has no place in the comparison
    mine.scores[0] = math.nan
    assert versus(mine, theirs, 30).value > 0
    mine.scores[1] = math.nan
    assert versus(mine, theirs, 30) is None
