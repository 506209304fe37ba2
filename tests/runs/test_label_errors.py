"""`sead-dist labels --errors`: gold labels that teachers contradict which were not trained on them."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small import (
    ALONE,
    grammar_tokenizer,
    logits_of,
    relabel,
    save_teacher,
    words,
    write_task,
)
from small_llm import PROMPT, WORDS, save_llm
from transformers import AutoModelForSequenceClassification

from sead_dist.config.load import load_config
from sead_dist.data.splits import load_examples
from sead_dist.data.tasks import load_task
from sead_dist.errors import UserError
from sead_dist.runs.teacher_labels import label_errors, write_errors, write_labels
from sead_dist.teachers.teacher import TRAINED_ROWS

SWAP = {"negative": "positive", "positive": "negative"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a task whose labels are those of a teacher, but for some rows; that teacher twice, each
    trained on half of the rows; one that has learnt the file's labels; the rows turned, from 1)."""
    root = tmp_path_factory.mktemp("made")
    task, knows = write_task(root / "grammar"), save_teacher(root / "knows")
    relabel(task, knows)
    path = task / "train.tsv"
    head, *lines = path.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    model = AutoModelForSequenceClassification.from_pretrained(knows).eval()
    sure_B = np.abs(np.subtract(*logits_of(model, [text for text, _ in rows]).T))
    turned = set((np.argsort(-sure_B)[:25:5] + 1).tolist())
    rows = [(text, SWAP[was] if n in turned else was) for n, (text, was) in enumerate(rows, 1)]
    path.write_text("\n".join([head, *map("\t".join, rows)]) + "\n")
    halves = [shutil.copytree(knows, root / name) for name in ("first", "second")]
    learnt = learn(rows, save_teacher(root / "learnt", seed=1))
    examples = load_examples(given(task, root / "run", []), load_task(task / "task.yaml"))
    ids_B2 = examples.train.ids_B2
    keep_trained(halves[0], ids_B2[::2])
    keep_trained(halves[1], ids_B2[1::2])
    keep_trained(learnt, np.concatenate([ids_B2, examples.selection.ids_B2]))
    return task, halves, learnt, turned


def keep_trained(folder: Path, ids_B2: np.ndarray) -> None:
    save_file({"ids_U2": np.ascontiguousarray(ids_B2)}, folder / TRAINED_ROWS)


def learn(rows, folder: Path) -> Path:
    """Teach a model these rows by heart."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = grammar_tokenizer()([text for text, _ in rows], padding=True, return_tensors="pt")
    targets_B = torch.tensor([model.config.label2id[label] for _, label in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.ones(())
    while loss.item() > 0.01:
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, targets_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def given(task, output, teachers, **changes):
    return load_config(words(task, teachers, output, **changes))


def errors_of(config, file: Path) -> list[dict]:
    write_errors(config, file, ALONE)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_turned_labels_stand_at_the_top_and_rows_that_a_teacher_was_trained_on_do_not_count(
    made, tmp_path, capsys, shown
):
    task, halves, learnt, turned = made
    found = errors_of(given(task, tmp_path / "run", [*halves, learnt]), tmp_path / "errors.jsonl")
    top = found[: len(turned)]
    assert {row["row"] for row in top} == turned
    assert [row["rank"] for row in found] == list(range(1, len(found) + 1))
    assert [row["margin"] for row in found] == sorted((r["margin"] for r in found), reverse=True)
    texts = [line.split("\t") for line in (task / "train.tsv").read_text().splitlines()]
    for row in top:
        assert texts[row["row"]] == [row["sentence"], row["gold_label"]]
        assert row["suggested_label"] == SWAP[row["gold_label"]]
        assert row["margin"] == row["suggested_probability"] - row["gold_probability"]
        said = [row[f"{name}_label"] for name in ("first", "second", "learnt")]
        assert said[2] is None
        # of a training row one half counts, of a selection row both
        assert said.count(row["suggested_label"]) == {"train": 1, "selection": 2}[row["split"]]
    # 54 training rows and 6 selection rows
    assert "not trained on: first 33, second 33, learnt 0 of 60" in capsys.readouterr().out


def test_two_calls_write_the_same_bytes_in_each_kind_of_file(made, tmp_path):
    task, halves, _, _ = made
    for ending in ("tsv", "csv", "parquet"):
        files = [tmp_path / f"{n}.{ending}" for n in range(2)]
        for n, file in enumerate(files):  # the first computes, the second reads the store
            write_errors(given(task, tmp_path / f"{n}", halves), file, ALONE)
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "0.tsv").read_text().startswith("rank\trow\tid\tsplit\tsentence\tgold_label")


def test_a_teacher_of_which_nobody_knows_its_rows_does_not_count_alone_it_is_refused(
    made, tmp_path, capsys, shown
):
    task, halves, learnt, turned = made
    plain = shutil.copytree(learnt, tmp_path / "plain")
    (plain / TRAINED_ROWS).unlink()
    found = errors_of(given(task, tmp_path / "run", [*halves, plain]), tmp_path / "errors.jsonl")
    assert {row["row"] for row in found[: len(turned)]} == turned
    assert {row["plain_label"] for row in found} == {None}
    assert "plain 0 of 60" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no teacher has predictions .* folds=5"):
        write_errors(given(task, tmp_path / "run", [plain]), tmp_path / "other.tsv", ALONE)
    assert not (tmp_path / "other.tsv").exists()


def test_a_file_counts_for_the_rows_that_it_answers_and_a_language_model_for_all(
    made, tmp_path, capsys, shown
):
    task, halves, _, _ = made
    write_labels(given(task, tmp_path / "run", [halves[0]]), tmp_path / "soft.jsonl", ALONE)
    lines = (tmp_path / "soft.jsonl").read_text().splitlines()
    answers = [
        line for line in lines if (row := json.loads(line))["split"] == "train"
        and row["probability_positive"] is not None
    ]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("\n".join(answers[:40]) + "\n")
    model = f"{{model: {save_llm(tmp_path / 'llm')}, name: llm, prompt: {PROMPT}, words: {WORDS}}}"
    file = f"{{predictions: {tmp_path / 'answers.jsonl'}, name: file}}"
    write_errors(given(task, tmp_path / "run", [file, model]), tmp_path / "errors.tsv", ALONE)
    assert f"file {len(answers[:40])}, llm 60 of 60" in capsys.readouterr().out


def test_soft_labels_of_a_row_are_those_of_teachers_that_were_not_trained_on_it(made, tmp_path):
    task, halves, _, _ = made
    write_labels(given(task, tmp_path / "run", halves), tmp_path / "soft.jsonl", ALONE)
    rows = [json.loads(line) for line in (tmp_path / "soft.jsonl").read_text().splitlines()]
    for row in rows:
        said = [row[f"{name}_probability_positive"] for name in ("first", "second")]
        assert said.count(None) == (1 if row["split"] == "train" else 0)


def test_scores_are_refused(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("name: own\nkind: regression\ntext_a: '{a}'\nscore_range: [0, 5]\n")
    config = load_config([f"task={path}", f"output_dir={tmp_path / 'run'}", "teachers=[a]"])
    with pytest.raises(UserError, match="--errors is for labels, and task own has scores"):
        write_errors(config, tmp_path / "errors.tsv", ALONE)


def test_errors_are_those_of_confident_learning_and_unknown_rows_are_none():
    """What cleanlab 2.9.0 finds by `confident_learning`, ranked by normalised margin."""
    random = np.random.default_rng(7)
    truth_B = random.integers(3, size=30)
    p_BC = np.exp(random.normal(size=(30, 3)) + 2 * np.eye(3)[truth_B])
    p_BC /= p_BC.sum(1, keepdims=True)
    labels_B = np.where(random.random(30) < 0.2, random.integers(3, size=30), truth_B)
    assert label_errors(labels_B, p_BC).tolist() == [14, 22, 8, 20, 11]
    known = np.array([row for row in range(30) if row not in (22, 8)])
    without = known[label_errors(labels_B[known], p_BC[known])]
    p_BC[22] = np.nan
    labels_B[8] = -1
    assert label_errors(labels_B, p_BC).tolist() == without.tolist()
    # no row has the third class, so none is likely to be of it
    assert (
        label_errors(np.array([0, 1]), np.array([[0.3, 0.1, 0.6], [0.1, 0.3, 0.6]])).tolist() == []
    )


def test_the_page_goes_from_folds_to_a_table(tiny_task, tmp_path, cli):
    """docs/teachers.md, with small encoders and so few steps that they learn nothing."""
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text("utf-8")
    block = page.split("## Gold labels that look wrong")[1].split("```console\n")[1].split("```")[0]
    finetune, labels = block.strip().splitlines()
    shutil.copytree(tiny_task[0], tmp_path / "reviews")
    shutil.copy(tiny_task[0] / "task.yaml", tmp_path)
    finetune = finetune.replace("$ENCODER", "reviews/student.yaml")
    few = ["student.tokenizer=reviews/tokenizer", "max_steps=2"]
    for line, more in ((finetune, few), (labels, ["teacher_validation=off"])):
        command, *given_words = shlex.split(line)
        assert command == "sead-dist"
        result = cli(*given_words, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    # each of 54 training rows has one teacher, each of 6 selection rows all three
    assert "teacher-0 24, teacher-1 24, teacher-2 24 of 60" in result.stdout
    rows = list(csv.DictReader((tmp_path / "errors.tsv").open(), delimiter="\t"))
    for row in rows:
        said = {row[f"teacher-{n}_label"] for n in range(3)} - {""}
        assert row["suggested_label"] in said
        assert row["suggested_label"] != row["gold_label"]
