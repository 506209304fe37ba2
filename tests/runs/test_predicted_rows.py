"""`sead-dist predict` in production: streams, other kinds of file, rows that cannot be read."""

import csv
import json

import pandas as pd
import pytest
from small import ALONE, save_random_bert
from transformers import pipeline

import sead_dist as sd
from sead_dist.errors import UserError
from sead_dist.runs.predicted_rows import Settings, predict_file, read_input
from sead_dist.runs.prediction import task_of


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_row_that_cannot_be_read_is_named_and_on_request_skipped(
    finished, tmp_path, capsys, shown
):
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["good", None, "bad", 7]
    file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    with pytest.raises(UserError, match=r"in.jsonl row 2: .* holds None; .*--skip-malformed"):
        predict_file(str(finished), file, None, output, None)
    predict_file(str(finished), file, None, output, None, skip_malformed=True)
    assert [row["sentence"] for row in lines_of(output)] == ["good", "bad"]
    said = capsys.readouterr().err
    assert "skipped: in.jsonl row 2: column 'sentence' holds None" in said
    assert "skipped: in.jsonl row 4: column 'sentence' holds 7" in said
    assert "skipped 2 rows that cannot be read" in said


def test_ragged_lines_are_skipped_on_request_and_listed(finished, tmp_path, caplog):
    file, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    file.write_text("id,sentence\n1,good\n2\n3,bad,more\n4,fine\n")
    with pytest.raises(UserError, match=r"in.csv:3: 1 field where 2 are expected"):
        predict_file(str(finished), file, None, output, None)
    predict_file(str(finished), file, None, output, None, skip_malformed=True)
    assert [row["id"] for row in lines_of(output)] == ["1", "4"]
    assert "skipped 2 malformed lines: 3, 4" in caplog.text


def test_a_file_without_one_good_row_is_refused_though_rows_are_skipped(finished, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "good"}\n{"text": "bad"}\n')
    with pytest.raises(UserError, match="no column 'sentence'; its columns: text"):
        predict_file(str(finished), file, None, None, None, skip_malformed=True)
    # without this row nothing is left
    with pytest.raises(UserError, match=r"no column 'sentence'; .* rename one in the file"):
        Settings().examples(task_of(str(finished), None), [{"text": "good"}], "in.jsonl")


def test_a_file_without_rows_is_no_split(finished):
    with pytest.raises(UserError, match=r"^e.csv has no rows; give at least one$"):
        Settings().examples(task_of(str(finished), None), [], "e.csv")


def test_what_is_read_as_another_kind_is_told_with_the_kinds(finished, tmp_path):
    file = tmp_path / "in"
    file.write_text("sentence\ngood\n")
    with pytest.raises(
        UserError, match=r"not JSON.*; it is read as jsonl; for another format give --kind"
    ):
        read_input(file, ".jsonl", task_of(str(finished), None), False, ALONE)


def test_texts_that_are_blank_or_cut_are_counted(finished, tmp_path, capsys, shown):
    file = tmp_path / "in.jsonl"
    texts = ["good", "", " \t", "the plot " * 300]
    file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    predict_file(str(finished), file, None, None, None)
    said = capsys.readouterr().err
    assert "2 rows with a blank text: 2, 3" in said
    assert "1 of 4 in in.jsonl" in said


def test_lines_of_text_are_labelled_and_a_task_of_two_texts_refuses_them(
    finished, grammar, tmp_path
):
    file = tmp_path / "in.txt"
    file.write_text("the plot was good\n\nthe plot , was\tbad\n")
    predict_file(str(finished), file, None, None, None)
    found = lines_of(tmp_path / "in.predicted.jsonl")
    assert [row["sentence"] for row in found] == ["the plot was good", "", "the plot , was\tbad"]
    pair = save_random_bert(tmp_path / "m", grammar / "tokenizer", ["a", "b"])
    with pytest.raises(UserError, match="task 'rte' reads sentence1, sentence2; give a TSV"):
        predict_file(str(pair), file, "rte", tmp_path / "o.jsonl", "task_order")


def test_a_csv_with_semicolons_is_read(finished, tmp_path):
    file, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    file.write_text('id;sentence\r\n1;"good ; very, good"\r\n2;bad\r\n', encoding="utf-8-sig")
    predict_file(str(finished), file, None, output, None)
    assert [row["sentence"] for row in lines_of(output)] == ["good ; very, good", "bad"]
    file.write_text('sentence\n"a;b"\n')  # one column, and a semicolon in its text
    output.unlink()
    predict_file(str(finished), file, None, output, None)
    assert [row["sentence"] for row in lines_of(output)] == ["a;b"]


def test_a_file_that_is_not_utf_8_is_named_with_the_line(finished, tmp_path):
    file = tmp_path / "in.tsv"
    file.write_bytes(b"sentence\ngood\nbad \xff\n")
    with pytest.raises(UserError, match=r"in.tsv:3 is not UTF-8"):
        predict_file(str(finished), file, None, None, None)


def test_a_file_whose_name_does_not_say_its_kind_asks_for_it(finished, tmp_path):
    file, output = tmp_path / "rows", tmp_path / "out.jsonl"
    file.write_text("sentence\ngood\n")
    with pytest.raises(UserError, match="give --kind tsv, csv, jsonl or txt"):
        predict_file(str(finished), file, None, output, None)
    predict_file(str(finished), file, None, output, None, kind="tsv")
    assert [row["sentence"] for row in lines_of(output)] == ["good"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_standard_input_goes_to_standard_output_with_progress_beside_it(
    ranks, finished, tmp_path, cli
):
    file = tmp_path / "in.csv"
    file.write_text("sentence\n" + "the plot was good\nthe plot was bad\n" * 20)
    whole = tmp_path / "whole.csv"
    predict_file(str(finished), file, None, whole, None)
    asked = ("predict", finished, "-", "--kind", "csv", "--batch-size", "7")
    done = cli(*asked, ranks=ranks, stdin=file)
    assert done.returncode == 0, done.stderr
    found, expected = (list(csv.DictReader(text.splitlines())) for text in (
        done.stdout, whole.read_text("utf-8")
    ))  # fmt: skip
    assert [r["predicted_label"] for r in found] == [r["predicted_label"] for r in expected]
    for one, other in zip(found, expected, strict=True):
        shares = [float(row["probability_positive"]) for row in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    assert "rows predicted: 40/40 (100%)" in done.stderr


def test_a_call_from_python_answers_none_for_a_skipped_row(finished):
    rows = [{"sentence": "good"}, {"sentence": None}, {"sentence": "bad"}]
    with pytest.raises(UserError, match="texts_or_rows row 2"):
        sd.predict(finished, rows)
    found = sd.predict(finished, rows, skip_malformed=True, batch_size=1)
    assert [answer is None for answer in found] == [False, True, False]
    assert found[2] == sd.predict(finished, ["bad"])[0]
    for other in (None, float("nan"), 7, "half \ud83d of a pair"):
        for texts in (["good", other, "bad"], pd.Series(["good", other, "bad"], dtype=object)):
            with pytest.raises(
                UserError, match=r"text 2 is of type|text 2 holds half of a surrogate"
            ):
                sd.predict(finished, texts)
            assert sd.predict(finished, texts, skip_malformed=True) == found
    with pytest.raises(UserError, match="batch_size=0"):
        sd.predict(finished, rows, batch_size=0)


def test_a_call_from_python_answers_none_for_a_malformed_line(finished, tmp_path):
    file = tmp_path / "in.csv"
    file.write_text("id,sentence\n1,good\n2\n3,bad\n")
    found = sd.predict(finished, file, skip_malformed=True)
    assert [answer is None for answer in found] == [False, True, False]
    assert found[2] == sd.predict(finished, ["bad"])[0]


def test_a_whole_number_beyond_64_bits_is_told_with_its_column(finished, tmp_path):
    row = {"sentence": "good", "key": 10**25}
    with pytest.raises(UserError, match=r"cannot be a table: column 'key': .*too large"):
        sd.predict(finished, [row])
    with pytest.raises(UserError, match=r"cannot be a table: .*too large"):
        sd.predict(finished, pd.DataFrame([row]))
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    output = tmp_path / "out.parquet"
    with pytest.raises(
        UserError, match=r"out.parquet: column 'key': .*too large.*; give a .jsonl file instead"
    ):
        predict_file(str(finished), tmp_path / "in.jsonl", None, output, None)
    assert not output.exists()
    predict_file(str(finished), tmp_path / "in.jsonl", None, output.with_suffix(".jsonl"), None)
    assert lines_of(output.with_suffix(".jsonl"))[0]["key"] == 10**25


def test_the_pipeline_of_the_card_says_what_predict_says_of_long_texts(finished):
    card = (finished / "README.md").read_text("utf-8")
    assert 'model="PATH_OR_ID_OF_THIS_MODEL", truncation=True)' in card
    texts = ["good", "the plot was good and the plot was bad " * 200]
    classify = pipeline("text-classification", model=str(finished / "model"), truncation=True)
    for told, answer in zip(classify(texts), sd.predict(finished, texts), strict=True):
        assert answer is not None
        assert told["label"] == answer["predicted_label"]
        share = answer[f"probability_{told['label']}"]
        assert told["score"] == pytest.approx(share, abs=1e-5)
