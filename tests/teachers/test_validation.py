"""The validation: invariant 5. N teachers, B rows, C classes."""

from dataclasses import replace

import numpy as np
import pytest
from small import LABELS, example_set, load_teachers, save_teacher, sentences

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.data.examples import build_examples
from sead_dist.data.order import make_split
from sead_dist.data.tasks import TASKS, TaskSpec
from sead_dist.errors import UserError
from sead_dist.teachers.validation import better_order, describe, require_passed, validate

TASK = TaskSpec(name="small", kind="classification", text_a="{sentence}", labels=LABELS)
# 12 rows, 8 of them positive: the best constant answer is right 2/3 of the time
GOLD = np.array([1, 1, 0] * 4)
SPLIT = make_split(
    example_set(sentences(12), [LABELS[y] for y in GOLD], "selection"), grammar_tokenizer(), 32
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teachers([save_teacher(tmp_path_factory.mktemp("t") / "one")])[0]


def answers(right: int) -> np.ndarray:
    """logits_BC with the first `right` rows right and the others wrong."""
    said_B = np.where(np.arange(12) < right, GOLD, 1 - GOLD)
    return np.eye(2, dtype=np.float32)[said_B]


def validation(teacher, logits_BC, task=TASK, dev_texts=0):
    return validate(task, [teacher], logits_BC[None], SPLIT, dev_texts)[0]


def test_invariant_05_no_better_than_a_constant_answer_is_no_teacher(teacher):
    assert validation(teacher, answers(9)).passed
    at_constant = validation(teacher, answers(8))
    assert at_constant.score == at_constant.constant_score == pytest.approx(2 / 3)
    assert not at_constant.passed
    with pytest.raises(UserError, match=r"teacher one failed its validation: accuracy 0\.6667"):
        require_passed(TASK, [at_constant], [teacher])
    require_passed(TASK, [validation(teacher, answers(9))], [teacher])


def test_invariant_05_an_inverted_teacher_is_told_the_better_order(teacher):
    inverted = validation(teacher, answers(0))
    assert inverted.better_order == ["positive", "negative"]
    line = f"{{path: {teacher.entry.path}, labels: [positive, negative]}}"
    with pytest.raises(UserError) as caught:
        require_passed(TASK, [inverted], [teacher])
    assert line in str(caught.value)
    assert "teacher_validation=off" in str(caught.value)
    assert line in describe(inverted, teacher, 12)
    # the line that is suggested is the order of the model's own columns
    turned = replace(teacher, order_C=[1, 0])
    assert "labels: [negative, positive]" in describe(inverted, turned, 12)


def test_a_good_teacher_is_suggested_nothing(teacher):
    assert validation(teacher, answers(12)).better_order is None
    assert "better" not in describe(validation(teacher, answers(12)), teacher, 12)


def test_the_better_order_of_three_classes():
    task = TASKS["cb"]
    gold = np.array([0, 1, 2] * 4)
    rows = [
        {"premise": t, "hypothesis": "so", "label": task.labels[y]}
        for t, y in zip(sentences(12), gold, strict=True)
    ]
    split = make_split(build_examples(task, rows, "selection"), grammar_tokenizer(), 32)
    # the model's column c speaks of class (c + 1) % 3
    logits_BC = np.eye(3, dtype=np.float32)[(gold - 1) % 3]
    assert better_order(task, logits_BC, split.examples, 0.0) == [
        task.labels[1],
        task.labels[2],
        task.labels[0],
    ]


def test_invariant_05_wnli_is_only_told(teacher):
    wnli = replace(TASK, name="wnli")
    failed = validation(teacher, answers(4), wnli)
    assert not failed.passed
    require_passed(wnli, [failed], [teacher])
    assert "accuracy 0.3333 (majority baseline 0.6667)" in describe(failed, teacher, 12)


def test_invariant_05_a_correlation_must_be_above_zero(teacher):
    cola = replace(TASK, metrics=("matthews_correlation",))
    always = np.tile(np.float32([0, 1]), (12, 1))
    assert validation(teacher, always, cola).score == 0.0
    assert not validation(teacher, always, cola).passed
    assert validation(teacher, answers(10), cola).passed


def test_truncated_rows_and_known_dev_texts_are_told(teacher):
    short = replace(teacher, inputs=replace(teacher.inputs, max_length=8))
    found = validation(short, answers(12), dev_texts=3)
    lengths = SPLIT.tokens.lengths_B()
    assert found.truncated_rows == int((lengths > 8).sum()) > 0
    said = describe(found, short, 12)
    assert f"{found.truncated_rows} of 12 rows truncated to 8 tokens" in said
    assert "3 dev texts occur in the training text" in said


def test_invariant_04_a_regression_teacher_on_another_scale_is_refused(teacher):
    stsb = TASKS["stsb"]
    gold = np.array([0.0, 1.5, 3.0, 5.0] * 3)
    rows = [
        {"sentence1": text, "sentence2": "so", "label": score}
        for text, score in zip(sentences(12), gold, strict=True)
    ]
    split = make_split(build_examples(stsb, rows, "selection"), grammar_tokenizer(), 32)
    right_BC = (0.8 * gold + 0.6)[:, None].astype(np.float32)
    (right, scaled) = (
        validate(stsb, [teacher], logits_BC[None], split, 0)[0]
        for logits_BC in (right_BC, right_BC / 5)
    )
    # correlation sees no difference; a student would learn scores from 0.12 to 0.92
    assert scaled.score == pytest.approx(right.score) == pytest.approx(1.0)
    require_passed(stsb, [right], [teacher])
    with pytest.raises(
        UserError, match=r"run from 0\.12 to 0\.92 .* of stsb from 0 to 5"
    ) as caught:
        require_passed(stsb, [scaled], [teacher])
    assert "teacher_validation=off" in str(caught.value)
