"""`sead-dist evaluate` and `predict`: scores, class order, kinds of task, files, old folders."""

import csv
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small import save_random_bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sead_dist import TaskSpec, predict
from sead_dist.cli.commands import main
from sead_dist.errors import RunError, UserError
from sead_dist.runs.predicted_rows import predict_file
from sead_dist.runs.prediction import evaluate_model, read_class_order

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def scores(model, task, data, tmp_path, labels=None, split=None):
    """What `evaluate` writes to its --json file."""
    path = tmp_path / f"scores-{len(list(tmp_path.iterdir()))}.json"
    evaluate_model(str(model), str(task), str(data), labels, split, str(path))
    return json.loads(path.read_text())


def answers_by_hand(folder, sentences):
    """The label name that plain Transformers gives to each sentence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    return [model.config.id2label[int(index)] for index in logits.argmax(1)]


def dev_rows(grammar):
    lines = (grammar / "validation.tsv").read_text("utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines]


def test_a_run_folder_scores_what_the_run_wrote_down(finished, grammar, tmp_path, capsys, shown):
    found = scores(finished, grammar / "task.yaml", grammar, tmp_path)
    told = json.loads((finished / "eval_results.json").read_text())
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in told.items() if k not in timed
    }
    header = next(line for line in capsys.readouterr().out.splitlines() if "eval_loss" in line)
    assert header == (
        "| eval_accuracy | eval_runtime | eval_samples_per_second | eval_steps_per_second "
        "| eval_loss | eval_samples |"
    )


def test_a_bf16_run_is_scored_in_bf16(words, distil, grammar, tmp_path):
    run = distil(words(tmp_path / "run", "precision=bf16", "max_steps=4"))
    told = json.loads((run / "eval_results.json").read_text())
    found = scores(run, grammar / "task.yaml", grammar, tmp_path)
    assert found["eval_loss"] == told["eval_loss"]
    assert (
        scores(run / "model", grammar / "task.yaml", grammar, tmp_path)["eval_loss"]
        != (told["eval_loss"])
    )


def test_classes_are_aligned_by_name(teachers, grammar, tmp_path):
    rows = dev_rows(grammar)
    for teacher in teachers:  # the second one has its classes in the other order
        answers = answers_by_hand(teacher, [row[0] for row in rows])
        right = sum(answer == row[1] for answer, row in zip(answers, rows, strict=True))
        found = scores(teacher, grammar / "task.yaml", grammar, tmp_path)
        assert found["eval_accuracy"] == right / len(rows)
        assert found["eval_accuracy"] > 0.55


def test_labels_say_what_a_model_does_not(teachers, grammar, tmp_path):
    nameless = shutil.copytree(teachers[1], tmp_path / "nameless")
    config = json.loads((nameless / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "LABEL_0", "1": "LABEL_1"}, {}
    (nameless / "config.json").write_text(json.dumps(config))
    task = grammar / "task.yaml"
    with pytest.raises(UserError, match=r"--labels negative,positive or --labels task_order"):
        scores(nameless, task, grammar, tmp_path)
    own = scores(teachers[1], task, grammar, tmp_path)["eval_accuracy"]
    said = scores(nameless, task, grammar, tmp_path, labels=["positive", "negative"])
    assert said["eval_accuracy"] == own
    turned = scores(nameless, task, grammar, tmp_path, labels="task_order")
    assert turned["eval_accuracy"] == pytest.approx(1 - own)


AWKWARD = ("yes, please", "it's", "a: [b", "x\ny", 'say "no"', "5%")


def test_a_class_order_holds_any_names(grammar, tmp_path):
    task = TaskSpec("mine", "classification", "{sentence}", labels=AWKWARD)
    numbered = [f"LABEL_{index}" for index in range(len(AWKWARD))]
    nameless = save_random_bert(tmp_path / "m", grammar / "tokenizer", numbered)
    turned = list(reversed(AWKWARD))
    (found,) = predict(nameless, ["a b"], task=task, labels=turned)
    (named,) = predict(nameless, ["a b"], task=task, labels="task_order")
    probabilities = [[of[f"probability_{name}"] for name in AWKWARD] for of in (found, named)]
    assert probabilities[0] == probabilities[1][::-1]
    # the option that the error names gives the same order
    with pytest.raises(UserError) as caught:
        predict(nameless, ["a b"], task=task)
    option = shlex.split(str(caught.value).partition("trained with: ")[2])
    assert option[0] == "--labels"
    assert read_class_order(option[1]) == list(AWKWARD)


def test_a_class_order_of_the_command_line_is_names_between_commas():
    assert read_class_order("a, it's,1,null") == ["a", "it's", "1", "null"]
    assert read_class_order("""'a, b',"c",[d]""") == ["a, b", "c", "[d]"]
    assert read_class_order("[a, 'b, c']") == ["a", "b, c"]
    assert read_class_order("'tis,b") == ["'tis,b"]  # the mark is not closed
    assert (read_class_order(None), read_class_order("task_order")) == (None, "task_order")


def test_mnli_has_two_dev_sets(grammar, tmp_path, capsys, shown):
    labels = ["contradiction", "entailment", "neutral"]
    model = save_random_bert(tmp_path / "m", grammar / "tokenizer", labels)
    found = scores(model, "mnli", FIXTURES / "mnli", tmp_path)
    assert {"eval_accuracy", "eval_validation_mismatched_accuracy"} <= set(found)
    out = capsys.readouterr().out
    assert "mnli validation_matched" in out
    assert "mnli validation_mismatched" in out
    one = scores(model, "mnli", FIXTURES / "mnli", tmp_path, split="validation_mismatched")
    assert one["eval_accuracy"] == found["eval_validation_mismatched_accuracy"]


@pytest.mark.parametrize(
    ("task", "labels", "keys"),
    [
        ("stsb", ["score"], ["eval_pearson", "eval_spearmanr"]),
        ("copa", ["score"], ["eval_accuracy"]),
        ("mrpc", ["equivalent", "not_equivalent"], ["eval_accuracy", "eval_f1"]),
        ("multirc", ["false", "true"], ["eval_f1_a", "eval_exact_match"]),
        ("record", ["false", "true"], ["eval_exact_match", "eval_f1"]),
    ],
)
def test_every_kind_of_task_is_scored(task, labels, keys, grammar, tmp_path):
    model = save_random_bert(tmp_path / "m", grammar / "tokenizer", labels)
    found = scores(model, task, FIXTURES / task, tmp_path)
    assert [key for key in found if key in keys] == keys
    assert np.isfinite(found["eval_loss"])


def old_hub_folder(teacher: Path, folder: Path, zipped: bool) -> Path:
    """`teacher` as Transformers 4.18 left it on the hub: pickled weights, vocab.txt, and the
    trainer's pickled arguments, here ones that must never be read."""
    folder.mkdir()
    weights = load_file(teacher / "model.safetensors")
    weights["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    config = json.loads((teacher / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "is_decoder")}
    config |= {
        "_name_or_path": "microsoft/xtremedistil-l6-h256-uncased",
        "gradient_checkpointing": False,
        "position_embedding_type": "absolute",
        "problem_type": "single_label_classification",
        "torch_dtype": "float32",
        "transformers_version": "4.18.0",
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = AutoTokenizer.from_pretrained(teacher).get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    special = {f"{n}_token": f"[{n.upper()}]" for n in ("unk", "sep", "pad", "cls", "mask")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {
        "do_lower_case": True,
        **special,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
        "model_max_length": 64,
        "special_tokens_map_file": None,
        "name_or_path": "microsoft/xtremedistil-l6-h256-uncased",
        "tokenizer_class": "BertTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.save(MakesFolder(folder / "ran"), folder / "training_args.bin")
    return folder


class MakesFolder:
    """Unpickled, it makes a folder: code that came with a checkpoint and was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_old_hub_folder_is_read(zipped, teachers, grammar, tmp_path):
    old = old_hub_folder(teachers[1], tmp_path / "old", zipped)
    found = scores(old, grammar / "task.yaml", grammar, tmp_path)
    new = scores(teachers[1], grammar / "task.yaml", grammar, tmp_path)
    assert found["eval_accuracy"] == new["eval_accuracy"]
    assert found["eval_loss"] == new["eval_loss"]
    assert not (old / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_weights_file_is_refused_and_not_run(
    zipped, teachers, words, distil, grammar, tmp_path
):
    evil = old_hub_folder(teachers[1], tmp_path / "evil", zipped)
    payload = {"classifier.weight": MakesFolder(evil / "ran")}
    torch.save(payload, evil / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    rejection = r"evil: its weights cannot be read: .*mkdir"
    with pytest.raises(UserError, match=rejection) as caught:
        scores(evil, grammar / "task.yaml", grammar, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rejection):
        distil(words(tmp_path / "run", f"teachers=[{evil}]"))
    assert not (evil / "ran").exists()


def test_nan_weights_are_told(teachers, grammar, tmp_path):
    broken = shutil.copytree(teachers[0], tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(broken)
    model.classifier.bias.data[0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(RunError, match="broken gives NaN"):
        scores(broken, grammar / "task.yaml", grammar, tmp_path)


@pytest.mark.parametrize("place", ["folder", "no such folder/scores.json"])
def test_where_scores_cannot_be_written_is_found_out_before_they_are_computed(
    teachers, grammar, tmp_path, monkeypatch, place
):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("sead_dist.runs.prediction.load_answerer", None)
    file = str(tmp_path / place)
    with pytest.raises(UserError, match=f"--json {file}"):
        evaluate_model(str(teachers[0]), str(grammar / "task.yaml"), str(grammar), None, None, file)


def test_the_command_line_hands_everything_on(teachers, grammar, tmp_path, capsys, shown):
    output, file = tmp_path / "out.csv", tmp_path / "scores.json"
    task = ["--task", str(grammar / "task.yaml")]
    data = ["--data", str(grammar), "--split", "train", "--json", str(file)]
    main(["evaluate", str(teachers[0]), *task, *data, "--labels", "positive,negative"])
    assert json.loads(file.read_text())["eval_samples"] == 400
    assert json.loads(file.read_text())["eval_accuracy"] < 0.5  # the labels are turned round
    source = str(grammar / "unlabeled.tsv")
    main(["predict", str(teachers[0]), source, *task, "--output", str(output)])
    assert f"200 rows written to {output}" in capsys.readouterr().out


def read(path):
    """Any of the four kinds of output as a list of mappings of strings."""
    if path.suffix == ".parquet":
        return [{k: str(v) for k, v in row.items()} for row in pq.read_table(path).to_pylist()]
    if path.suffix == ".jsonl":
        rows = map(json.loads, path.read_text("utf-8").splitlines())
        return [{k: str(v) for k, v in row.items()} for row in rows]
    with path.open(encoding="utf-8", newline="") as file:
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        return list(csv.DictReader(file, **style))


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_predictions_stand_beside_the_input_in_its_order(suffix, finished, grammar, tmp_path):
    sentences = [row[0] for row in dev_rows(grammar)[:40]] + ['the plot was "good', "plot , good"]
    sentences.sort(key=len, reverse=True)  # forwards go by length: the order must come back
    rows = [f"{number}\t{text}" for number, text in enumerate(sentences)]
    file = tmp_path / "in.tsv"
    file.write_text("\n".join(["id\tsentence", *rows]) + "\n", encoding="utf-8")
    output = tmp_path / f"out{suffix}"
    predict_file(str(finished), file, None, output, None)
    found = read(output)
    assert [row["id"] for row in found] == [str(n) for n in range(len(sentences))]
    assert [row["sentence"] for row in found] == sentences
    by_hand = answers_by_hand(finished / "model", sentences)
    assert [row["predicted_label"] for row in found] == by_hand
    assert len(set(by_hand)) == 2
    for row in found:
        shares = {name: float(row[f"probability_{name}"]) for name in ("negative", "positive")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert max(shares, key=shares.__getitem__) == row["predicted_label"]
    assert list(found[0])[:2] == ["id", "sentence"]


def test_scores_are_predicted_for_a_regression(grammar, tmp_path):
    model = save_random_bert(tmp_path / "m", grammar / "tokenizer", ["score"])
    output = tmp_path / "out.jsonl"
    predict_file(str(model), FIXTURES / "stsb" / "dev.tsv", "stsb", output, None)
    rows = read(output)
    expected = len((FIXTURES / "stsb" / "dev.tsv").read_text("utf-8").splitlines()) - 1
    assert len(rows) == expected
    assert len({row["predicted_score"] for row in rows}) > 1
    assert "predicted_label" not in rows[0]


def test_nested_rows_are_written_one_for_each_example(grammar, tmp_path):
    model = save_random_bert(tmp_path / "m", grammar / "tokenizer", ["false", "true"])
    output = tmp_path / "out.tsv"
    predict_file(str(model), FIXTURES / "multirc" / "val.jsonl", "multirc", output, None)
    answers = [
        answer["text"]
        for line in (FIXTURES / "multirc" / "val.jsonl").read_text("utf-8").splitlines()
        for question in json.loads(line)["passage"]["questions"]
        for answer in question["answers"]
    ]
    rows = read(output)
    assert len(rows) == len(answers)
    assert all(row["text_b"].endswith(text) for row, text in zip(rows, answers, strict=True))
    assert list(rows[0])[:3] == ["row", "text_a", "text_b"]


def test_predict_names_its_file_after_the_input(finished, grammar, tmp_path):
    file = Path(shutil.copy(grammar / "unlabeled.tsv", tmp_path / "in.tsv"))
    predict_file(str(finished), file, None, None, None)
    assert (tmp_path / "in.predicted.tsv").is_file()
    with pytest.raises(UserError, match=r"in.predicted.tsv exists and is not overwritten"):
        predict_file(str(finished), file, None, None, None)


def test_predict_writes_over_nothing(finished, grammar, tmp_path):
    file = shutil.copy(grammar / "unlabeled.tsv", tmp_path / "in.tsv")
    before = Path(file).read_bytes()
    for output, message in (
        (file, "exists and is not overwritten"),
        (tmp_path / "out.txt", "allowed: .tsv, .csv, .jsonl, .parquet"),
        (tmp_path / "no" / "out.tsv", "does not exist; make it first"),
    ):
        with pytest.raises(UserError, match=message):
            predict_file(str(finished), Path(file), None, Path(output), None)
    assert Path(file).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["in.tsv"]


def test_predict_says_what_it_cannot_write_or_read(finished, teachers, grammar, tmp_path):
    tabbed = tmp_path / "in.jsonl"
    tabbed.write_text(json.dumps({"sentence": "the plot\twas good"}) + "\n")
    with pytest.raises(UserError, match=r"'sentence' of row 1 holds a tab.*give a .csv"):
        predict_file(str(finished), tabbed, None, tmp_path / "out.tsv", None)
    tabbed.write_text(json.dumps({"sentence": "good", "predicted_label": "x"}) + "\n")
    with pytest.raises(UserError, match="a column 'predicted_label' already; rename it"):
        predict_file(str(finished), tabbed, None, tmp_path / "out.csv", None)
    with pytest.raises(UserError, match="give --task NAME or FILE"):
        predict_file(str(teachers[0]), tabbed, None, tmp_path / "out.csv", None)
    tabbed.write_text(json.dumps({"text": "good"}) + "\n")
    with pytest.raises(UserError, match="no column 'sentence'; its columns: text"):
        predict_file(str(finished), tabbed, None, tmp_path / "out.csv", None)
