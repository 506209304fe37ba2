"""Mistakes in a task's file and in files of rows: what is told leads to what was meant."""

import re

import pytest
from small import ALONE, grammar_task, grammar_tokenizer, save_teacher, words, write_task

from sead_dist.config.load import load_config
from sead_dist.data import unlabeled
from sead_dist.data.examples import build_examples
from sead_dist.data.splits import load_examples, load_official
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.models.pretrained import check_vocabulary
from sead_dist.models.student import build_student
from sead_dist.runs.distillation import distill
from sead_dist.runs.given import checked_task
from sead_dist.runs.prediction import data_of
from sead_dist.runs.teacher_labels import write_rows
from sead_dist.runtime.console import counted_rows


@pytest.fixture
def data(tmp_path):
    return write_task(tmp_path / "data")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "text_a: '{t}'\nlabels: billing, outage",
            "labels is 'billing, outage': expected a list; give [billing, outage]",
        ),
        (
            "text_a: '{t}'\nlabels: {billing: 0, outage: 1}",
            "labels is {billing: 0, outage: 1}: expected a list; give [billing, outage]",
        ),
        (
            "text_a: '{t}'\nlabels: {0: billing, 1: outage}",
            "labels is {0: 'billing', 1: 'outage'}: expected a list; give [billing, outage]",
        ),
        (
            "text_a: '{t}'\nscore_range: 0, 5",
            "score_range is '0, 5': expected a list; give [0, 5]",
        ),
        (
            "text_a: '{t}'\nscore_range: [5]",
            "score_range is [5]: expected more values; give [NUMBER, NUMBER]",
        ),
        (
            "text_a: '{t}'\nscore_range: [0, 1, 5]",
            "score_range is [0, 1, 5]: expected 2 values; give [NUMBER, NUMBER]",
        ),
        (
            "text_a: '{t}'\nlabels: [a, b]\nmetrics: f2",
            "metrics is 'f2': expected a list; see `sead-dist keys metrics`",
        ),
        (
            "text_a: '{t}'\nlabels: [null, a]",
            "labels.0 is null: expected a text; quote it: 'null' (YAML reads it as another type)",
        ),
        (
            "text_a: '{t}'\nlabels: [1, 2]",
            "labels.0 is 1: expected a text; quote it: '1' (YAML reads it as another type)",
        ),
    ],
)
def test_a_task_s_file_is_told_with_what_was_meant(lines, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\n{lines}\n")
    with pytest.raises(UserError) as caught:
        load_task(str(file))
    assert str(caught.value) == f"task file {file}: {said}"


@pytest.mark.parametrize("scores", [(0, 1e19), (-1e30, 0)])
def test_scores_whose_squares_float32_does_not_hold_are_rejected(scores):
    def task(scores):
        own = TaskSpec("mine", "regression", "{t}", score_range=scores, metrics=("pearson",))
        return checked_task(own)

    with pytest.raises(UserError, match=r"score_range is \[.*\], and float32 .*divide the scores"):
        task(scores)
    assert task((-1e18, 1e18)).score_range == (-1e18, 1e18)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"score_range": 3}, "score_range is 3: expected a list; give [NUMBER, NUMBER]"),
        ({"score_range": True}, "score_range is true: expected a list; give [NUMBER, NUMBER]"),
        ({"labels": 3}, "labels is 3: expected a list; give [TEXT, TEXT]"),
        ({"labels": "good"}, "labels is 'good': expected a list; give [TEXT, TEXT]"),
        ({"labels": {"good"}}, "labels is {'good'}, which has no order; give a list"),
        ({"labels": ["a", "b"], "hub": "a/b"}, "hub is 'a/b': expected a list; give [TEXT, TEXT]"),
        ({"labels": ["a", "b"], "columns": "t"}, "columns is 't': expected a list; give [t]"),
        (
            {"labels": ["a", "b"], "metrics": "f2"},
            "metrics is 'f2': expected a list; see `sead-dist keys metrics`",
        ),
        (
            {"labels": ["a", "b"], "splits": {"train": ["t"], "dev": 3}},
            "splits.dev is 3: expected a list; give ['3']",
        ),
    ],
)
def test_the_list_that_an_error_names_is_one_that_the_key_takes(keys, said):
    kind = "regression" if "score_range" in keys else "classification"
    with pytest.raises(UserError) as caught:
        checked_task(TaskSpec("mine", kind, "{t}", **{**keys}))
    assert str(caught.value) == f"task 'mine': {said}"


@pytest.mark.parametrize("key", ["choices", "fields", "sentences"])
def test_a_list_of_a_task_from_python_is_no_text(key):
    with pytest.raises(UserError, match=rf"^{key} is of type str \('t'\); give a list of"):
        TaskSpec("mine", "classification", "{t}", labels=("a", "b"), **{key: "t"})


@pytest.mark.parametrize("lines", ["text_a: body\ntext_b: '{s}'", "text_a: '{s}'\ntext_b: body"])
def test_a_column_s_name_without_braces_is_no_text_of_every_row(lines, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\n{lines}\nlabels: [a, b]\n")
    task, key = load_task(str(file)), "text_a" if lines.startswith("text_a: body") else "text_b"
    with pytest.raises(UserError, match=rf"^{key} is 'body' in every row, .*: '\{{body\}}'$"):
        build_examples(task, [{"s": "x", "body": "y", "label": "a"}], "train", True)
    # a word that is not a column may be meant, in any script
    assert build_examples(task, [{"s": "x", "label": "a"}], "train", True).texts_a


def test_a_sentence_may_stand_in_every_row(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: m\ntext_a: '{mail}'\ntext_b: Is it spam?\nlabels: [spam, ham]\n")
    assert load_task(str(file)).text_b == "Is it spam?"


def test_a_task_without_its_ending_is_told_with_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(UserError, match=r"unknown task 'mine'; did you mean the file mine.yaml\?"):
        load_task("mine")


def test_tabs_in_a_csv_are_told_as_such(data):
    (data / "train.tsv").rename(data / "train.csv")
    with pytest.raises(UserError) as caught:
        load_official(grammar_task(data), data_of("m", "grammar", str(data)), "train")
    assert str(caught.value) == (
        f"data file {data / 'train.csv'}: tabs divide its columns (sentence, label), but a .csv "
        "has commas; name it .tsv"
    )


def test_a_folder_of_a_train_file_alone_is_told_how_it_serves(data):
    (data / "validation.tsv").unlink()
    told = r"data.validation=FILE, or data.train=FILE alone, of which a part is held out$"
    with pytest.raises(UserError, match=told):
        load_official(grammar_task(data), data_of("m", "grammar", str(data)), "validation")
    (data / "train.tsv").unlink()
    with pytest.raises(UserError, match=r"data.train=FILE$"):
        load_official(grammar_task(data), data_of("m", "grammar", str(data)), "train")


def test_a_word_in_place_of_a_score_is_the_row_s_fault(tmp_path):
    (tmp_path / "price.yaml").write_text("name: price\ntext_a: '{t}'\nscore_range: [0, 1]\n")
    task = load_task(str(tmp_path / "price.yaml"))
    with pytest.raises(UserError) as caught:
        build_examples(task, [{"t": "a", "label": "high"}], "train", True)
    assert "score_range in the task's" not in str(caught.value)


def test_a_score_out_of_range_may_be_a_matter_of_the_task_s_file(tmp_path):
    (tmp_path / "price.yaml").write_text("name: price\ntext_a: '{t}'\nscore_range: [0, 1]\n")
    (tmp_path / "train.csv").write_text("t,label\na,0.5\nb,2.5\n")
    with pytest.raises(
        UserError, match=r"from 0 to 1; fix the row, or score_range in the task's f"
    ):
        task = load_task(str(tmp_path / "price.yaml"))
        load_official(task, data_of("m", "price", str(tmp_path)), "train")


def test_labels_outside_the_set_are_counted_in_several_parts_of_a_long_file(data, monkeypatch):
    monkeypatch.setattr(unlabeled, "CHUNK", 8)
    lines = (data / "train.tsv").read_text().splitlines()
    for number in (3, 20, 35):  # of three chunks, of the first five
        lines[number] = lines[number].split("\t")[0] + "\tneutral"
    (data / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        UserError, match=r"train row 3: .*labels outside the set: 'neutral' \(3 rows\);"
    ):
        load_official(grammar_task(data), data_of("m", "grammar", str(data)), "train")
    # no gold label in rows of two chunks
    for number in (3, 20, 35):
        lines[number] = lines[number].split("\t")[0] + "\t"
    (data / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"train row 3: .*\(3 rows without one in all\)"):
        load_official(grammar_task(data), data_of("m", "grammar", str(data)), "train")


def test_one_row_is_told_in_the_singular():
    assert counted_rows(1, "rows not copied, which share a sentence with held-out rows") == (
        "1 row not copied, which shares a sentence with held-out rows"
    )
    assert counted_rows(1, "copies equal to a row or to another copy") == (
        "1 copy equal to a row or to another copy"
    )
    assert counted_rows(1, "unlabelled rows without a prediction in any file") == (
        "1 unlabelled row without a prediction in any file"
    )
    assert counted_rows(2, "copies with a held-out sentence") == "2 copies with a held-out sentence"


def test_a_shape_has_embeddings_for_words_whose_numbers_have_gaps(tmp_path, data):
    from transformers import BertTokenizerFast

    names = [*grammar_tokenizer().get_vocab(), "twice"]
    numbers = {name: number for number, name in enumerate(names)} | {"twice": len(names) + 3}
    tokenizer = BertTokenizerFast(vocab=numbers)
    config = load_config(words(data, [], tmp_path / "run"))
    model = build_student(config.student, grammar_task(data), tokenizer, 0)
    assert model.config.vocab_size == len(names) + 4 > len(tokenizer)
    check_vocabulary("m", tokenizer, model.config)


def test_weights_fitted_to_too_few_answers_are_refused_before_teachers_are_asked(tmp_path):
    data = write_task(tmp_path / "data", rows=420, dev=8)
    lines = (data / "train.tsv").read_text().splitlines()
    (tmp_path / "gpt.tsv").write_text("\n".join(lines[:301]) + "\n")
    file = f"{{predictions: {tmp_path / 'gpt.tsv'}}}"
    fitted = {"ensemble": "fitted", "selection__fraction": 0.5, "max_steps": 2}
    teachers = [save_teacher(tmp_path / "a"), file]
    config = load_config(words(data, teachers, tmp_path / "run", **fitted))
    with pytest.raises(UserError) as caught:
        distill(config, ALONE)
    assert re.search(
        r"ensemble=fitted needs 200 labelled rows of the selection split with a prediction of "
        r"every teacher, and there are 1\d\d; give files with predictions of more rows",
        str(caught.value),
    )
    assert not (tmp_path / "run").exists()


def test_rows_of_a_routed_run_are_written_for_whoever_answers_them(tmp_path, data):
    lines = (data / "train.tsv").read_text().splitlines()
    named = [f"{line}\t{'annotator' if n == 0 else 'ann'}" for n, line in enumerate(lines)]
    (data / "train.tsv").write_text("\n".join(named) + "\n")
    for more in ({"teacher_column": "annotator"}, {}):
        config = load_config(words(data, [], tmp_path / "run", ensemble="routed", **more))
        rows = tmp_path / f"rows{len(more)}.jsonl"
        write_rows(config, rows)
        assert len(rows.read_text().splitlines()) == 80


def test_the_mistake_of_a_long_file_is_that_of_its_row(data, monkeypatch):
    monkeypatch.setattr(unlabeled, "CHUNK", 8)
    lines = (data / "train.tsv").read_text().splitlines()
    lines[41] = lines[41].split("\t")[0] + "\tneutral"
    (data / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"train row 41: label 'neutral' .*\(1 row\)"):
        load_examples(load_config(words(data, [], data / "run")), grammar_task(data))
