"""Unlabelled text: what the sample left out, rows of a file, and what is removed from both."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import config, sentences

from sead_dist.config import automatic
from sead_dist.data import unlabeled
from sead_dist.data.examples import sentence_hash
from sead_dist.data.loading import read_rows, row_chunks
from sead_dist.data.splits import load_examples, source_row
from sead_dist.data.tasks import TASKS
from sead_dist.errors import UserError
from sead_dist.runtime.run_log import noted

SST2 = TASKS["sst2"]
TEXTS = sentences(140, 7)


@pytest.fixture
def data(tmp_path):
    """100 training rows, of which one differs from a dev row by its capitals, and 20 dev rows."""
    train, dev = [*TEXTS[:99], TEXTS[100].upper()], TEXTS[100:120]
    for name, texts in (("train", train), ("validation", dev)):
        lines = [f"{text}\t{n % 2}" for n, text in enumerate(texts)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (tmp_path / "more.tsv").write_text("\n".join(["sentence", *TEXTS[115:135], *TEXTS[:2]]) + "\n")
    return tmp_path


def load(data, *given, **changes):
    keys = {"data__path": data, "teachers": "[somewhere]", **changes}
    with noted() as notes:
        examples = load_examples(config(*given, **keys), SST2)
    return examples, notes


def kinds(examples):
    return [examples.kind(n) for n in range(len(examples.train))]


def test_rows_that_the_sample_left_out_are_text_without_labels(data):
    examples, notes = load(data, data__max_train_examples=30)
    assert examples.labelled_rows == 27
    assert len(examples.selection) == 3
    # 90 are not held out, 27 sampled, and one is a dev sentence
    shared = TEXTS[100].upper() not in examples.train.texts_a[:27]
    assert examples.unlabelled_rows == examples.rest_rows == 63 - shared
    assert notes[0].startswith(f"unlabelled text: {63 - shared} rows of the train file, 0 of unl")
    assert f"{int(shared)} removed, which share a sentence with selection or held-out" in notes[0]
    assert set(examples.train.labels_B[:27]) <= {0, 1}
    assert set(examples.train.labels_B[27:]) == {-1}
    assert len(set(examples.train.texts_a)) == len(examples.train)
    held = {text.casefold() for text in examples.selection.texts_a + TEXTS[100:120]}
    assert not held & {text.casefold() for text in examples.train.texts_a[27:]}
    assert source_row(examples, examples.train, 40) == (
        f"row {examples.train.rows_B[40] + 1} of train"
    )


def test_held_out_rows_that_the_selection_sample_left_out_are_no_text(data):
    whole, _ = load(data)
    small, _ = load(data, data__max_train_examples=30)
    assert len(whole.selection) == 10
    assert not set(whole.selection.texts_a) & set(small.train.texts_a)


def test_selecting_on_dev_leaves_text_over_too(data):
    examples, _ = load(data, "selection.split=dev", data__max_train_examples=30)
    assert examples.labelled_rows == 30
    assert examples.unlabelled_rows in (69, 70)


def test_a_run_without_teachers_or_with_rest_false_has_no_such_text(data):
    sampled = {"data__max_train_examples": 30}
    for changes in ({"teachers": "[]"}, {"ensemble": "none"}, {"unlabeled__rest": "false"}):
        examples, notes = load(data, **sampled, **changes)
        assert len(examples.train) == 27
        assert not any("unlabelled text" in note for note in notes)


def test_text_without_the_column_of_the_task_is_told_with_its_file(data):
    (data / "other.tsv").write_text("review\ngood\n")
    told = r"row 1: no column 'sentence'.*\(unlabeled.path=.*other.tsv\)$"
    with pytest.raises(UserError, match=told):
        load(data, unlabeled__path=data / "other.tsv")


def test_where_nothing_is_left_over_the_log_names_the_key_of_a_file(data):
    for given in ({}, {"unlabeled__rest": "true"}):
        assert load(data, **given)[1][0] == (
            "unlabelled text: 0 rows (0 removed), because the sample leaves out no other row of "
            "the train file; give a file of text: unlabeled.path=FILE"
        )


def test_where_all_text_of_a_file_is_held_out_the_log_asks_for_another_file(data):
    dev = (data / "validation.tsv").read_text()
    (data / "text.tsv").write_text(dev)
    rows = len(dev.splitlines()) - 1
    assert load(data, unlabeled__path=data / "text.tsv")[1][0] == (
        f"unlabelled text: 0 rows, because each of {rows} rows shares a sentence with selection or "
        "held-out rows; give a file of other text: unlabeled.path=FILE"
    )


def test_a_class_without_a_training_row_is_told(data):
    assert not any("no training row" in note for note in load(data)[1])
    for missing, told in (
        (["neutral"], "the label 'neutral', so no gold label teaches it; add rows with it, or re"),
        (["neutral", "mixed"], "one of the labels 'neutral', 'mixed', so no gold label teaches th"),
    ):
        task = replace(SST2, labels=(*SST2.labels, *missing))
        with noted() as notes:
            load_examples(config(data__path=data), task)
        assert notes[-1].startswith(f"WARNING: no training row has {told}")
        assert notes[-1].endswith("from the task's labels")


def test_text_of_a_file_stands_beside_the_rest_and_the_ratio_is_of_both(data):
    more = {"unlabeled__path": data / "more.tsv", "data__max_train_examples": 30}
    examples, notes = load(data, **more)
    counts = {kind: kinds(examples).count(kind) for kind in ("labelled", "rest", "text")}
    # 22 rows, of which five are dev rows
    assert (
        counts["text"]
        + (TEXTS[0] in examples.selection.texts_a)
        + (TEXTS[1] in examples.selection.texts_a)
        == 17
    )
    assert (
        f"{counts['rest']} rows of the train file, {counts['text']} of unlabeled.path" in notes[0]
    )
    half, _ = load(data, unlabeled__ratio=1, **more)
    assert half.unlabelled_rows == 27
    both = {kind: kinds(half).count(kind) for kind in ("rest", "text")}
    assert both["rest"] > 10
    assert both["text"] > 1
    texts = examples.train.texts_a
    for text, kind in zip(half.train.texts_a, kinds(half), strict=True):
        assert kinds(examples)[texts.index(text)] == kind or texts.count(text) > 1
    assert source_row(half, half.train, len(half.train) - 1).endswith("of the unlabelled text")
    alone, _ = load(data, unlabeled__rest="false", **more)
    assert kinds(alone).count("rest") == 0


def test_rest_keeps_the_data_of_runs_that_have_nothing_left_over(data):
    first, second = load(data)[0], load(data, unlabeled__rest="false")[0]
    assert first.fingerprint(SST2) == second.fingerprint(SST2)
    assert first.fingerprint(replace(SST2, symmetric=True)) == first.fingerprint(SST2)


def test_a_file_is_read_in_chunks_as_it_is_read_whole(data, monkeypatch):
    wanted = {"unlabeled__path": data / "more.tsv", "data__max_train_examples": 30}
    whole = [load(data, **wanted, **more)[0] for more in ({}, {"unlabeled__ratio": 0.2})]
    monkeypatch.setattr(unlabeled, "CHUNK", 4)
    parts = [load(data, **wanted, **more)[0] for more in ({}, {"unlabeled__ratio": 0.2})]
    for one, other in zip(whole, parts, strict=True):
        assert one.fingerprint(SST2) == other.fingerprint(SST2)
        assert one.train.rows_B.tolist() == other.train.rows_B.tolist()


ODD = 'a "b"\n\n"c ""d"" e"\nline\r\n'


@pytest.mark.parametrize("name", ["x.tsv", "x.jsonl", "x.json", "x.parquet", "x.csv", "list.jsonl"])
def test_chunks_are_the_rows_of_the_whole_file(tmp_path, name):
    path, rows = tmp_path / name, [{"sentence": text, "n": str(n)} for n, text in enumerate(TEXTS)]
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    elif name == "list.jsonl":
        path.write_text(json.dumps(rows))
    elif name in ("x.jsonl", "x.json"):
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [f"{row['sentence']}{',' if name == 'x.csv' else chr(9)}{row['n']}" for row in rows]
        head = "sentence,n" if name == "x.csv" else "sentence\tn"
        path.write_text("\n".join([head, *lines]) + "\n")
    chunks = list(row_chunks(path, SST2, False, 33))
    assert [row for chunk in chunks for row in chunk] == read_rows(path, SST2) == rows
    streamed = name in ("x.tsv", "x.jsonl", "x.parquet")
    assert max(map(len, chunks)) <= 33 if streamed else len(chunks) == 1


@pytest.mark.parametrize("text", ["sentence\n" + ODD, ODD, "", "\n\n", "sentence\tlabel\na\t1\n"])
def test_odd_tables_are_the_same_in_chunks(tmp_path, text):
    path, own = tmp_path / "x.tsv", replace(SST2, name="own")
    path.write_bytes(("\ufeff" + text).encode())
    for task in (SST2, own):
        chunks = row_chunks(path, task, True, 1)
        assert [row for chunk in chunks for row in chunk] == read_rows(path, task, True)


def test_an_empty_line_is_an_empty_text_between_rows_of_one_column_alone(tmp_path):
    (tmp_path / "x.tsv").write_text("\n\nsentence\na\n\nb\n\n")
    rows = [row["sentence"] for (row,) in row_chunks(tmp_path / "x.tsv", SST2, False, 1)]
    assert rows == ["a", "", "b"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.tsv", b"sentence\tn\na\t1\nb\n", r"x.tsv:3: 1 field where 2 are expected"),
        ("x.tsv", b"sentence\na\n\xff\n", r"x.tsv is not UTF-8"),
        ("x.jsonl", b'{"sentence": "a"}\n{"sen\n', r"x.jsonl:2: not JSON"),
        ("x.parquet", b"PAR1 no", r"x.parquet is not a complete .parquet file"),
        ("x.tsv", None, r"x.tsv does not exist"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_of_chunks_too(tmp_path, name, content, what):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=what):
        list(row_chunks(path, SST2, False, 2))


@pytest.mark.slow
def test_a_long_file_needs_no_more_memory_than_what_is_used_of_it(data, monkeypatch):
    (data / "long.tsv").write_text(
        "sentence\n" + "".join(f"row number {n}\n" for n in range(40000))
    )
    wanted = {"unlabeled__path": data / "long.tsv", "unlabeled__ratio": 2}
    peaks = []
    for size in (100_000, 1000):
        monkeypatch.setattr(unlabeled, "CHUNK", size)
        tracemalloc.start()
        examples, _ = load(data, **wanted)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert examples.unlabelled_rows == 180
    assert peaks[1] < peaks[0] / 10


def test_capitals_and_blanks_make_no_other_sentence():
    known = {}
    one = sentence_hash("A man is dancing.", known)
    for text in ("a MAN  is dancing.", " A man\tis\u00a0dancing. "):
        assert sentence_hash(text, known) == one
    assert sentence_hash("Aman is dancing.", known) != one
    assert sentence_hash(" \u00a0\t", known) == 0


@pytest.mark.slow
def test_no_more_text_is_kept_than_the_longest_run_reads(data, monkeypatch):
    monkeypatch.setattr(automatic, "MOST_STEPS", 50)
    monkeypatch.setattr(unlabeled, "CHUNK", 1000)
    peaks = []
    for count in (10_000, 40_000):
        lines = "".join(f"row number {n}\n" for n in range(count))
        (data / "long.tsv").write_text("sentence\n" + lines)
        tracemalloc.start()
        examples, notes = load(data, unlabeled__path=data / "long.tsv", global_batch_size=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert examples.unlabelled_rows == 50 * 16
        assert f"; {count - 800} more left out: no run is that long" in notes[0]
    assert peaks[1] < 1.2 * peaks[0]
    # a longer run reads more
    assert (
        load(data, unlabeled__path=data / "long.tsv", max_steps=10_000)[0].unlabelled_rows == 40_000
    )


def test_a_ratio_keeps_no_more_text_than_the_longest_run_reads(data, monkeypatch):
    monkeypatch.setattr(automatic, "MOST_STEPS", 2)
    lines = "".join(f"row number {n}\n" for n in range(200))
    (data / "long.tsv").write_text("sentence\n" + lines)
    more = {"unlabeled__path": data / "long.tsv", "global_batch_size": 16}
    # 90 labelled rows: the ratio is 180 rows, and a run of two steps reads 32
    examples, notes = load(data, unlabeled__ratio=2, **more)
    assert examples.unlabelled_rows == 32
    assert "; 148 more left out: no run is that long" in notes[0]
    few, notes = load(data, unlabeled__ratio=0.2, **more)
    assert few.unlabelled_rows == 18
    assert "left out" not in notes[0]


def test_rows_of_later_chunks_are_named_by_their_place_in_the_file(data, monkeypatch):
    monkeypatch.setattr(unlabeled, "CHUNK", 4)
    rows = [{"sentence": text} for text in TEXTS[120:130]] + [{"sentence": None}]
    (data / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="unlabelled text row 11: column 'sentence' holds None"):
        load(data, unlabeled__path=data / "more.jsonl")
    assert np.unique(load(data)[0].train.rows_B).size == 90
