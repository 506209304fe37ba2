"""Files and words that were read wrongly without a word: names decide, twins are refused."""

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import load_split

from sead_dist.data.examples import build_examples
from sead_dist.data.loading import names_decide, read_rows, row_chunks, to_rows
from sead_dist.data.tasks import TASKS, TaskSpec, read_task_file
from sead_dist.data.text_files import Marks
from sead_dist.errors import UserError

TONE = TaskSpec(
    name="tone", kind="classification", text_a="{text}", labels=("positive", "negative")
)
BASE = ["sst2", "student=s", "output_dir=o"]


def class_label(path: Path, names: list[str], labels: list[int]) -> Path:
    """A Parquet file as `datasets` writes one whose label is a ClassLabel of these names."""
    features = {"features": {"label": {"names": names, "_type": "ClassLabel"}}}
    table = pa.table({"text": [f"text {n}" for n in range(len(labels))], "label": labels})
    about = {b"huggingface": json.dumps({"info": features}).encode()}
    pq.write_table(table.replace_schema_metadata(about), path)
    return path


def labels_of(path: Path, task: TaskSpec = TONE) -> list[str]:
    examples = build_examples(task, read_rows(path, task), "train")
    return [task.labels[index] for index in examples.labels_B]


def test_invariant_04_names_of_a_class_label_decide_though_one_is_of_no_row(tmp_path):
    path = class_label(tmp_path / "a.parquet", ["negative", "positive", "neutral"], [0, 1, 1])
    assert labels_of(path) == ["negative", "positive", "positive"]


def test_invariant_04_a_row_of_a_class_that_is_not_the_tasks_is_refused_by_name(tmp_path):
    path = class_label(tmp_path / "a.parquet", ["negative", "positive", "neutral"], [0, 2])
    with pytest.raises(UserError, match=r"row 2: label 'neutral' .* allowed: positive, negative"):
        labels_of(path)


def test_names_that_are_numbers_leave_numbers_their_documented_meaning(tmp_path):
    path = class_label(tmp_path / "a.parquet", ["0", "1"], [0, 1])
    assert labels_of(path) == ["positive", "negative"]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("cola", "unacceptable acceptable"), ("sst2", "negative positive"),
        ("mrpc", "not_equivalent equivalent"), ("qqp", "not_duplicate duplicate"),
        ("mnli", "entailment neutral contradiction"), ("qnli", "entailment not_entailment"),
        ("rte", "entailment not_entailment"), ("wnli", "not_entailment entailment"),
        ("superglue_rte", "entailment not_entailment"), ("boolq", "False True"),
        ("cb", "entailment contradiction neutral"), ("multirc", "False True"),
        ("wic", "False True"), ("wsc", "False True"),
    ],
)  # fmt: skip
def test_the_hubs_names_are_read_for_every_shipped_task(task, names):
    from sead_dist.data.kinds import align_name, file_values, normalise_label

    spec = TASKS[task]
    assert names_decide(spec, names.split())
    found = [file_values(spec).get(normalise_label(name)) for name in names.split()]
    assert sorted(found) == list(range(len(spec.labels)))
    assert found == [align_name(spec, name) for name in names.split()]


def write_csv(path: Path, head, rows, op=open, **how) -> Path:
    with op(path, "wt", newline="") as file:
        writer = csv.writer(file, **how)
        writer.writerow(head)
        writer.writerows(rows)
    return path


def pack(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def test_two_columns_or_keys_of_one_name_are_refused_with_the_file(tmp_path):
    head, row = ["text", "label", "label"], [["a", "positive", "negative"]]
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"text": "a", "label": "positive", "label": "negative"}\n')
    deep = tmp_path / "e.json"
    deep.write_text('[{"text": "a", "more": [{"label": 1, "label": 2}], "label": "positive"}]')
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=head), tmp_path / "d.parquet")
    twins = pa.StructArray.from_arrays([pa.array([1])] * 2, names=["label"] * 2)
    table = pa.table({"text": ["a"], "more": twins})
    pq.write_table(table, tmp_path / "f.parquet")
    with pa.ipc.new_file(tmp_path / "g.arrow", table.schema) as file:
        file.write_table(table)
    for path in (
        write_csv(tmp_path / "a.csv", head, row),
        write_csv(tmp_path / "b.tsv", head, row, delimiter="\t"),
        lines,
        deep,
        tmp_path / "d.parquet",
        tmp_path / "f.parquet",
        tmp_path / "g.arrow",
    ):
        for file in (path, pack(path)):
            twice = rf"{file.name}\S* has the (column|key) 'label' twice; rename"
            with pytest.raises(UserError, match=twice):
                read_rows(file, TONE)


def test_two_columns_that_a_task_calls_by_one_name_are_refused_where_they_differ():
    row = {"sentence1": "a", "sentence2": "b", "score": "1.0", "label": "1.0"}
    assert len(build_examples(TASKS["stsb"], [row], "train")) == 1
    with pytest.raises(UserError, match=r"train row 1: columns 'score' and 'label' both stand"):
        build_examples(TASKS["stsb"], [{**row, "label": "2.0"}], "train")


def test_packed_files_are_read_in_a_folder_and_by_their_path(tmp_path):
    path = write_csv(tmp_path / "train.csv.gz", ["text", "label"], [["a", "negative"]], gzip.open)
    assert labels_of(path) == ["negative"]
    assert len(load_split(TONE, "train", tmp_path, None, None, False)) == 1
    numbers = class_label(tmp_path / "a.parquet", ["negative", "positive"], [0, 1])
    assert labels_of(pack(numbers)) == labels_of(numbers) == ["negative", "positive"]
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write('{"text": "a", "label": "positive"}\n')
    assert labels_of(tmp_path / "more.jsonl.gz") == ["positive"]
    (tmp_path / "half.csv.gz").write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"half.csv.gz cannot be read"):
        read_rows(tmp_path / "half.csv.gz", TONE)


def test_whole_numbers_written_with_a_point_and_long_fields_are_read(tmp_path):
    before = csv.field_size_limit()
    path = write_csv(
        tmp_path / "a.csv", ["text", "label"], [["x" * 200_000, "1.0"], ["b", " 0.0 "]]
    )
    assert labels_of(path) == ["negative", "positive"]
    assert csv.field_size_limit() == before
    bad = write_csv(tmp_path / "b.csv", ["text", "label"], [["a", "0.5"]])
    with pytest.raises(UserError, match=r"label '0.5' .* is outside the set"):
        labels_of(bad)


def test_a_quoted_tsv_is_known_by_its_doubled_marks(tmp_path):
    rows = [['He said "no"', "positive"], ["plain", "negative"]]
    path = write_csv(tmp_path / "a.tsv", ["text", "label"], rows, delimiter="\t")
    assert [row["text"] for row in read_rows(path, TONE)] == ['He said "no"', "plain"]
    official = build_examples(
        TASKS["sst2"],
        read_rows(
            write_csv(tmp_path / "b.tsv", ["sentence", "label"], rows[:1], delimiter="\t"),
            TASKS["sst2"],
        ),
        "train",
    )
    assert official.texts_a == ['"He said ""no"""']
    for bare in (['"all quoted"'], ['He said "no"'], ['"a" and "b"'], ['""']):
        assert not Marks.of([bare]).quoted, bare
    assert not Marks.of([['"say ""no"""'], ['a bare " mark']]).quoted


@pytest.mark.skipif("SEAD_DIST_DATA" not in os.environ, reason="SEAD_DIST_DATA is not set")
def test_the_texts_of_official_files_keep_their_marks():
    files = sorted(Path(os.environ["SEAD_DIST_DATA"]).glob("*/*.tsv"))
    read = 0
    for path in files:
        task = TASKS.get(path.parent.name.removesuffix("_subset"))
        if task is not None:
            lines = path.read_text("utf-8").split("\n")
            fields = {field for line in lines for field in line.removesuffix("\r").split("\t")}
            rows = read_rows(path, task, skip_malformed=True)
            assert {value for row in rows for value in row.values()} <= fields, path
            read += 1
    assert read >= 8


def own_task(tmp_path: Path, more: str) -> TaskSpec:
    file = tmp_path / "task.yaml"
    file.write_text(f'name: own\ntext_a: "{{text}}"\n{more}\n')
    return read_task_file(file)


def named(task: TaskSpec, *values: object) -> list[str]:
    rows = [{"text": "a", "label": value} for value in values]
    return [task.labels[index] for index in build_examples(task, rows, "train").labels_B]


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        ("labels: ['1.0', '1.5', '2.0']", (1.0, "1.0", 1, "2"), "1.0 1.0 1.0 2.0"),
        (
            "labels: [bad, good]\nvalue_aliases: {0.0: good, 1.0: bad}",
            (0.0, "1.0", 0, "1"),
            "good bad good bad",
        ),
        ("labels: ['+1', '-1']", (1, -1, "+1", "-1.0"), "+1 -1 +1 -1"),
        ("labels: ['01', '1']", ("01", "1"), "01 1"),
    ],
)
def test_numbers_of_labels_are_numbers_however_they_are_written(tmp_path, keys, values, expected):
    assert named(own_task(tmp_path, keys), *values) == expected.split()


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_label_that_is_not_there_is_no_label_of_that_name(tmp_path, value):
    task = own_task(tmp_path, "labels: [none, nan, favor]")
    assert named(task, "None", "NaN") == ["none", "nan"]
    with pytest.raises(UserError, match=r"row 2: label (None|nan) in column 'label' is outside"):
        named(task, "favor", value)


def test_invariant_04_numbers_that_datasets_sorted_as_texts_are_those_numbers(tmp_path):
    task = own_task(tmp_path, f"labels: [{', '.join(f'c{n}' for n in range(11))}]")
    path = class_label(tmp_path / "a.parquet", sorted(map(str, range(11))), [1, 2, 3, 10])
    assert labels_of(path, task) == ["c1", "c10", "c2", "c9"]
    signs = own_task(tmp_path, "labels: [bad, good]\nvalue_aliases: {-1: bad, 1: good}")
    path = class_label(tmp_path / "b.parquet", ["-1", "1"], [0, 1])
    assert labels_of(path, signs) == ["bad", "good"]
    stars = own_task(tmp_path, "score_range: [0, 5]")
    path = class_label(tmp_path / "c.parquet", ["1", "3", "5"], [0, 1, 2])
    assert build_examples(stars, read_rows(path, stars), "train").labels_B.tolist() == [1, 3, 5]


@pytest.mark.parametrize("value", [True, "1_0", "nan", None])
def test_what_only_python_takes_for_a_score_is_refused(tmp_path, value):
    task = own_task(tmp_path, "score_range: [0, 20]")
    with pytest.raises(UserError, match=r"score .* is not allowed; expected a number from 0 to 20"):
        build_examples(task, [{"text": "a", "label": value}], "train")


def test_an_empty_line_between_rows_of_one_column_is_an_empty_text(tmp_path):
    (tmp_path / "a.tsv").write_text("\ntext\none\n\nthree\n\n")
    assert [row["text"] for row in read_rows(tmp_path / "a.tsv", TONE)] == ["one", "", "three"]
    (tmp_path / "b.tsv").write_text("text\tlabel\none\tpositive\n\nthree\tnegative\n\n")
    assert len(read_rows(tmp_path / "b.tsv", TONE)) == 2


def test_a_text_that_goes_over_several_lines_of_a_tsv_of_one_column_is_told(tmp_path, caplog):
    """With two columns such a line has too few fields, and is refused."""
    told = {
        '"He came.\n""No"", she said."\nanother': "lines 2 to 3",
        'first\n"one\n\nand two"\nlast': "lines 3 to 5",
        '"whole"\n"and ""whole"""': "",
        '"It is so.\nHe left.': "",
        'a 5" nail\n"then': "",
    }
    for number, (text, lines) in enumerate(told.items()):
        caplog.clear()
        path = tmp_path / f"{number}.tsv"
        path.write_text(f"text\n{text}\n")
        assert len(read_rows(path, TONE)) == text.count("\n") + 1
        assert next(row_chunks(path, TONE, False, 100)) == read_rows(path, TONE)
        assert ("look like one text" in caplog.text) == bool(lines)
        assert lines in caplog.text
    (tmp_path / "two.tsv").write_text('text\tlabel\n"one\ntwo"\tpositive\n')
    with pytest.raises(UserError, match=r"two.tsv:2: 1 field where 2 are expected"):
        read_rows(tmp_path / "two.tsv", TONE)


@pytest.mark.parametrize("template", ["{text!r}", "{text:>30}", "{} x"])
def test_a_template_of_which_a_part_would_be_left_out_is_refused(tmp_path, template):
    file = tmp_path / "task.yaml"
    file.write_text(f"name: own\ntext_a: '{template}'\nlabels: [a, b]\n")
    with pytest.raises(
        UserError, match=r"the template .* has braces with more or less than a column's name"
    ):
        read_task_file(file)


def test_quotation_marks_that_stay_though_all_are_around_whole_fields_are_told(tmp_path, caplog):
    for name, text, told in (("a", '"x, y"', True), ("b", '"x" y', False), ("c", "x", False)):
        caplog.clear()
        (tmp_path / f"{name}.tsv").write_text(f"text\tlabel\n{text}\tpositive\n")
        assert read_rows(tmp_path / f"{name}.tsv", TONE)[0]["text"] == text
        assert ("quotation marks are kept" in caplog.text) == told


@pytest.mark.parametrize("name", ["Label", " label", "LABEL "])
def test_a_column_that_is_the_labels_but_for_capitals_and_blanks_is_no_missing_one(name):
    rows = [{"text": "a", name: "positive"}]
    with pytest.raises(UserError, match=f"row 1: no column 'label'; .*did you mean '{name}'"):
        build_examples(TONE, rows, "train", labelled=None)
    assert not build_examples(TONE, [{"text": "a", "labels": "x"}], "train", None).has_gold


def test_rows_whose_columns_are_numbers_keep_their_values():
    rows = [{0: "a", "label": "positive"}, {0: "b", "label": "negative"}]
    assert [row["0"] for row in to_rows(rows, TONE, "data")] == ["a", "b"]
