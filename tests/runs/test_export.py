"""`sead-dist export`: the ONNX file answers as PyTorch does, and what is wrong is said first."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import SHAPES, build_model, edit_json, model_inputs, save_random_bert
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sead_dist.cli.commands import main
from sead_dist.errors import RunError, UserError
from sead_dist.runs import onnx_export as export
from sead_dist.runs.onnx_export import export_onnx
from sead_dist.runs.prediction import evaluate_model
from sead_dist.training.evaluation import EvalResult

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # what is timed is looked at nowhere here
    monkeypatch.setattr(export, "TIMED_S", 0.0)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """A finished run with both files; only read."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("exported") / "run")
    main(["export", str(run), "--to", "onnx", "--quantize", "int8"])
    return run


def record(folder):
    return json.loads((folder / "export.json").read_text())


def dev_sentences(grammar):
    lines = (grammar / "validation.tsv").read_text("utf-8").splitlines()[1:]
    return [line.split("\t")[0] for line in lines]


def alone(folder, texts, file="model.onnx"):
    """Logits by onnxruntime and tokenizers, without Transformers."""
    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    made = {
        "input_ids": [row.ids for row in rows],
        "attention_mask": [row.attention_mask for row in rows],
        "token_type_ids": [row.type_ids for row in rows],
    }
    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    inputs = {given.name: np.array(made[given.name]) for given in session.get_inputs()}
    return session.run(None, inputs)[0]


def by_transformers(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()


def test_onnxruntime_alone_gives_the_answers_of_transformers(exported, grammar):
    texts = dev_sentences(grammar)
    expected = by_transformers(exported / "model", texts)
    assert np.abs(alone(exported / "onnx", texts) - expected).max() < 1e-4
    # one row of another length: both axes are open
    np.testing.assert_allclose(alone(exported / "onnx", texts[:1]), expected[:1], atol=1e-4)
    names = json.loads((exported / "onnx" / "config.json").read_text())["id2label"]
    assert names == {"0": "negative", "1": "positive"}


def test_the_tokeniser_of_the_export_truncates_and_pads_by_itself(exported, grammar, tmp_path):
    limit = AutoTokenizer.from_pretrained(exported / "model").model_max_length
    assert record(exported / "onnx")["max_length"] == limit
    for folder, longest in ((exported / "onnx", limit), (tmp_path, 7)):
        if folder == tmp_path:
            fresh = AutoTokenizer.from_pretrained(grammar / "tokenizer")
            model_inputs(7, fresh).save_alone(tmp_path)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        long, short = tokenizer.encode_batch(["good " * 500, "good"])
        assert len(long.ids) == len(short.ids) == longest
        assert short.attention_mask == [1, 1, 1] + [0] * (longest - 3)
    replace(model_inputs(7, fresh), padding="left").save_alone(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_batch(["good " * 500, "good"])[1].attention_mask == [0] * 4 + [1] * 3


def test_export_json_holds_what_the_run_scored_and_what_8_bits_change(exported, grammar):
    made = record(exported / "onnx")
    first, full, small = made["models"]
    assert [model["name"] for model in made["models"]] == ["PyTorch", "ONNX", "ONNX int8"]
    scored = json.loads((exported / "eval_results.json").read_text())
    for model in (first, full):
        assert model["metrics"]["validation"]["accuracy"] == scored["eval_accuracy"]
    texts = dev_sentences(grammar)
    expected = by_transformers(exported / "model", texts)
    quantised = alone(exported / "onnx", texts, "model_int8.onnx")
    off = small["largest_difference"]["validation"]
    # its activations are quantised by batch, and these batches are others
    assert 0.2 < off / np.abs(quantised - expected).max() < 5
    assert full["largest_difference"]["validation"] < 1e-4 < off
    same = (quantised.argmax(1) == expected.argmax(1)).mean()
    assert small["agreement"]["validation"] == pytest.approx(same, abs=0.05)
    assert full["bytes"] == (exported / "onnx" / "model.onnx").stat().st_size
    assert small["bytes"] < full["bytes"]
    assert all(model["latency_ms"]["32"] > 0 < model["latency_ms"]["1"] for model in (first, small))


def test_the_card_shows_the_figures_and_links_files_that_are_there(exported):
    for folder in (exported, exported / "model"):
        card = (folder / "README.md").read_text()
        links = re.findall(r"\]\((onnx/[^)]+)\)", card)
        assert links == ["onnx/model.onnx", "onnx/model_int8.onnx"]
        assert all((folder / link).is_file() for link in links)
        section = card.split("## ONNX")[1].split("## Limits")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ONNX")]
        assert [row.split("|")[1].strip() for row in rows] == ["ONNX", "ONNX int8"]


def test_the_lines_of_the_card_run(exported, monkeypatch, capsys):
    card = (exported / "model" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(import json.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(exported / "model")
    exec(compile(block, "README.md", "exec"), {})
    assert re.fullmatch(r"\['(positive|negative)'\]\n", capsys.readouterr().out)


def test_the_lines_of_the_document_run(exported, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "student").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "export.md", "exec"), {})
    assert re.fullmatch(r"\['(positive|negative)'\]\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "task",
    ["copa", *(pytest.param(task, marks=pytest.mark.slow) for task in ("stsb", "mnli"))],
)
def test_choices_scores_and_several_splits_are_compared(task, grammar, tmp_path, monkeypatch):
    labels = {"mnli": ["neutral", "contradiction", "entailment"]}.get(task, ["score"])
    model = save_random_bert(tmp_path / "m", grammar / "tokenizer", labels)
    data = FIXTURES / task
    export_onnx(str(model), False, None, task, str(data), None)
    evaluate_model(str(model), task, str(data), None, None, str(tmp_path / "scores.json"))
    scored = json.loads((tmp_path / "scores.json").read_text())
    made = record(model / "onnx")
    full = made["models"][1]
    splits = list(made["rows"])
    assert len(splits) == (2 if task == "mnli" else 1)
    for metric, value in full["metrics"][splits[0]].items():
        assert value == pytest.approx(scored[f"eval_{metric}"], abs=1e-4)
    agreed = full["agreement"][splits[-1]]
    assert agreed is None if task == "stsb" else agreed == 1.0
    assert made["labels"] == labels
    assert not (model / "README.md").exists()  # no run, no card


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(SHAPES) - {"bert"}))
def test_other_architectures_are_exported_with_both_axes_open(kind, tmp_path):
    model = build_model(kind)
    names = ["input_ids", "attention_mask"]
    example = {name: torch.ones(2, 5, dtype=torch.long) for name in names}
    export.write_onnx(model, example, tmp_path / "x.onnx")
    run = export.open_onnx(tmp_path / "x.onnx", 1)
    for rows, tokens in ((1, 2), (3, 40)):
        inputs = {name: torch.ones(rows, tokens, dtype=torch.long) for name in names}
        inputs["input_ids"] = torch.randint(5, 20, (rows, tokens))
        inputs["attention_mask"][-1, tokens // 2 :] = 0
        with torch.inference_mode():
            expected = model(**inputs).logits
        torch.testing.assert_close(run(inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_file_that_answers_otherwise_is_refused_and_nothing_is_left(
    exported, tmp_path, monkeypatch
):
    run = shutil.copytree(exported, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    own = export.write_onnx

    def shifted(model, inputs, path):
        with torch.no_grad():
            model.classifier.bias[0] += 0.01
        own(model, inputs, path)
        with torch.no_grad():
            model.classifier.bias[0] -= 0.01

    monkeypatch.setattr(export, "write_onnx", shifted)
    with pytest.raises(RunError, match=r"differs from PyTorch by 0\.01 in a logit.*nothing was"):
        export_onnx(str(run), False, None, None, None, None)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before


def result(accuracy, shift=0.0):
    logits = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32) + np.float32(shift)
    return EvalResult("t", "validation", 0, 2, {"accuracy": accuracy}, 0.0, 1.0, logits)


def test_a_metric_that_differs_is_refused_though_the_logits_agree():
    export.reject_difference(result(0.5), result(0.5, 5e-5))
    with pytest.raises(RunError, match=r"accuracy 0\.5100 on validation, PyTorch has 0\.5000"):
        export.reject_difference(result(0.5), result(0.51))
    with pytest.raises(RunError, match="in a logit of validation"):
        export.reject_difference(result(0.5), result(0.5, 5e-4))
    broken = replace(result(0.5), logits_BC=np.full((2, 2), np.nan, np.float32))
    with pytest.raises(RunError, match="by nan in a logit"):
        export.reject_difference(result(0.5), broken)


@pytest.mark.slow
def test_an_export_of_another_kind_takes_the_place_of_the_old_one(exported, tmp_path):
    run = shutil.copytree(exported, tmp_path / "run")
    export_onnx(str(run), False, None, None, None, None)
    assert not (run / "onnx" / "model_int8.onnx").exists()
    assert not (run / "model" / "onnx" / "model_int8.onnx").exists()
    assert "model_int8" not in (run / "README.md").read_text()


def test_an_export_that_cannot_take_its_place_leaves_the_old_one(exported, tmp_path, monkeypatch):
    run = shutil.copytree(exported, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (run / "onnx").iterdir() if path.is_file()}
    rename = Path.rename

    def broken(path, to):
        if path.name.endswith(".aside"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(RunError, match="cannot be written: Input/output error"):
        export_onnx(str(run), False, None, None, None, None)
    after = {path.name: path.read_bytes() for path in (run / "onnx").iterdir() if path.is_file()}
    assert after == before
    assert not list(run.glob("*.aside*"))


def test_mistakes_are_told_before_any_work(exported, teachers, grammar, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for output, message in (
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "full", "holds other files than an export; give a new folder"),
        (tmp_path / "no" / "onnx", r"\S+no does not exist; make it or give another"),
        (tmp_path / "file" / "onnx", r"\S+file is not a folder; make it or give another"),
        (".", r"--output \. is the working folder or holds it"),
        (Path.cwd().parent, "is the working folder or holds it"),
    ):
        with pytest.raises(UserError, match=message):
            export_onnx(str(exported), False, str(output), None, None, None)
    with pytest.raises(UserError, match="for a model of the hub also give --output DIR"):
        export_onnx("owner/name", False, None, "sst2", None, None)
    with pytest.raises(UserError, match="give --task NAME or FILE"):
        export_onnx(str(teachers[0]), False, str(tmp_path / "x"), None, None, None)
    with pytest.raises(UserError, match="give --data, a folder of files"):
        export_onnx(
            str(exported), False, str(tmp_path / "x"), str(grammar / "task.yaml"), None, None
        )
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package onnx; .*'sead-dist\[onnx\]'"):
        export_onnx(str(exported), False, None, None, None, None)
    assert not (tmp_path / "x").exists()


def test_a_model_that_predict_refuses_is_not_exported(exported, tmp_path):
    run = shutil.copytree(exported, tmp_path / "run")
    edit_json(run / "model" / "config.json", problem_type="multi_label_classification")
    with pytest.raises(UserError, match="has problem_type=multi_label_classification"):
        export_onnx(str(run), False, str(tmp_path / "x"), None, None, None)
    assert not (tmp_path / "x").exists()
