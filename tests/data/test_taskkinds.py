"""Every decision that depends on the kind of a task is that kind's own; a new kind registers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small import ALONE, words, write_task
from source_text import comparisons

from sead_dist.config.load import load_config
from sead_dist.config.registered import ADDED
from sead_dist.data.examples import build_examples
from sead_dist.data.kinds import KINDS, Classification, register_task_kind
from sead_dist.data.tasks import TASKS, compute_metrics, constant_score, load_task
from sead_dist.errors import UserError
from sead_dist.models.sequence_classifier import align_classes
from sead_dist.objectives.losses import (
    HARD_LOSSES,
    cross_entropy,
    hard_loss,
    register_hard_loss,
)
from sead_dist.runs.distillation import distill
from sead_dist.training.evaluation import mean_loss

GRADES = 'name: mine\nkind: graded\ntext_a: "{text}"\nlabels: [bad, fair, good]\n'


class Graded(Classification):
    """Classes with an order: the answer is the mean grade, rounded."""

    name = "graded"
    soft_losses = ("mse",)

    def answers(self, task, logits_BC):
        p_BC = torch.from_numpy(logits_BC).softmax(1)
        grades_B = (p_BC * torch.arange(len(task.labels))).sum(1).round().int()
        return {"grade": grades_B.tolist()}


@pytest.fixture
def graded():
    register_task_kind(Graded())
    yield
    del KINDS["graded"], ADDED.owners["kind of task"]["graded"]


@pytest.fixture
def doubled(tmp_path):
    """A run without teachers, of a kind of task with a hard loss of its own: twice the usual one.
    Yields the kind, and a function that runs and returns what is logged of its steps."""

    class Doubled(Classification):
        name = "doubled"
        hard_loss = "twice"

    kind = Doubled()
    register_task_kind(kind)
    register_hard_loss(
        "twice", lambda student_BC, labels_B: 2 * cross_entropy(student_BC, labels_B)
    )
    data = write_task(tmp_path / "data")
    fields = yaml.safe_load((data / "task.yaml").read_text())

    def train_line(name: str, kind: str) -> dict[str, float]:
        (data / f"{name}.yaml").write_text(yaml.safe_dump({**fields, "kind": kind}))
        keys = {"task": data / f"{name}.yaml", "method": "finetune"}
        config = load_config(words(data, [], tmp_path / name, **keys))
        distill(config, ALONE, show_table=False)
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[1])

    yield kind, train_line
    del KINDS["doubled"], ADDED.owners["kind of task"]["doubled"]
    del HARD_LOSSES["twice"], ADDED.owners["hard loss"]["twice"]


def write(folder: Path, text: str) -> Path:
    path = folder / "task.yaml"
    path.write_text(text)
    return path


def test_a_registered_kind_is_read_aligned_scored_and_answers_in_its_own_columns(graded, tmp_path):
    task = load_task(write(tmp_path, GRADES))
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": 0}]
    examples = build_examples(task, rows, "train")
    assert examples.labels_B.tolist() == [2, 0]
    assert align_classes(task, "model", ["good", "bad", "fair"], None) == [1, 2, 0]
    logits_BC = np.array([[9.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
    assert task.task_kind.answers(task, logits_BC) == {"grade": [1, 0]}
    assert compute_metrics(task, logits_BC, examples) == {"accuracy": 0.5}
    assert constant_score(task, examples) == 0.5


def test_the_kind_says_whether_labels_are_floats():
    floats = {name: KINDS[name].has_float_labels for name in ("classification", "choice")}
    assert floats == {"classification": False, "choice": False}
    assert KINDS["regression"].has_float_labels
    # whole numbers as scores are scores: -1 is one
    scores_B1 = np.array([[0.0], [2.0]], np.float32)
    assert mean_loss(KINDS["regression"], scores_B1, np.array([-1, 2])) == 0.5
    assert mean_loss(KINDS["regression"], scores_B1, np.array([np.nan, 2.0])) == 0.0


def test_a_kind_that_is_not_registered_is_refused_with_those_that_are(tmp_path):
    allowed = "kind is 'graded': input should be 'classification', 'regression' or 'choice'$"
    with pytest.raises(UserError, match=allowed):
        load_task(write(tmp_path, GRADES))
    with pytest.raises(UserError, match="kind is \\['choice'\\]: input should be"):
        load_task(write(tmp_path, GRADES.replace("graded", "[choice]")))


def test_a_name_that_is_taken_is_refused(graded):
    with pytest.raises(UserError, match="'graded' exists already"):
        register_task_kind(Graded())


@pytest.mark.parametrize(
    ("attribute", "given", "says"),
    [
        ("metric_names", ("near",), "is of type tuple (('near',)); give a function: reader -> "),
        ("compute", 3, "is of type int (3); give a function: (names, logits_BC, inputs) -> "),
        ("constant", 0.5, "is of type float (0.5); give a function: (name, classes, inputs) -> "),
        ("soft_losses", "kl", "is of type str ('kl'); give a tuple of names of losses"),
        ("default_metrics", None, "is of type NoneType (None); give a tuple of names of metrics"),
    ],
)
def test_an_attribute_of_another_type_is_rejected_when_the_kind_registers(attribute, given, says):
    kind = Graded()
    setattr(kind, attribute, given)
    with pytest.raises(UserError) as told:
        register_task_kind(kind)
    assert str(told.value).startswith(f"{attribute} of the kind of task 'graded' {says}")
    assert "graded" not in KINDS
    assert "graded" not in ADDED.owners["kind of task"]


def test_a_kind_of_task_has_a_hard_loss_of_its_own(doubled):
    _, train_line = doubled
    own, usual = train_line("own", "doubled"), train_line("usual", "classification")
    # steps of AdamW do not depend on the scale of the loss
    assert own["loss"] == pytest.approx(2 * usual["loss"], rel=1e-3)


def test_a_hard_loss_that_is_not_registered_ends_before_the_run(doubled, tmp_path):
    kind, train_line = doubled
    kind.hard_loss = "thrice"
    says = (
        "^hard_loss of the kind of task doubled names 'thrice'; expected one of cross_entropy, "
        "squared_error, twice; correct its plugin, or register the loss there$"
    )
    with pytest.raises(UserError, match=says):
        train_line("own", "doubled")
    assert not (tmp_path / "own").exists()


def test_a_hard_loss_of_another_shape_is_not_broadcast(doubled, monkeypatch):
    _, train_line = doubled
    monkeypatch.setitem(HARD_LOSSES, "twice", lambda student_BC, labels_B: student_BC[:, :1])
    with pytest.raises(UserError, match=r"^hard_loss=twice gave the shape \(\d+, 1\) for \d+ rows"):
        train_line("own", "doubled")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_says_all_that_is_asked_of_it(name):
    kind = KINDS[name]
    task = next(task for task in TASKS.values() if task.task_kind is kind)
    classes = task.num_labels
    assert kind.has_classes == (classes > 1)
    assert len(kind.outputs(task)) == (classes if kind.head_of_labels else 1)
    assert kind.hard_loss in HARD_LOSSES
    assert set(kind.default_metrics) <= set(kind.metric_names("plain"))
    assert all(len(values) == 3 for values in kind.answers(task, np.eye(3, classes)).values())
    unlabelled_B = torch.from_numpy(np.array([kind.unlabelled], kind.label_type))
    assert hard_loss(torch.ones(1, classes), unlabelled_B, kind.hard_loss).tolist() == [0.0]


def test_no_other_file_asks_for_the_name_of_a_kind():
    asking = list(comparisons(tuple(KINDS)))
    assert asking == []
