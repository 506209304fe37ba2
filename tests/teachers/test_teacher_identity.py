"""What a teacher is known by: what decides its token ids, and the code that comes with it; where its
positions end, and which rows that cuts."""

import shutil
from dataclasses import replace
from typing import ClassVar

import pytest
from small import ALONE, TASK, config, edit_json, example_set, save_teacher
from transformers import AutoConfig
from transformers.tokenization_python import PythonBackend

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.data.order import make_split, tokenize
from sead_dist.data.splits import RunExamples, RunSplits, cut_lines
from sead_dist.models.pretrained import position_limit, tokenizer_hash
from sead_dist.teachers.entries import read_teachers


@pytest.mark.parametrize(
    ("kind", "fields", "limit"),
    [
        ("gpt2", {"n_positions": 48}, 48),
        ("mpt", {"max_seq_len": 48}, 48),
        ("esm", {"max_position_embeddings": 48, "pad_token_id": 1}, 46),
        # numbers that their files carry, and no table that ends
        ("xlnet", {}, None),
        ("t5", {"n_positions": 48}, None),
        ("funnel", {"max_position_embeddings": 48}, None),
        ("bloom", {"seq_length": 48}, None),
    ],
)
def test_a_limit_is_where_a_models_table_of_positions_ends(kind, fields, limit):
    assert position_limit(AutoConfig.for_model(kind, **fields)) == limit


class Spelling(PythonBackend):
    """A tokeniser in Python: a word is its letters' places in the alphabet, from `first` on."""

    vocab_files_names: ClassVar = {"rules_file": "rules.txt"}
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, first: int = 3, **more):
        self.first = first
        marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
        super().__init__(**marks | more)

    @property
    def vocab_size(self):
        return 40

    def get_vocab(self):
        return {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2} | {chr(97 + n): n + 3 for n in range(26)}

    def _tokenize(self, text, **more):
        return [letter for letter in text.lower() if letter.isalpha() and letter.isascii()]

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, self.first + ord(token[0]) % 26)

    def _convert_id_to_token(self, index):
        return "[UNK]"

    def build_inputs_with_special_tokens(self, first, second=None):
        return [2, *first, *(second or [])]


def test_a_tokeniser_in_python_is_known_by_what_it_makes_of_texts_and_by_its_files(
    tmp_path, monkeypatch
):
    one = Spelling()
    before = tokenizer_hash(one)
    assert tokenizer_hash(Spelling()) == before
    real = Spelling._tokenize
    monkeypatch.setattr(Spelling, "_tokenize", lambda self, text, **more: real(self, text)[::-1])
    assert tokenizer_hash(Spelling()) != before
    monkeypatch.setattr(Spelling, "_tokenize", real)
    (tmp_path / "rules.txt").write_text("lower")
    one.name_or_path = str(tmp_path)
    with_file = tokenizer_hash(one)
    assert with_file != before
    (tmp_path / "rules.txt").write_text("upper")
    assert tokenizer_hash(one) not in (before, with_file)


def test_rows_cut_by_a_tokeniser_in_python_are_counted():
    texts = ["good", "the plot", "very good"]
    table = tokenize(Spelling(), example_set(texts), 8)
    # a row that just fills the length has lost nothing: [CLS] and seven letters
    assert table.lengths_B().tolist() == [5, 8, 8]
    assert table.cut.tolist() == [2]


MODULE = """
from transformers import BertConfig, BertForSequenceClassification
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_teacher_is_part_of_who_it_is(tmp_path):
    folder = save_teacher(tmp_path / "own")
    plain = read_teachers(config(teachers=[{"path": str(folder)}]), TASK, ALONE)[0]
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own-bert", auto_map=classes)
    given = config(teachers=[{"path": str(folder)}], trust_remote_code=True)
    seen = {plain.key.fingerprint}
    for code in (MODULE, MODULE + "# an edit\n"):
        (folder / "own.py").write_text(code)
        seen.add(read_teachers(given, TASK, ALONE)[0].key.fingerprint)
    assert len(seen) == 3
    # the same files elsewhere are the same teacher
    shutil.copytree(folder, tmp_path / "copy")
    moved = config(teachers=[{"path": str(tmp_path / "copy")}], trust_remote_code=True)
    assert read_teachers(moved, TASK, ALONE)[0].key.fingerprint in seen


def test_rows_that_lose_tokens_are_told_in_every_split(tmp_path):
    long, short = "the plot was not very good", "good"
    train = make_split(example_set([long, short, long, short, long]), grammar_tokenizer(), 5)
    selection = make_split(example_set([short], split="selection"), grammar_tokenizer(), 5)
    dev = make_split(example_set([long, short], split="validation"), grammar_tokenizer(), 5)
    examples = RunExamples(train.examples, selection.examples, {"validation": dev.examples}, 2, 0)
    splits = RunSplits(train, selection, {"validation": dev})
    first, second = cut_lines(examples, splits, 64, 5)
    assert first == "max_length=64, but the student has positions for 5 tokens only"
    assert second == (
        "student: text rows cut at 5 tokens: 2 of 3 in train, 1 of 2 in unlabelled text, "
        "0 of 1 in selection, 1 of 2 in validation"
    )
    only = RunSplits(dev, selection, {"validation": dev})
    half = replace(examples, train=dev.examples, unlabelled_rows=0)
    told = next(cut_lines(half, only, 5, 5))
    assert told.startswith("student: text rows cut at 5 tokens: 1 of 2")
    most = RunSplits(train, dev, {"validation": dev})
    assert [*cut_lines(replace(examples, unlabelled_rows=0), most, 5, 5)] == [
        "WARNING: student: text rows cut at 5 tokens: 3 of 5 in train, 1 of 2 in selection, 1 of 2 "
        "in validation: more than half of all rows lose text; raise max_length"
    ]
    short_only = RunSplits(selection, selection, {})
    assert list(cut_lines(replace(examples, unlabelled_rows=0), short_only, 5, 5)) == []
