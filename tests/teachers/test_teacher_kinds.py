"""Teachers that are not models of Transformers: what they are asked, and what is refused of them.

R text rows, M examples, C classes."""

from pathlib import Path

import numpy as np
import pytest
from small import ALONE, TASK, config, example_set, grammar_tokenizer, model_inputs

from sead_dist.config.registered import ADDED
from sead_dist.data.examples import build_examples
from sead_dist.data.tasks import load_task
from sead_dist.errors import RunError, UserError
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.feature_teacher import check_feature_teacher
from sead_dist.teachers.inference import NotFiniteError
from sead_dist.teachers.kinds import TEACHER_KINDS, answer_rows, register_teacher
from sead_dist.teachers.placement import check_placements


class Lengths:
    """Says how long a text is; its classes are in the other order than the task's."""

    fingerprint = "lengths 1"
    labels = ("positive", "negative")

    def __init__(self, path, task):
        self.counts = []

    def answer(self, texts_a, texts_b):
        self.counts.append(len(texts_a))
        return np.array([[len(text), 0.0] for text in texts_a])


@pytest.fixture
def lengths():
    register_teacher("lengths", Lengths)
    yield
    del TEACHER_KINDS["lengths"], ADDED.owners["kind of teacher"]["lengths"]


def teachers_of(entry, **changes):
    given = config(f"teachers=[{entry}]", **changes)
    return read_teachers(given, TASK, ALONE, grammar_tokenizer())


def collect(answers, examples, classes, rows):
    found = np.full((len(rows), classes), np.nan)

    def done(part_P, logits_PC):
        found[part_P] = logits_PC

    answer_rows(answers, "lengths", examples, classes, np.array(rows), done)
    return found


def test_its_answers_come_in_pieces_and_its_classes_are_aligned_by_name(lengths):
    (teacher,) = teachers_of("{kind: lengths, path: any}")
    assert teacher.order_C == [1, 0]
    assert teacher.manifest()["kind"] == "lengths"
    assert teacher.manifest()["labels"] == ["positive", "negative"]
    texts = ["x" * (1 + n % 7) for n in range(600)]
    examples = example_set([f"{n} {text}" for n, text in enumerate(texts)])
    rows = list(range(599, -1, -1))
    found = collect(teacher.answers, examples, 2, rows)
    assert found[:, 0].tolist() == [len(examples.texts_a[row]) for row in rows]
    assert teacher.answers.counts == [256, 256, 88]


def test_of_choices_each_text_is_asked_for_one_number(lengths):
    rows = [{"premise": "p", "question": "q", "choice1": "a", "choice2": "bcd", "label": 0}] * 2
    examples = build_examples(load_task("copa"), rows, "train")

    class Second(Lengths):
        def answer(self, texts_a, texts_b):
            return np.array([[len(text)] for text in texts_b])

    found = collect(Second("", None), examples, 2, [0, 1])
    assert found.tolist() == [[1, 3], [1, 3]]


def no_memory(texts_a, texts_b):
    raise MemoryError


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b: np.zeros((len(a), 3)), r"gave \(2, 3\) for 2 text rows; expected \(2, 2\)"),
        (lambda a, b: np.zeros(2), r"gave \(2,\) for 2 text rows"),
        (lambda a, b: [["no", "number"]], "gave no logits: ValueError"),
        (lambda a, b: 1 / 0, "gave no logits: ZeroDivisionError: division by zero; correct its"),
        (no_memory, "gave no logits: MemoryError; use a machine with more memory"),
    ],
)
def test_an_answer_of_another_shape_is_told_in_one_line(answer, message):
    teacher = Lengths("", None)
    teacher.answer = answer
    with pytest.raises(RunError, match=f"teacher lengths {message}"):
        collect(teacher, example_set(["a", "b"]), 2, [0, 1])


def test_an_answer_that_is_no_number_names_the_example():
    teacher = Lengths("", None)
    teacher.answer = lambda a, b: np.array([[0.0, 0.0], [np.nan, 0.0]])
    with pytest.raises(NotFiniteError) as told:
        collect(teacher, example_set(["a", "b", "c"]), 2, [2, 1])
    assert told.value.position == 1


def test_what_only_a_model_can_do_is_refused(lengths):
    entry = "{kind: lengths, path: any, dtype: bf16}"
    with pytest.raises(UserError, match="teacher any: dtype=bf16 is for a model, and its kind is"):
        teachers_of(entry)
    teachers = teachers_of("{kind: lengths, path: any}")
    with pytest.raises(UserError, match="teacher any is of kind lengths, and only a model can be"):
        check_placements(teachers, ["sharded"])
    given = config("teachers=[{kind: lengths, path: any}]", feature_loss="distilbert")
    with pytest.raises(UserError, match="is of kind lengths, and feature_loss=distilbert needs"):
        check_feature_teacher(given, teachers, model_inputs(128), 1)


def test_a_kind_that_cannot_be_opened_or_has_other_classes_is_told_in_one_line(lengths):
    TEACHER_KINDS["lengths"] = lambda path, task: Path(path).read_text()
    with pytest.raises(UserError, match=r"teacher any cannot be read: No such file.*kind lengths"):
        teachers_of("{kind: lengths, path: any}")
    TEACHER_KINDS["lengths"] = lambda path, task: type("Other", (Lengths,), {"labels": ("a", "b")})(
        path, task
    )
    with pytest.raises(UserError, match="any names its classes a, b: 'a' is not a label of"):
        teachers_of("{kind: lengths, path: any}")
    TEACHER_KINDS["lengths"] = lambda path, task: type("Same", (Lengths,), {"fingerprint": None})(
        path, task
    )
    with pytest.raises(UserError, match="teacher any: its kind lengths has the fingerprint None"):
        teachers_of("{kind: lengths, path: any}")


def test_what_is_kept_of_it_is_found_under_all_that_it_depends_on(lengths):
    (one,) = teachers_of("{kind: lengths, path: any}")
    (same,) = teachers_of("{kind: lengths, path: other}")
    assert one.key.fingerprint == same.key.fingerprint
    ADDED.owners["kind of teacher"]["lengths"] = "hash of another plugin"
    (changed,) = teachers_of("{kind: lengths, path: any}")
    assert changed.key.fingerprint != one.key.fingerprint
