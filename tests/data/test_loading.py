"""Every file form that a split may have, the official real files, and what is said of bad ones."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import load_split

from sead_dist.config.load import load_config
from sead_dist.config.schema import DataConfig
from sead_dist.data.examples import build_examples, count_overlap
from sead_dist.data.loading import read_rows
from sead_dist.data.splits import load_official
from sead_dist.data.tasks import TASKS, TaskSpec
from sead_dist.data.text_files import readable
from sead_dist.data.unlabeled import text_of_file
from sead_dist.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SST2 = TASKS["sst2"]
ROWS = [{"sentence": 'a "bare quote, and comma', "label": 1}, {"sentence": "naïve", "label": 0}]


def load(task: TaskSpec, split: str, folder: Path, skip_malformed: bool = False):
    return load_split(task, split, folder, None, None, skip_malformed)


def examples_of(task: TaskSpec, rows: list):
    return build_examples(task, rows, "train")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_official_folder_holds_every_split(name):
    task = TASKS[name]
    for split in task.splits:
        examples = build_examples(task, load(task, split, FIXTURES / name), split)
        assert len(examples) >= 2


def write_tsv(path: Path):
    path.write_text("sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in ROWS))


def write_headerless(path: Path):
    path.write_text("".join(f"{r['sentence']}\t{r['label']}\r\n" for r in ROWS))


def write_csv(path: Path):
    path.write_text('label,sentence\n1,"a ""bare quote, and comma"\n0,naïve\n')


def write_jsonl(path: Path):
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + "\n", encoding="utf-8-sig")


def write_json(path: Path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_parquet(path: Path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_stream(path: Path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_file(path: Path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("train.tsv", write_tsv),
        ("train.tsv", write_headerless),
        ("train.csv", write_csv),
        ("train.jsonl", write_jsonl),
        ("train.json", write_json),
        ("train.json", write_jsonl),
        ("train.parquet", write_parquet),
        ("train-00000-of-00001.parquet", write_parquet),
        ("train.arrow", write_stream),
        ("train.arrow", write_file),
        ("glue-train.arrow", write_stream),
    ],
)
def test_every_form_gives_the_same_examples(tmp_path, name, write):
    write(tmp_path / name)
    got = examples_of(SST2, load(SST2, "train", tmp_path))
    assert got.texts_a == [row["sentence"] for row in ROWS]
    assert got.labels_B.tolist() == [1, 0]


def test_shards_are_read_in_order(tmp_path):
    for shard, row in enumerate(ROWS):
        pq.write_table(
            pa.Table.from_pylist([row]), tmp_path / f"train-0000{shard}-of-00002.parquet"
        )
    assert load(SST2, "train", tmp_path) == ROWS
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="has 1 of the 2 files of train"):
        load(SST2, "train", tmp_path)


def test_tsv_breaks_lines_at_line_feeds_only(tmp_path):
    (tmp_path / "dev.tsv").write_bytes("sentence\tlabel\none\x0b \x85 \u2028line\t1\n".encode())
    assert load(SST2, "validation", tmp_path) == [
        {"sentence": "one\x0b \x85 \u2028line", "label": "1"}
    ]


def test_folder_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    rows = [
        {"sentence": "fine", "label": 0},
        {"sentence": "poor", "label": 1},
        {"sentence": "x", "label": 1},
    ]
    whole = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": whole.select([1, 0]), "validation": whole}).save_to_disk(
        tmp_path / "s"
    )
    whole.to_parquet(tmp_path / "train.parquet")
    # The data set's class order is not the task's: its names decide.
    assert examples_of(SST2, load(SST2, "train", tmp_path / "s")).labels_B.tolist() == [0, 1]
    assert examples_of(SST2, load(SST2, "train", tmp_path)).labels_B.tolist() == [1, 0, 0]


def test_class_names_that_the_task_does_not_know_leave_the_numbers(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["0", "1"])}
    )
    datasets.Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / "train.parquet")
    assert examples_of(SST2, load(SST2, "train", tmp_path)).labels_B.tolist() == [1, 0]


def test_mnli_has_two_dev_sets():
    task = TASKS["mnli"]
    matched, mismatched = (
        load(task, split, FIXTURES / "mnli")
        for split in ("validation_matched", "validation_mismatched")
    )
    assert [r["gold_label"] for r in matched] == [r["gold_label"] for r in mismatched[::-1]]
    with pytest.raises(UserError, match="no split 'validation'; it has train, validation_matched"):
        load(task, "validation", FIXTURES / "mnli")


def test_malformed_line_is_named_or_skipped(tmp_path, caplog):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\ngood\t1\nno label 0\nbad\t0\n")
    message = r"train.tsv:3: 1 field where 2 are expected .*data.skip_malformed=true"
    with pytest.raises(UserError, match=message):
        read_rows(path, SST2, skip_malformed=False)
    rows = read_rows(path, SST2, skip_malformed=True)
    assert [row["sentence"] for row in readable(rows)] == ["good", "bad"]
    assert "skipped 1 malformed line:" in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.tsv", "sentence\tlabel\nx\ngood\t1\nx\nbad\t0\nx\n"),
        ("train.csv", "sentence,label\nx\ngood,1\nx\nbad,0\nx\n"),
        ("train.jsonl", '{"sentence"\n{"sentence": "good", "label": 1}\n[]\n{"sentence": "bad", "label": 0}\n{\n'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_rows_after_a_skipped_line_keep_their_numbers(tmp_path, name, text, chunk, monkeypatch):
    (tmp_path / name).write_text(text)
    shutil.copy(tmp_path / name, tmp_path / name.replace("train", "dev"))
    for module in ("splits", "unlabeled"):
        monkeypatch.setattr(f"sead_dist.data.{module}.chunk_size", lambda task: chunk)
    data = DataConfig(path=str(tmp_path), skip_malformed=True)
    assert load_official(SST2, data, "validation").rows_B.tolist() == [1, 3]
    keys = [f"data.path={tmp_path}", f"unlabeled.path={tmp_path / name}", "output_dir=o"]
    config = load_config(["sst2", *keys, "data.skip_malformed=true", "teachers=[a]", "student=b"])
    found, read, _ = text_of_file(config, SST2, np.zeros(0, np.int64), 9, None)
    assert (found.rows_B.tolist(), read) == ([1, 3], 2)
    # a label outside the set: skipped lines are not among the rows that the error counts
    broken = (
        text.replace('"label": 1', '"label": 7')
        .replace("good\t1", "good\t7")
        .replace("good,1", "good,7")
    )
    (tmp_path / name.replace("train", "dev")).write_text(broken)
    with pytest.raises(UserError, match=r"validation row 2: label '?7'?"):
        load_official(SST2, data, "validation")


@pytest.mark.parametrize("chunk", [1, 9])
def test_a_file_of_malformed_lines_has_no_rows(tmp_path, chunk, monkeypatch):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\nx\ny\n")
    monkeypatch.setattr("sead_dist.data.splits.chunk_size", lambda task: chunk)
    with pytest.raises(UserError, match=r"the validation split has no rows in .*dev.tsv"):
        load_official(SST2, DataConfig(path=str(tmp_path), skip_malformed=True), "validation")


def test_malformed_first_line_of_a_file_without_header(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("1\t2\t3\tis it?\tis it so? 0\n4\t5\t6\ta?\tb?\t1\n")
    with pytest.raises(UserError, match=r"train.tsv:1: 5 fields where 6"):
        read_rows(path, TASKS["qqp"])
    rows = read_rows(path, TASKS["qqp"], skip_malformed=True)
    assert [row["label"] for row in readable(rows)] == ["1"]


def test_renamed_column_in_a_header_is_missing_not_data(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\ngood\t1\n")
    with pytest.raises(
        UserError, match="train row 1: no column 'sentence'; its columns: text, label"
    ):
        examples_of(SST2, load(SST2, "train", tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a"\n', "x.jsonl:2: not JSON"),
        ("x.jsonl", b'["a"]\n{}\n', "x.jsonl.* not JSON"),
        (
            "x.jsonl",
            b'{"a": 1}\n3\n',
            "x.jsonl:2: '3' is not a JSON object; fix the line$",
        ),
        ("x.json", b"[1, 2]", "expected a list of objects"),
        ("x.csv", b'a,label\n"open,1\n', "x.csv:.*not CSV"),
        ("x.csv", b"sentence,label\na,b,1\n", "x.csv:2: 3 fields where 2"),
        ("x.tsv", b"sentence\tlabel\n\xff\t1\n", "not UTF-8"),
        ("x.parquet", b"PAR1 but no more", "not a complete .parquet file"),
        ("x.arrow", b"nothing of the kind", "not a complete .arrow file"),
        ("x.xlsx", b"", "unknown kind '.xlsx'; allowed: .tsv, .csv"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_rows(tmp_path / name, SST2)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data file .* is a folder; give a file"):
        read_rows(tmp_path, SST2)
    with pytest.raises(UserError, match=r"data file .*5 does not exist"):
        read_rows(tmp_path / "5", SST2)
    with pytest.raises(UserError, match=r"no\.tsv does not exist"):
        read_rows(tmp_path / "no.tsv", SST2)
    with pytest.raises(UserError, match=r"data\.path .*none does not exist"):
        load(SST2, "train", tmp_path / "none")
    for name in ("train_part.tsv", "small-train.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\n")
    with pytest.raises(
        UserError,
        match=r"expected train with one of .tsv.*holds small-train.tsv, train_part.tsv; .*data.train=FILE",
    ):
        load(SST2, "train", tmp_path)
    with pytest.raises(UserError, match=r"expected validation, dev, val .*data.validation=FILE"):
        load(SST2, "validation", tmp_path)
    with pytest.raises(UserError, match=r"is a file, not a folder; .* holds the split files$"):
        load(SST2, "train", tmp_path / "train_part.tsv")


def test_one_file_given_as_the_folder_of_an_own_task_is_answered_by_the_key_for_it(tmp_path):
    one = tmp_path / "reviews.csv"
    one.write_text("sentence,label\n")
    with pytest.raises(UserError, match=rf"split files, or data\.train={one} for a file of all"):
        load(replace(SST2, hub=None), "train", one)


def test_empty_split_is_named(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(UserError, match=r"the train split has no rows in .*train\.tsv"):
        load(SST2, "train", tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t1\n")
    (tmp_path / "validation.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"has dev.tsv, validation.jsonl for the validation split"):
        load(SST2, "validation", tmp_path)


def test_an_explicit_file_needs_no_name():
    rows = load_split(SST2, "train", None, FIXTURES / "sst2" / "dev.tsv", None, False)
    assert len(rows) == 4


def test_a_hub_out_of_reach_says_what_and_what_to_do(tmp_path):
    code = (
        "from sead_dist.data.loading import split_chunks; from sead_dist.data.tasks import TASKS\n"
        "from sead_dist.errors import UserError\n"
        "try: list(split_chunks(TASKS['rte'], 'validation', None, None, None, False, None))\n"
        "except UserError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert "split 'validation' of hub data set 'nyu-mll/glue' (rte) cannot be loaded" in done.stdout
    assert "give data.path" in done.stdout
    assert done.stdout.count("\n") == 1


def test_reading_local_files_does_not_import_datasets():
    code = (
        "import sys; from pathlib import Path; from sead_dist.data.loading import read_rows\n"
        "from sead_dist.data.tasks import TASKS; import sead_dist.data.examples\n"
        f"read_rows(Path({str(FIXTURES / 'sst2' / 'dev.tsv')!r}), TASKS['sst2'])\n"
        "print([m for m in ('datasets', 'torch', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Row and label counts of the official data, as the data's README gives them.
OFFICIAL = {
    "sst2": ((29780, 37569), (428, 444)),
    "cola": ((2528, 6023), (322, 721)),
    "rte": ((1249, 1241), (146, 131)),
    "wnli": ((323, 312), (40, 31)),
    "mrpc": ((1194, 2474), (129, 279)),
    "cb": ((115, 119, 16), (23, 28, 5)),
    "copa": ((195, 205), (55, 45)),
    "wic": ((2714, 2714), (319, 319)),
    "wsc": ((295, 259), (66, 38)),
}


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("SEAD_DIST_DATA")
    if not folder:
        pytest.skip("SEAD_DIST_DATA is not set: the folder of real GLUE and SuperGLUE files")
    return Path(folder)


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_real_data_has_the_official_label_counts(data, name):
    task, sets = TASKS[name], []
    for split, counts in zip(("train", "validation"), OFFICIAL[name], strict=True):
        sets.append(build_examples(task, load(task, split, data / name), split))
        assert np.bincount(sets[-1].labels_B).tolist() == list(counts)
    assert count_overlap(sets[1], sets[0]) == {"cola": 16}.get(name, 0)


def test_real_stsb(data):
    task = TASKS["stsb"]
    train, dev = (
        build_examples(task, load(task, split, data / "stsb"), split)
        for split in ("train", "validation")
    )
    assert (len(train), len(dev), count_overlap(dev, train)) == (5749, 1500, 6)
    assert (train.labels_B.min(), train.labels_B.max()) == (0, 5)


def test_real_boolq(data):
    task = TASKS["boolq"]
    dev = build_examples(task, load(task, "validation", data / "boolq"), "validation")
    assert np.bincount(dev.labels_B).tolist() == [1237, 2033]
    with pytest.raises(UserError, match=r"holds train_subset64.jsonl, validation.jsonl"):
        load(task, "train", data / "boolq")  # a part is never taken for the whole
    part = load_split(
        task, "train", data / "boolq", data / "boolq" / "train_subset64.jsonl", None, False
    )
    assert np.bincount(build_examples(task, part, "train").labels_B).tolist() == [27, 37]


def test_real_qqp_part_has_no_header_and_a_malformed_first_line(data):
    task = TASKS["qqp"]
    with pytest.raises(UserError, match=r"train.tsv:1: 5 fields where 6"):
        load(task, "train", data / "qqp_subset")
    rows = load(task, "train", data / "qqp_subset", skip_malformed=True)
    assert np.bincount(build_examples(task, rows, "train").labels_B).tolist() == [14749, 8747]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("new.csv", 'subject,body\nabout refund,"the card, charged twice"\n'),
        ("new.tsv", "review\tstars\na fine film\t5\n"),
        ("new.tsv", "text\nhello there\n"),
    ],
)
def test_a_header_of_other_names_is_never_taken_for_data(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    rows = read_rows(tmp_path / name, SST2)
    assert len(rows) == 1
    with pytest.raises(
        UserError, match=r"no column 'sentence'; its columns: (subject|review|text)"
    ):
        build_examples(SST2, rows, "unlabelled", labelled=False)
