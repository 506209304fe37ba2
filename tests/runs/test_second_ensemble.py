"""Fitted weights beside equal ones, over every built-in task: a figure, or nothing, never an error.

Shapes: N teachers, B rows, C classes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rows import load_split

from sead_dist.data.examples import ExampleSet, build_examples, has_label, subset
from sead_dist.data.tasks import TASKS, TaskSpec
from sead_dist.runs.baseline import second_ensemble

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ["a", "b"]


def many(task: TaskSpec, rows: int) -> ExampleSet:
    """The task's fixture rows again and again, each time in groups of their own."""
    folder = FIXTURES / task.name
    read = load_split(task, "train", folder, None, None, False)
    examples = build_examples(task, read, "selection")
    rows_B = np.arange(rows) % len(examples)
    found = subset(examples, rows_B)
    if found.groups_B is None:
        return found
    return replace(found, groups_B=found.groups_B + 1000 * (np.arange(rows) // len(examples)))


def logits_of(task: TaskSpec, examples: ExampleSet) -> np.ndarray:
    """logits_NBC of a teacher that mostly says the gold label, and of one that says anything."""
    chance, labels_B = np.random.default_rng(0), examples.labels_B
    logits_NBC = chance.normal(size=(2, len(labels_B), task.num_labels)).astype(np.float32)
    known = np.flatnonzero(has_label(labels_B))
    if task.task_kind.has_classes:
        logits_NBC[0, known, labels_B[known]] += 2
    else:
        logits_NBC[0, known, 0] += labels_B[known]
    return logits_NBC


@pytest.mark.parametrize("name", TASKS)
def test_every_built_in_task_has_both_figures(name):
    task = TASKS[name]
    examples = many(task, 240)
    found = second_ensemble(task, examples, NAMES, logits_of(task, examples))
    assert found.rows == 240
    assert found.fitted >= found.equal
    assert found.gap == pytest.approx(found.fitted - found.equal)
    assert np.isfinite([found.equal, found.fitted, *found.interval]).all()
    assert found.weights["a"] > found.weights["b"]


@pytest.mark.parametrize("name", TASKS)
def test_odd_teachers_and_rows_have_a_figure_or_none(name):
    task = TASKS[name]
    examples = many(task, 240)
    logits_NBC = logits_of(task, examples)
    # the same teacher twice, and one that says the same of every row
    for odd_NBC in (logits_NBC[[0, 0]], np.stack([logits_NBC[0], np.ones_like(logits_NBC[1])])):
        assert second_ensemble(task, examples, NAMES, odd_NBC).rows == 240
    # rows that one does not answer, rows without gold labels
    some_NBC = logits_NBC.copy()
    some_NBC[1, ::8] = np.nan
    assert second_ensemble(task, examples, NAMES, some_NBC).rows == 210
    labels_B = examples.labels_B.copy()
    labels_B[::8] = task.task_kind.unlabelled
    unlabelled = replace(examples, labels_B=labels_B)
    assert second_ensemble(task, unlabelled, NAMES, logits_NBC).rows == 210
    # one class alone, or one score
    alike = replace(examples, labels_B=np.full_like(labels_B, examples.labels_B[0]))
    assert second_ensemble(task, alike, NAMES, logits_NBC).rows == 240
    # no row that all answer, no row with a label, few rows, one teacher
    nothing_NBC = np.full_like(logits_NBC, np.nan)
    assert second_ensemble(task, examples, NAMES, nothing_NBC) is None
    none = replace(examples, labels_B=np.full_like(labels_B, task.task_kind.unlabelled))
    assert second_ensemble(task, none, NAMES, logits_NBC) is None
    few = subset(examples, np.arange(3))
    assert second_ensemble(task, few, NAMES, logits_NBC[:, :3]) is None
    assert second_ensemble(task, examples, NAMES[:1], logits_NBC[:1]) is None
