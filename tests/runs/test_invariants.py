"""Invariants shown on whole runs: 4 (names), 5 (validation), 9 (no unpickling), 10 (selection)."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import (
    Trap,
    edit_json,
    grammar_task,
    model_bytes,
    read,
    records,
    relabel,
    run_distill,
    save_teacher,
    words,
    write_task,
)
from transformers import AutoModelForSequenceClassification

from sead_dist.config.load import load_config
from sead_dist.data.splits import load_examples
from sead_dist.errors import UserError
from sead_dist.reporting.run_files import read_run


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The built-in task with labels that teacher `a` gives, and two teachers."""
    root = tmp_path_factory.mktemp("task")
    data = write_task(root / "data", rows=80, dev=24)
    teachers = [save_teacher(root / "a"), save_teacher(root / "b", seed=1)]
    relabel(data, teachers[0])
    return data, teachers


def distill(tmp_path, given) -> None:
    run_ranks(1, tmp_path / "rank", run_distill, given)


def turned(teacher: Path, folder: Path, names: bool) -> Path:
    """The teacher with its classes the other way round; with or without saying so."""
    shutil.copytree(teacher, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for tensor in (model.classifier.weight, model.classifier.bias):
            tensor.copy_(tensor.flip(0).clone())
    if names:
        model.config.id2label = {0: "positive", 1: "negative"}
        model.config.label2id = {"positive": 0, "negative": 1}
    model.save_pretrained(folder)
    return folder


def test_invariant_04_a_teacher_with_its_classes_reversed_makes_the_identical_student(
    tmp_path, task
):
    data, (a, b) = task
    distill(tmp_path, words(data, [a, b], tmp_path / "one"))
    reversed_ = turned(a, tmp_path / "a", names=True)
    distill(tmp_path, words(data, [reversed_, b], tmp_path / "two"))
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one")
    # and without alignment it would not have been: the same columns under the old names
    silent = turned(a, tmp_path / "silent" / "a", names=False)
    distill(tmp_path, words(data, [silent, b], tmp_path / "three"))
    assert model_bytes(tmp_path / "three") != model_bytes(tmp_path / "one")
    # the person may say what the columns are
    given = words(data, [], tmp_path / "four")
    given.append(f"teachers=[{{path: {silent}, labels: [positive, negative]}},{b}]")
    distill(tmp_path, given)
    assert model_bytes(tmp_path / "four") == model_bytes(tmp_path / "one")


def test_invariant_04_label_0_is_refused_before_anything_is_written(tmp_path, task):
    data, (a, _) = task
    silent = tmp_path / "a"
    shutil.copytree(a, silent)
    names = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    edit_json(silent / "config.json", **names)
    with pytest.raises(UserError, match=r"labels: \[negative, positive\]\}"):
        distill(tmp_path, words(data, [silent], tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_invariant_05_an_inverted_teacher_stops_the_run_and_the_better_order_fixes_it(
    tmp_path, task
):
    data, (a, _) = task
    silent = turned(a, tmp_path / "turned", names=False)
    given = words(data, [a, silent], tmp_path / "run", teacher_validation="on")
    with pytest.raises(UserError, match="teacher turned failed its validation") as caught:
        distill(tmp_path, given)
    assert not records(tmp_path / "run")  # before the first step
    line = str(caught.value).partition("it would score better: ")[2].partition("; leave")[0]
    assert line == f"{{path: {silent}, labels: [positive, negative]}}"
    # the suggested line, copied, is a teacher that passes
    distill(
        tmp_path,
        [*words(data, [], tmp_path / "fixed", teacher_validation="on"), f"teachers=[{a},{line}]"],
    )
    validations = read(tmp_path / "fixed" / "teacher_validation.json")
    assert [validation["score"] for validation in validations] == [1.0, 1.0]
    assert all(validation["passed"] for validation in validations)


def test_invariant_05_on_wnli_a_failure_is_only_told(tmp_path, task):
    data, (a, _) = task
    shutil.copytree(data, tmp_path / "wnli")
    own = tmp_path / "wnli" / "task.yaml"
    own.write_text(own.read_text().replace("name: grammar", "name: wnli"))
    silent = turned(a, tmp_path / "turned", names=False)
    distill(tmp_path, words(tmp_path / "wnli", [silent], tmp_path / "run", teacher_validation="on"))
    (validation,) = read(tmp_path / "run" / "teacher_validation.json")
    assert not validation["passed"]
    assert "it would score better" in (tmp_path / "run" / "log.txt").read_text()


def test_invariant_09_a_malicious_teacher_is_a_persons_mistake_and_runs_nothing(tmp_path, task):
    data, (a, _) = task
    evil, mark = tmp_path / "evil", tmp_path / "executed"
    shutil.copytree(a, evil)
    (evil / "model.safetensors").unlink()
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError, match="its weights cannot be read"):
        distill(tmp_path, words(data, [evil], tmp_path / "run"))
    assert not mark.exists()


def flip_labels(path: Path) -> None:
    """Every label of the file the other way round: the best step becomes the worst."""
    flip = {"positive": "negative", "negative": "positive"}
    header, *lines = path.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    path.write_text("\n".join([header, *(f"{t}\t{flip[label]}" for t, label in rows)]) + "\n")


def test_invariant_10_the_dev_labels_are_not_looked_at_before_the_end(tmp_path, task):
    data, (a, b) = task
    shutil.copytree(data, tmp_path / "flipped")
    flip_labels(tmp_path / "flipped" / "validation.tsv")
    scores = []
    for name, folder in (("one", data), ("two", tmp_path / "flipped")):
        # a student whose answers are varied from the start, so that its steps score differently
        changes = {"student__path": b, "student__shape": "", "learning_rate": 5e-3}
        changes |= {
            "num_train_epochs": 4,
            "eval_steps": 2,
            "ensemble": "score",
            "teacher_validation": "on",
        }
        distill(tmp_path, words(folder, [a], tmp_path / name, **changes))
        scores.append(read(tmp_path / name / "scores.json"))
        evaluated = [record["metrics"]["accuracy"] for record in records(tmp_path / name, "eval")]
        assert len(set(evaluated)) > 2
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one")
    assert scores[0]["splits"]["selection"] == scores[1]["splits"]["selection"]
    # the teacher is right on every dev row, and wrong once they are flipped
    told = [score["splits"]["validation"]["teachers"][0]["metrics"]["accuracy"] for score in scores]
    assert told == [1.0, 0.0]
    assert scores[0]["selected_on"] == "held_out"


def test_invariant_10_selecting_on_dev_does_look_and_is_marked_everywhere(tmp_path, task):
    data, (a, _) = task
    given = words(data, [a], tmp_path / "run", selection__split="dev", teacher_validation="on")
    distill(tmp_path, given)
    assert read(tmp_path / "run" / "scores.json")["selected_on"] == "dev"
    assert "(selected on dev)" in (tmp_path / "run" / "README.md").read_text()
    assert read_run(tmp_path / "run").mark == " (selected on dev)"
    scores = read(tmp_path / "run" / "scores.json")["splits"]
    assert scores["selection"]["student"] == scores["validation"]["student"]
    # and whoever moves the dev labels moves what is chosen by
    flip_labels((shutil.copytree(data, tmp_path / "mixed")) / "validation.tsv")
    with pytest.raises(UserError, match="failed its validation"):
        distill(
            tmp_path,
            words(
                tmp_path / "mixed",
                [a],
                tmp_path / "two",
                selection__split="dev",
                teacher_validation="on",
            ),
        )


def test_invariant_10_rows_that_share_text_are_held_out_together(tmp_path, task):
    data, (a, _) = task
    folder = shutil.copytree(data, tmp_path / "twice")
    path = folder / "train.tsv"
    header, *lines = path.read_text().splitlines()
    # every text three times, one of them in capitals, one with the other label
    flip = {"positive": "negative", "negative": "positive"}
    rows = [line.split("\t") for line in lines]
    more = [f"{text.upper()}\t{label}" for text, label in rows]
    more += [f"{text}\t{flip[label]}" for text, label in rows]
    path.write_text("\n".join([header, *lines, *more]) + "\n")
    given = load_config(words(folder, [a], tmp_path / "run", selection__fraction=0.2))
    found = load_examples(given, grammar_task(folder))
    sides = [{text.casefold() for text in side.texts_a} for side in (found.train, found.selection)]
    assert not sides[0] & sides[1]
    assert len(found.selection) == 3 * len(sides[1]) == 48
    assert np.unique(found.selection.labels_B).tolist() == [0, 1]


def test_random_computes_one_teacher_for_each_row(tmp_path, task):
    data, teachers = task
    distill(tmp_path, words(data, teachers, tmp_path / "run", ensemble="random"))
    found = read(tmp_path / "run" / "run_summary.json")
    # 72 training rows by one teacher, 8 + 24 held-out rows by both
    assert found["teacher_forwards"] == 72 + 2 * 32
    agreement = [record["agreement"] for record in records(tmp_path / "run")]
    assert all(set(shown) <= {"a", "b"} for shown in agreement)
