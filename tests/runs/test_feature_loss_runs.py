"""Whole runs of the baselines' methods: kill and resume, what stays of them, other kinds of task."""

import json
from pathlib import Path

import pytest
from ranks import finish, start
from safetensors import safe_open
from safetensors.torch import load_file
from small import (
    ALONE,
    kill_at,
    model_bytes,
    newest,
    read,
    records,
    run_distill,
    save_teacher,
    sentences,
    shape,
    words,
)
from transformers import AutoModelForSequenceClassification

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.runs.distillation import distill

METHODS = ("distilbert", "tinybert", "minilm")
# 54 rows, eight a step, two epochs
STEPS = 14


def run(given, output: Path, **changes) -> Path:
    data, teachers = given
    return distill(load_config(words(data, teachers, output, **changes)), ALONE, show_table=False)


def killable(task, root: Path) -> list[str]:
    """A run whose every step is saved; the seventh is the last of tinybert's first stage."""
    data, teachers = task
    return words(
        data, teachers, root / "run", root / "store", method="tinybert", teacher="a", num_train_epochs=2,
        save_steps=1, eval_steps=5, final_checkpoint="last",
        keep_training_state="true",
    )  # fmt: skip


@pytest.mark.slow
def test_invariant_06_tinybert_killed_in_each_stage_ends_as_the_same_student(tmp_path, two_alike):
    whole, root = tmp_path / "whole", tmp_path / "killed"
    finish(
        start(1, whole / "ranks", run_distill, killable(two_alike, whole)), whole / "ranks", 60.0
    )
    reached = []
    for step in (3, 9):
        kill_at(step, root, killable(two_alike, root))
        reached.append(newest(root))
    # in the first stage, and in the second
    assert 3 <= reached[0] < 7 < reached[1] < STEPS
    finish(start(1, root / "ranks", run_distill, killable(two_alike, root)), root / "ranks", 60.0)
    assert model_bytes(root / "run") == model_bytes(whole / "run")
    last = Path("run") / "checkpoints" / f"step-{STEPS:08d}" / "student.safetensors"
    assert (root / last).read_bytes() == (whole / last).read_bytes()
    assert "projections.hidden.weight" in load_file(root / last)
    summaries = [read(place / "run" / "run_summary.json") for place in (whole, root)]
    assert summaries[0]["feature_loss"] == summaries[1]["feature_loss"]
    losses = [[line["loss_feature"] for line in records(place / "run")] for place in (whole, root)]
    assert losses[0] == losses[1]
    assert all(losses[0][:7])
    assert not any(losses[0][7:])


def test_another_loss_over_layer_outputs_is_another_run(tmp_path, two_alike):
    run(two_alike, tmp_path / "run", method="minilm", teacher="a", max_steps=2)
    for changes, said in (
        ({"feature_loss_weight": 2.0}, r"feature_loss_weight was 1\.0, is 2\.0"),
        ({"teacher": "b"}, "teacher was 'a', is 'b'"),
        # whose second stage has rules of its own
        ({"method": "tinybert"}, "holds another run: .*feature_loss was 'minilm', is 'tinybert'"),
    ):
        with pytest.raises(UserError, match=said):
            keys = {"method": "minilm", "teacher": "a", "max_steps": 2, **changes}
            run(two_alike, tmp_path / "run", **keys)


def test_a_student_that_would_be_misread_is_told_before_anything_is_written(tmp_path, two_alike):
    student = tmp_path / "student.yaml"
    fields = shape("roformer", hidden_size=16, intermediate_size=32)
    student.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    said = r"the student \(roformer\): its layers cannot be read: the attention of layer 1 differs"
    with pytest.raises(UserError, match=said):
        run(two_alike, tmp_path / "run", method="minilm", student__shape=student)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def plain(two_alike, tmp_path_factory):
    """A run that follows no layer outputs."""
    return run(two_alike, tmp_path_factory.mktemp("plain") / "run", method="single", max_steps=4)


@pytest.mark.parametrize("method", METHODS)
def test_the_final_model_holds_the_student_alone_and_the_summary_names_the_feature_teacher(
    tmp_path, two_alike, plain, method
):
    output = run(two_alike, tmp_path / "run", method=method, teacher="b", max_steps=4)
    with (
        safe_open(output / "model" / "model.safetensors", "pt") as own,
        safe_open(plain / "model" / "model.safetensors", "pt") as other,
    ):
        assert sorted(own.keys()) == sorted(other.keys())
    _, notes = AutoModelForSequenceClassification.from_pretrained(
        output / "model", output_loading_info=True
    )
    assert not notes["unexpected_keys"]
    assert not notes["missing_keys"]
    summary = read(output / "run_summary.json")
    assert summary["feature_loss"] == {
        "method": method,
        "teacher": "b",
        "variant": {
            "distilbert": "projected cosine; start: its own, the feature teacher's layers do not fit",
            "tinybert": "attention by head",
            "minilm": "attention distributions and value relations",
        }[method],
        "until_step": 2 if method == "tinybert" else 4,
        "forwards": 8 * (2 if method == "tinybert" else 4),
    }
    needed = summary["teacher_forwards"] + summary["store_hits"]
    single = read(plain / "run_summary.json")
    assert single["feature_loss"] is None
    live = summary["feature_loss"]["forwards"]
    assert needed - live == single["teacher_forwards"] + single["store_hits"]
    assert f"feature_loss={method} of b: " in (output / "log.txt").read_text()


def test_the_feature_teacher_is_the_best_teacher_of_the_selection_split_as_for_single(
    tmp_path, two_alike, plain
):
    followed = run(two_alike, tmp_path / "run", method="minilm", max_steps=1)
    said = [
        (output / "log.txt")
        .read_text()
        .partition("the one teacher of this student: ")[2]
        .split()[0]
        for output in (followed, plain)
    ]
    record = read(followed / "run_summary.json")["feature_loss"]
    assert [record["teacher"]] * 2 == said
    # the better of the two, whichever comes first
    data, teachers = two_alike
    turned = run((data, teachers[::-1]), tmp_path / "turned", method="minilm", max_steps=1)
    assert read(turned / "run_summary.json")["feature_loss"]["teacher"] == record["teacher"]


def write_pairs(folder: Path) -> Path:
    """stsb's files: pairs of sentences, scores from 0 to 5."""
    folder.mkdir()
    texts = sentences(80, seed=3)
    for name, pairs in (("train", range(30)), ("dev", range(30, 40))):
        lines = ["sentence1\tsentence2\tscore"]
        lines += [f"{texts[2 * n]}\t{texts[2 * n + 1]}\t{n % 6}" for n in pairs]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_choices(folder: Path) -> Path:
    """copa's files: two text rows make one example."""
    folder.mkdir()
    texts = sentences(120, seed=4)
    for name, rows in (("train", range(30)), ("val", range(30, 40))):
        lines = [
            {"premise": texts[3 * n], "choice1": texts[3 * n + 1], "choice2": texts[3 * n + 2],
             "question": "cause", "idx": n, "label": n % 2}
            for n in rows
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "write"), [("stsb", write_pairs), ("copa", write_choices)])
def test_scores_and_choices_are_learnt_like_classes(tmp_path, two_alike, name, write, method):
    teacher = save_teacher(tmp_path / "teacher", labels=["score"])
    keys = {
        "task": name, "data__path": write(tmp_path / "data"), "max_steps": 3, "max_length": 40,
    }  # fmt: skip
    output = run((two_alike[0], [teacher]), tmp_path / "run", method=method, **keys)
    losses = [line["loss_feature"] for line in records(output)]
    assert losses[0] > 0
    assert read(output / "run_summary.json")["finished"]
