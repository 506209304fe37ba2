"""`sead-dist labels`: a run's rows to be answered, and what its teachers say of them."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small import (
    ALONE,
    grammar_tokenizer,
    logits_of,
    model_bytes,
    words,
)
from transformers import AutoModelForSequenceClassification

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.runs.distillation import distill
from sead_dist.runs.teacher_labels import write_errors, write_labels, write_rows


def given(tiny_task, output, teachers, **changes):
    return load_config(words(tiny_task[0], teachers, output, **{"max_steps": 4, **changes}))


def test_rows_are_written_once_with_ids_and_answers_to_them_are_found(tiny_task, tmp_path):
    text = {"unlabeled__path": tiny_task[0] / "unlabeled.tsv"}
    rows = tmp_path / "rows.jsonl"
    write_rows(given(tiny_task, tmp_path / "run", [], **text), rows)
    asked = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["split"] for row in asked].count("text") == 20
    assert {row["split"] for row in asked} == {"train", "text", "selection", "validation"}
    assert len({row["id"] for row in asked}) == len(asked) == len({r["sentence"] for r in asked})
    answers = tmp_path / "gpt.jsonl"
    said = [{"id": row["id"], "answer": "Positive" if "good" in row["sentence"] else "negative"}
            for row in asked]  # fmt: skip
    answers.write_text("".join(json.dumps(row) + "\n" for row in said))
    entry = f"{{predictions: {answers}}}"
    run = distill(given(tiny_task, tmp_path / "run", [entry], **text), ALONE)
    log = (run / "log.txt").read_text()
    assert (
        "has predictions of 74 of 74 train rows, 6 of 6 selection rows, 20 of 20 validation rows"
        in log
    )


def test_soft_labels_are_those_of_the_teachers_and_a_teacher_themselves(tiny_task, tmp_path):
    file = tmp_path / "soft.parquet"
    write_labels(given(tiny_task, tmp_path / "run", tiny_task[1]), file, ALONE)
    found = pq.read_table(file).to_pydict()
    models = [
        AutoModelForSequenceClassification.from_pretrained(one).eval() for one in tiny_task[1]
    ]
    logits_NBC = np.stack([logits_of(model, found["sentence"]) for model in models])
    p_NBC = np.exp(logits_NBC) / np.exp(logits_NBC).sum(-1, keepdims=True)
    assert np.allclose(found["a_probability_negative"], p_NBC[0, :, 0], atol=1e-5)
    assert np.allclose(found["b_probability_positive"], p_NBC[1, :, 1], atol=1e-5)
    mean_BC = p_NBC.mean(0)
    assert np.allclose(found["probability_positive"], mean_BC[:, 1], atol=1e-5)
    assert np.allclose(found["entropy"], -(mean_BC * np.log(mean_BC)).sum(-1), atol=1e-4)
    same_NB = p_NBC.argmax(-1) == mean_BC.argmax(-1)[None]
    assert np.allclose(found["agreement"], same_NB.mean(0))
    assert set(found["gold_label"]) == {"negative", "positive"}
    student = [
        distill(given(tiny_task, tmp_path / name, teachers), ALONE)
        for name, teachers in (
            ("live", tiny_task[1]),
            ("soft", [f"{{predictions: {file}, calibrate: off}}"]),
        )
    ]
    close = [
        logits_of(AutoModelForSequenceClassification.from_pretrained(run / "model").eval(), found["sentence"][:5])
        for run in student
    ]  # fmt: skip
    assert np.allclose(*close, atol=1e-3)
    import datasets

    assert len(datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))) == 80


def test_what_no_teacher_answers_is_empty(tiny_task, tmp_path):
    write_rows(given(tiny_task, tmp_path / "run", []), tmp_path / "rows.jsonl")
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    (tmp_path / "gpt.jsonl").write_text(json.dumps({"id": first["id"], "label": "positive"}) + "\n")
    entry = f"{{predictions: {tmp_path / 'gpt.jsonl'}, calibrate: off}}"
    write_labels(given(tiny_task, tmp_path / "run", [entry]), tmp_path / "soft.jsonl", ALONE)
    rows = [json.loads(line) for line in (tmp_path / "soft.jsonl").read_text().splitlines()]
    said = [row for row in rows if row["probability_positive"] is not None]
    assert [row["sentence"] for row in said] == [first["sentence"]]
    assert said[0]["probability_positive"] == pytest.approx(1.1 / 1.2)
    assert rows[1]["agreement"] is None
    with pytest.raises(UserError, match=r"--output .*soft.jsonl exists and is not overwritten"):
        write_labels(given(tiny_task, tmp_path / "run", [entry]), tmp_path / "soft.jsonl", ALONE)
    with pytest.raises(UserError, match="labels needs teachers, and there are none; give teachers"):
        write_labels(given(tiny_task, tmp_path / "run", []), tmp_path / "other.jsonl", ALONE)


def test_rows_are_those_of_a_run_with_teachers_though_the_method_asks_none(tiny_task, tmp_path):
    few = {"data__max_train_examples": 30, "selection__fraction": 0.4}
    for name, more in (("mean", {}), ("finetune", {"method": "finetune"})):
        config = given(tiny_task, tmp_path / "run", tiny_task[1], **few, **more)
        write_rows(config, tmp_path / f"{name}.jsonl")
    written = (tmp_path / "mean.jsonl").read_text()
    assert '"split": "text"' in written
    assert (tmp_path / "finetune.jsonl").read_text() == written


@pytest.mark.parametrize("write", [write_labels, write_errors])
def test_a_method_that_asks_no_teacher_is_refused_though_teachers_are_given(
    tiny_task, tmp_path, write
):
    config = given(tiny_task, tmp_path / "run", tiny_task[1], method="finetune")
    with pytest.raises(UserError, match="method=finetune: ensemble=none uses none of the teachers"):
        write(config, tmp_path / "out.tsv", ALONE)


def test_from_a_csv_of_answers_to_a_student_as_the_page_says(tiny_task, tmp_path, cli):
    """docs/teachers.md, with a smaller student and fewer steps."""
    page = Path(__file__).parents[2] / "docs" / "teachers.md"
    block = page.read_text("utf-8").split("```console\n")[1].split("```")[0]
    lines = [line for line in block.replace("\\\n", "").splitlines() if not line.startswith("#")]
    assert len(block.splitlines()) <= 10
    grammar = tiny_task[0]
    (tmp_path / "reviews").mkdir()
    for name in ("train.tsv", "validation.tsv"):
        (tmp_path / "reviews" / name).write_text((grammar / name).read_text())
    (tmp_path / "task.yaml").write_text((grammar / "task.yaml").read_text())
    grammar_tokenizer().save_pretrained(tmp_path / "tokenizer")
    _, *rows = (grammar / "train.tsv").read_text().splitlines()
    swap = {"negative": "Neg", "positive": "Pos"}
    said = [(*row.split("\t"), n) for n, row in enumerate(rows)]
    csv = [f'"{text}",{"unsure" if n % 9 == 8 else swap[label]},0.95' for text, label, n in said]
    (tmp_path / "gpt.csv").write_text("\n".join(["sentence,answer,confidence", *csv]) + "\n")
    smaller = [f"student.shape={grammar / 'student.yaml'}", "student.tokenizer=tokenizer",
               "max_steps=2", "global_batch_size=8", "micro_batch_size=4"]  # fmt: skip
    import shlex

    for line in lines:
        command, *given_words = shlex.split(line)
        assert command == "sead-dist"
        if given_words[0] == "distill":
            given_words = [w for w in given_words if not w.startswith("student=")] + smaller
        result = cli(*given_words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "6 rows without a prediction ('unsure')" in log
    assert model_bytes(tmp_path / "out")
