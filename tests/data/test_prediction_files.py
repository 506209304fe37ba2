"""Files of predictions: the forms they have, and what is refused of them."""

import json
import math
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import TASK, config, example_set

from sead_dist.config.schema import TeacherConfig
from sead_dist.data.prediction_file import id_of, read_prediction_file, text_keys
from sead_dist.data.tasks import load_task
from sead_dist.errors import UserError

MNLI = load_task("mnli")
STSB = load_task("stsb")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def read(path, task=TASK, **keys):
    entry = TeacherConfig.model_validate({"predictions": str(path), **keys})
    return read_prediction_file(entry, "gpt", task)


def p_of(file):
    """The probabilities that the values stand for, by text or id."""
    e = np.exp(file.values_KC.astype(np.float64))
    p = (e / e.sum(axis=1, keepdims=True)).round(4).tolist()
    return {
        key if isinstance(key, str) else key[0]: row for key, row in zip(file.keys, p, strict=True)
    }


CSV = {
    "a column for each class": ("sentence,negative,positive\na,.2,.8\nb,.9,.1\n", {}),
    "names as predictions have them": ("sentence,probability_positive,probability_negative\na,.8,.2\nb,.1,.9\n", {}),
    "capitals and blanks": ("sentence, Positive ,NEGATIVE\na,.8,.2\nb,.1,.9\n", {}),
    "another column beside": ("note,sentence,negative,positive\nx,a,.2,.8\ny,b,.9,.1\n", {}),
    "sums that are rounded": ("sentence,negative,positive\na,.202,.808\nb,.909,.101\n", {}),
    "log-probabilities": (
        f"sentence,negative,positive\na,{math.log(0.2)},{math.log(0.8)}\nb,{math.log(0.9)},{math.log(0.1)}\n", {},
    ),
    "logits": (f"sentence,negative,positive\na,0,{math.log(4)}\nb,{math.log(9) + 3},3\n", {"kind": "logits"}),
    "names that are mapped": ("sentence,bad,good\na,.2,.8\nb,.9,.1\n", {"labels": {"bad": "negative", "Good": "positive"}}),
    "labels with a confidence": ("sentence,label,confidence\na,positive,.8\nb,negative,.9\n", {}),
    "columns of other names": (
        "sentence,said,sure\na,positive,.8\nb,negative,.9\n", {"column": "said", "confidence": "sure"},
    ),
    "predictions before gold labels": (
        "sentence,label,prediction,confidence\na,negative,positive,.8\nb,positive,negative,.9\n", {},
    ),
    "a missing answer": ("sentence,label,confidence\na,positive,.8\nb,negative,.9\nc,Unsure,.5\nd,,.5\n", {"abstain": ["unsure", ""]}),
    "an unknown label that is skipped": (
        "sentence,label,confidence\na,positive,.8\nb,negative,.9\nc,neutral,.5\n", {"unknown": "skip"},
    ),
    "the most probable labels": (
        'sentence,label\na,"{""positive"": 0.8}"\nb,"[[""negative"", 0.9]]"\n', {"kind": "top_k"},
    ),
    "the most probable labels by logarithms": (
        f'sentence,label\na,"[{{""token"": ""positive"", ""logprob"": {math.log(0.8)}}}]"\n'
        f'b,"{{""negative"": {math.log(0.9)}}}"\n', {"kind": "top_k"},
    ),
    "the most probable labels, some of probability 0": (
        'sentence,label\na,"{""negative"": 0.2}"\nb,"{""negative"": 0.9}"\nc,"{""positive"": 0.0}"\n', {"kind": "top_k"},
    ),
    "rows that are twice there and agree": ("sentence,negative,positive\na,.2,.8\nb,.9,.1\na,.2,.8\n", {}),
    "rows that are averaged": ("sentence,negative,positive\na,.1,.9\nb,.9,.1\na,.3,.7\n", {"duplicates": "mean"}),
    "votes": (
        "sentence,annotator,label\n" + "".join(f"a,{n},positive\n" for n in range(8)) + "a,8,negative\na,9,negative\n"
        + "".join(f"b,{n},negative\n" for n in range(9)) + "b,9,positive\n", {"smoothing": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", CSV)
def test_every_form_says_the_same(form, tmp_path):
    text, keys = CSV[form]
    file = read(write(tmp_path / "gpt.csv", text), **keys)
    said = p_of(file)
    # a row of the form with a probability of 0
    assert said.pop("c", [1.0, 0.0]) == [1.0, 0.0]
    assert said == {"a": [0.2, 0.8], "b": [0.9, 0.1]}
    tabs = write(tmp_path / "gpt.tsv", text.replace(",", "\t")) if '"' not in text else None
    if tabs is not None:
        assert np.array_equal(read(tabs, **keys).values_KC, file.values_KC)


def test_a_mapping_of_numbers_is_of_numbers_however_they_are_written(tmp_path):
    # a column of whole numbers with a gap is read as 1.0, and is not a place among the task's labels
    table = {"sentence": ["a", "b", "c"], "label": [0.0, 1.0, None]}
    pq.write_table(pa.table(table), tmp_path / "gpt.parquet")
    keys = {"labels": {0: "positive", 1: "negative"}, "abstain": [""]}
    said = {name: p > 0.5 for name, (_, p) in p_of(read(tmp_path / "gpt.parquet", **keys)).items()}
    assert said == {"a": True, "b": False}
    file = write(tmp_path / "gpt.csv", "sentence,label\na,0\nb,1\n")
    with pytest.raises(UserError, match="labels that task small does not have: '1' 1"):
        read(file, labels={"0": "positive"})
    assert read(file, labels={"Pos": "positive"}).keys == [("a",), ("b",)]


def test_an_empty_cell_of_any_kind_is_a_missing_answer_where_it_is_said(tmp_path):
    rows = '{"sentence": "a", "label": NaN}\n{"sentence": "b", "label": "positive"}\n'
    file = read(write(tmp_path / "gpt.jsonl", rows), abstain=[""])
    assert file.keys == [("b",)]
    assert "1 row without a prediction ('')" in file.notes


def test_of_two_columns_of_labels_the_teachers_must_be_named(tmp_path):
    text = "sentence,label,gpt4,note\na,positive,negative,x\nb,negative,,y\n"
    file = write(tmp_path / "gpt.csv", text)
    with pytest.raises(
        UserError, match=r"'label' and 'gpt4' both hold predictions .* column: gpt4"
    ):
        read(file)
    assert read(file, column="label").keys == [("a",), ("b",)]
    assert read(file, column="gpt4", abstain=[""]).keys == [("a",)]
    # a second name of the same class, a seed and a fold are not a second choice
    for more in (
        "label_text,seed\na,positive,Positive,0\nb,negative,Negative,1\n",
        "fold,votes\na,positive,0,1\nb,negative,1,1\n",
    ):
        same = write(tmp_path / "same.csv", f"sentence,label,{more}")
        assert read(same).keys == [("a",), ("b",)]
    # which of a file's own names is meant is not a guess either
    two = write(tmp_path / "two.csv", "sentence,prediction,answer\na,positive,negative\n")
    with pytest.raises(UserError, match="'prediction' and 'answer' both hold predictions"):
        read(two)
    scores = "sentence1,sentence2,year,score,gpt\na,b,2012,3.5,1\nc,d,2013,2,4.5\n"
    with pytest.raises(UserError, match="'score' and 'gpt' both hold predictions of task stsb"):
        read(write(tmp_path / "scores.csv", scores), STSB)
    own = "sentence1,sentence2,gold_label,score,a_score\na,b,3.5,3,3.2\n"
    assert read(write(tmp_path / "own.csv", own), STSB).values_KC.tolist() == [[3.0]]


def test_the_probability_of_one_class_is_no_confidence(tmp_path):
    rows = [f"n{n},negative,0.0{n}" for n in range(10)] + [
        f"p{n},positive,0.9{n}" for n in range(9)
    ]
    head = "sentence,prediction,probability"
    with pytest.raises(UserError, match=r"'probability' is below 0\.5 in all 10 rows of the la"):
        read(write(tmp_path / "gpt.csv", "\n".join([head, *rows])))
    # a doubtful answer or two are what they are
    file = read(write(tmp_path / "few.csv", "\n".join([head, *rows[5:]])))
    assert p_of(file)["n5"] == [0.05, 0.95]


def test_a_score_of_another_scale_is_refused_with_its_row(tmp_path):
    head = "sentence1,sentence2,score\na,b,3\n"
    with pytest.raises(UserError, match=r"row 2: column 'score' holds 87, .* go from 0 to 5"):
        read(write(tmp_path / "gpt.csv", head + "c,d,87\n"), STSB)
    assert len(read(write(tmp_path / "near.csv", head + "c,d,5.2\n"), STSB).keys) == 2


def test_a_label_alone_is_one_vote(tmp_path):
    file = read(write(tmp_path / "gpt.csv", "sentence,label\na,positive\n"))
    assert p_of(file) == {"a": [round(0.1 / 1.2, 4), round(1.1 / 1.2, 4)]}
    sample = "sentence,sample,label\na,1,positive\na,2,positive\na,3,negative\n"
    file = read(write(tmp_path / "votes.csv", sample), smoothing=0.5)
    assert p_of(file) == {"a": [round(1.5 / 4, 4), round(2.5 / 4, 4)]}
    assert file.notes == ["1 row by votes, smoothed by 0.5 a class"]


def test_each_vote_without_a_name_counts(tmp_path):
    rows = [{"sentence": "a", "annotator": who, "label": "positive"} for who in (None, None, " ")]
    rows += [{"sentence": "a", "annotator": "x", "label": "negative"}] * 2
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file = read(write(tmp_path / "gpt.jsonl", lines), smoothing=0)
    assert p_of(file) == {"a": [0.25, 0.75]}


def test_the_rest_of_a_confidence_and_of_a_list_is_shared_out(tmp_path):
    rows = "premise,hypothesis,label,confidence\np,h,neutral,.6\n"
    file = read(write(tmp_path / "gpt.csv", rows), MNLI)
    assert file.keys == [("p", "h")]
    assert p_of(file) == {"p": [0.2, 0.6, 0.2]}
    lines = json.dumps(
        {"premise": "p", "hypothesis": "h", "answer": {"neutral": 0.6, "entailment": 0.3}}
    )
    file = read(write(tmp_path / "gpt.jsonl", lines + "\n"), MNLI, kind="top_k")
    assert p_of(file) == {"p": [0.3, 0.6, 0.1]}
    assert file.notes == [
        "top_k: on average 0.1000 of the probability goes to labels that are not listed"
    ]


def test_scores_are_read_as_they_are(tmp_path):
    rows = "sentence1,sentence2,score\na,b,3.5\nc,d,\n"
    file = read(write(tmp_path / "gpt.csv", rows), STSB, abstain=[""])
    assert file.values_KC.tolist() == [[3.5]]
    twice = "sentence1,sentence2,score\na,b,3\na,b,4\n"
    file = read(write(tmp_path / "gpt.csv", twice), STSB, duplicates="mean")
    assert file.values_KC.tolist() == [[3.5]]


def test_float32_logits_of_a_parquet_file_keep_their_bits(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    texts = [f"text {n}" for n in range(50)]
    columns = {"sentence": texts, "negative": values[:, 0], "positive": values[:, 1]}
    pq.write_table(pa.table(columns), tmp_path / "gpt.parquet")
    assert np.array_equal(read(tmp_path / "gpt.parquet", kind="logits").values_KC, values)


def test_rows_are_found_by_text_in_normal_form_c_and_stripped_and_by_id(tmp_path):
    text = "caf\u00e9 noir"
    examples = example_set([f" {text}\n"])
    (key,) = text_keys(examples)
    file = read(
        write(
            tmp_path / "a.csv", f"sentence,label\n{unicodedata.normalize('NFD', text)} ,positive\n"
        )
    )
    assert file.keys == [key]
    id_ = id_of(examples.ids_B2[0])
    file = read(write(tmp_path / "b.csv", f"id,label\n{id_.upper()},positive\n"))
    assert (file.by_id, file.keys) == (True, [id_])
    file = read(write(tmp_path / "c.csv", f"key,sentence,label\n{id_},x,positive\n"), id="key")
    assert file.keys == [id_]


def test_ids_of_a_persons_own_are_refused_and_are_nothing_beside_texts(tmp_path):
    ids = pa.table({"id": [1, 2], "label": ["positive", "negative"]})
    pq.write_table(ids, tmp_path / "own.parquet")
    own = write(tmp_path / "own.csv", "id,key,label\nr1,k1,positive\nr2,k2,negative\n")
    for path, column, keys in ((tmp_path / "own.parquet", "id", {}), (own, "key", {"id": "key"})):
        said = f"row 1: column '{column}' holds .*, which is not an id as `sead-dist labels --rows` writes"
        with pytest.raises(UserError, match=said):
            read(path, **keys)
    rows = "id,sentence,label\n7,a,positive\n7,b,negative\n8,c,positive\n"
    file = read(write(tmp_path / "texts.csv", rows))
    assert (file.by_id, file.keys) == (False, [("a",), ("b",), ("c",)])


def test_unknown_labels_are_told_at_once_with_their_counts(tmp_path):
    rows = "sentence,label\n" + "".join(
        f"{n},{'neutral' if n % 3 else 'mixed'}\n" for n in range(9)
    )
    with pytest.raises(
        UserError, match="'neutral' 6, 'mixed' 3; its labels: negative, positive; map"
    ):
        read(write(tmp_path / "gpt.csv", rows))


HEAD = "sentence,negative,positive\n"
BAD = {
    "no rows": (HEAD, {}, "gpt.csv has no rows; give a file that has some"),
    "no such column of ids": (HEAD + "a,.2,.8\n", {"id": "key"}, "has no column 'key' \\(id=key\\).*; name one of these with id, or leave id out$"),
    "neither id nor text": ("text,label\na,positive\n", {}, "neither a column 'id' nor the text column 'sentence'"),
    "ids of another kind": ("id,label\n17,positive\n", {}, "row 1: column 'id' holds '17', which is not an id"),
    "a class without a column": ("sentence,negative\na,.2\n", {}, "has columns of classes \\(negative\\), and none for positive"),
    "two columns of a class": ("sentence,negative,positive,p_positive\na,.2,.8,.8\n", {}, "both belong to the label 'positive'"),
    "no answers at all": ("sentence,note\na,x\n", {}, "has no predictions: expected a column for each class"),
    "NaN": (HEAD + "a,.2,.8\nb,nan,.1\n", {}, "row 2: column 'negative' holds 'nan'; expected a number"),
    "a blank": (HEAD + "a,.2,\n", {}, "row 1: column 'positive' holds ''; expected a number"),
    "a word": (HEAD + "a,low,.8\n", {}, "row 1: column 'negative' holds 'low'; expected a number"),
    "infinity": (HEAD + "a,inf,.8\n", {"kind": "logits"}, "column 'negative' holds 'inf'"),
    "minus infinity as a logit": (HEAD + "a,-inf,.8\n", {"kind": "logits"}, "column 'negative' holds '-inf'"),
    "a sum that is not 1": (HEAD + "a,.2,.8\nb,.5,.9\n", {}, "row 2: its probabilities sum to 1.4; expected 1 within"),
    "logits without a word": (HEAD + "a,-2,3\n", {}, "row 1: -2, 3 are not probabilities.*kind: logits"),
    "a probability above 1": (HEAD + "a,-.2,1.2\n", {"kind": "probabilities"}, "row 1: -0.2, 1.2 are not probabilities"),
    "logarithms above 0": (HEAD + "a,.2,.8\n", {"kind": "log_probabilities"}, "are not log-probabilities.*after exp"),
    "logarithms of no probabilities": (HEAD + "a,-1,-1\n", {}, "row 1: its probabilities sum to 0.7358"),
    "probabilities that are none": ("sentence,label\na,positive\n", {"kind": "probabilities"}, "kind: probabilities needs a column for each class"),
    "duplicates that differ": (HEAD + "a,.2,.8\nb,.5,.5\na,.3,.7\n", {}, "rows 1 and 3 hold different predictions of 'a'; remove one"),
    "an unknown label": ("sentence,label\na,maybe\n", {}, "has labels that task small does not have: 'maybe' 1"),
    "nothing but unknown labels": ("sentence,label\na,maybe\n", {"unknown": "skip"}, "has no prediction of any row: each one is missing or an unknown label; add"),
    "nothing but missing answers": ("sentence,label\na,?\n", {"abstain": ["?"]}, "has no prediction of any row"),
    "a label that is not there": ("sentence,label\na,\n", {}, "labels that task small does not have: '' 1"),
    "a mapping to no label": ("sentence,label\na,x\n", {"labels": {"x": "good"}}, "'x' stands for 'good', which is not a label of task small"),
    "a confidence above 1": ("sentence,label,confidence\na,positive,95\n", {}, "row 1: column 'confidence' holds '95'; expected a probability"),
    "a confidence that is NaN": ("sentence,label,confidence\na,positive,nan\n", {}, "column 'confidence' holds 'nan'"),
    "no such confidence": ("sentence,label\na,positive\n", {"confidence": "sure"}, "has no column 'sure' \\(confidence=sure\\)"),
    "no such answers": ("sentence,label\na,positive\n", {"column": "said"}, "has no column 'said' \\(column=said\\); .*found by: label; name one of these with column"),
    "no such annotators": ("sentence,label\na,positive\n", {"annotator": "who"}, "has no column 'who' \\(annotator=who\\)"),
    "two votes of one": ("sentence,annotator,label\na,x,positive\na,x,negative\n", {}, "rows 1 and 2 are two votes of annotator x"),
    "a list without a word": ('sentence,label\na,"{""positive"": 0.9}"\n', {}, "row 1: column 'label' holds.*kind: top_k"),
    "a list that is none": ("sentence,label\na,positive\n", {"kind": "top_k"}, "row 1: column 'label' holds 'positive'; expected labels with their"),
    "a list that sums to more": ('sentence,label\na,"{""positive"": 0.9, ""negative"": 0.3}"\n', {"kind": "top_k"}, "sum to 1.2; expected at most 1"),
    "logarithms beside probabilities": ('sentence,label\na,"{""positive"": 0.9}"\nb,"{""positive"": -0.1}"\n', {"kind": "top_k"}, "row 2: column 'label' holds .*-0.1.*; expected labels with their"),
    "a logit that is no float32": (HEAD + "a,1e39,0\n", {"kind": "logits"}, "row 1: column 'negative' holds '1e39'; expected a number"),
    "scores for classes": ("sentence,score\na,1\n", {"kind": "scores"}, "kind: scores is for tasks of scores"),
    "two columns of one name": ("sentence,label,label\na,positive,positive\n", {}, "has the column 'label' twice"),
    "a short line": (HEAD + "a,.2\n", {}, "predictions of teacher gpt: .*gpt.csv:2: 2 fields where 3 are expected.*; fix the line$"),
    "percentages": (HEAD + "a,30,70\nb,0,99.5\n", {}, "row 1: 30, 70 are percentages, here and in all other rows; .*divide by 100$"),
    "percentages that are said to be probabilities": (HEAD + "a,30,70\n", {"kind": "probabilities"}, "divide by 100$"),
    "shares that do not sum to 1": (HEAD + "a,.2,.7\n", {}, "sum to 0.9; expected 1 within 0.02; correct the row$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(case, tmp_path):
    text, keys, message = BAD[case]
    with pytest.raises(UserError, match=message) as told:
        read(write(tmp_path / "gpt.csv", text), **keys)
    assert "\n" not in str(told.value)
    assert "gpt.csv" in str(told.value)


@pytest.mark.parametrize(
    ("name", "bytes_", "message"),
    [
        ("gpt.parquet", b"no parquet", "is not a complete .parquet file"),
        ("gpt.jsonl", b"{\n", "not JSON"),
        ("gpt.csv", b"\xff\xfe", "is not UTF-8"),
        ("gpt.xlsx", b"a", "unknown kind '.xlsx'"),
        ("gpt.txt", b"a", "teacher gpt: .* unknown kind '.txt'; allowed: .tsv, .*[.]arrow$"),
        ("gpt.jsonl", b"[1, 2]\n3\n", "predictions of teacher gpt: .*not JSON"),
        ("gpt.jsonl", b"{}\n[1,2]\n", "gpt.jsonl:2: '.1,2.' is not a JSON object; fix the line$"),
        ("gpt.jsonl", b'{"sentence": 3, "label": "positive"}\n', "column 'sentence' holds 3; expected text"),
        ("gpt.jsonl", b'{"sentence": "a", "label": null}\n', "row 1: column 'label' holds no label \\(None\\)"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_file_of_predictions_are_told(name, bytes_, message, tmp_path):
    (tmp_path / name).write_bytes(bytes_)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_folder_and_no_file_are_told_as_the_predictions_of_a_teacher(tmp_path):
    with pytest.raises(UserError, match=r"predictions of teacher gpt: .* is a folder; give a file"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"predictions of teacher gpt: .*5 does not exist"):
        read(tmp_path / "5")


def test_what_is_no_score_is_refused(tmp_path):
    head = "sentence1,sentence2,score\n"
    with pytest.raises(UserError, match="row 1: column 'score' holds 'high'; expected a number"):
        read(write(tmp_path / "gpt.csv", head + "a,b,high\n"), STSB)
    with pytest.raises(UserError, match="kind: logits is for classes, and task stsb has scores"):
        read(write(tmp_path / "gpt.csv", head + "a,b,1\n"), STSB, kind="logits")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{predictions: a.csv, dtype: bf16}", "dtype is for a model, and this is a file of"),
        ("{predictions: a.csv, offload: true}", "offload is for a model"),
        ("{predictions: a.csv, chat: true}", "for a language model, and this is a file of pred"),
        ("{predictions: a.csv, placement: pool}", "a file of predictions has no placement pool"),
        ("{predictions: a.csv, path: b}", "path names a model and predictions a file"),
        ("{predictions: a.csv, labels: [a, b]}", "give labels as {NAME: LABEL}"),
        ("{predictions: a.csv, kind: model}", "should be 'auto', 'probabilities'"),
        ("{predictions: a.csv, unknown: keep}", "should be 'reject' or 'skip'"),
        ("{predictions: a.csv, duplicates: refuse}", "should be 'reject' or 'mean'"),
        ("{predictions: a.csv, smoothing: -1}", "greater than or equal to 0"),
        ("{path: a, abstain: [x]}", "abstain is for a file of predictions, and this is a model"),
        ("{path: a, labels: {a: b}}", "give labels as a list of names, or task_order"),
        ("{path: a, kind: logits}", "should be 'model'"),
    ],
)
def test_keys_that_do_not_fit_are_refused_before_the_file_is_read(entry, message):
    with pytest.raises(UserError, match=message):
        config(f"teachers=[{entry}]")


def test_a_row_whose_cells_are_all_empty_is_no_answer(tmp_path):
    """As `labels --output` writes a row that no teacher answers."""
    file = read(write(tmp_path / "soft.csv", "sentence,negative,positive\na,.2,.8\nb,,\n"))
    assert p_of(file) == {"a": [0.2, 0.8]}
