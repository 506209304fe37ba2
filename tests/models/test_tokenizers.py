"""Tokenisers as their files are: without a padding token, in formats that need a package."""

import json
import shutil

import numpy as np
import pytest
import torch
from kinds import alone, save_kind, texts
from small import LABELS, config, edit_json, example_set, load_teachers, said_by
from transformers import AutoTokenizer

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.errors import UserError
from sead_dist.models import pretrained
from sead_dist.models.inputs import settle, student_inputs
from sead_dist.models.pretrained import load_tokenizer, locate
from sead_dist.models.sequence_classifier import load_classifier

DECODERS = ("gpt2", "llama", "qwen3", "gemma3_text")


def without_padding(folder, end="[MASK]"):
    """A tokeniser like GPT-2's: it puts nothing to a text, and has an end token and no padding."""
    tokenizer = grammar_tokenizer()
    if end != "[SEP]":
        tokenizer.backend_tokenizer.post_processor = None
    tokenizer.pad_token = tokenizer.cls_token = tokenizer.sep_token = None
    tokenizer.eos_token = end
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", pad_token=None)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_model_that_looks_at_the_last_token_needs_no_padding_token(tmp_path, kind, side):
    save_kind(tmp_path, kind, pad_token_id=None)
    without_padding(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", padding_side=side)
    (teacher,) = load_teachers([tmp_path])
    assert teacher.inputs.tokenizer.pad_token == "[MASK]"
    assert teacher.config.pad_token_id == teacher.inputs.tokenizer.eos_token_id
    lines = texts(10)
    said_RC = said_by(teacher, lines)
    expected_RC = alone(tmp_path, lines, 32)
    assert np.abs(said_RC - expected_RC).max() < 1e-3 * np.abs(expected_RC).max()


def test_a_student_that_needs_no_padding_token_saves_the_one_it_was_given(tmp_path):
    save_kind(tmp_path / "m", "gpt2", pad_token_id=None)
    without_padding(tmp_path / "m")
    checkpoint = locate(str(tmp_path / "m"))
    tokenizer, model = load_tokenizer(checkpoint), load_classifier(checkpoint)
    settle(tokenizer, model.config)
    student_inputs(model, tokenizer, 32, "the student", example_set(texts(10)))
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (again.pad_token, again.padding_side) == ("[MASK]", "right")
    batch = again(texts(10), padding=True, return_tensors="pt", truncation=True, max_length=32)
    with torch.inference_mode():
        said_RC = load_classifier(locate(str(tmp_path / "again"))).eval()(**batch).logits.numpy()
    np.testing.assert_allclose(said_RC, alone(tmp_path / "m", texts(10), 32), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("end", ["[SEP]", None])
def test_an_end_token_that_ends_texts_pads_nothing(tmp_path, end):
    save_kind(tmp_path, "gpt2")
    without_padding(tmp_path, end)
    with pytest.raises(UserError, match='no padding token; set "pad_token"'):
        load_tokenizer(locate(str(tmp_path)))


def test_a_vocabulary_alone_does_not_say_of_which_kind_it_is(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "plot", "was", "good"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    alone = locate(str(tmp_path), marks=pretrained.TOKENIZER_FILES)
    with pytest.raises(
        UserError, match=r"no file says of which kind .* copy one of tokenizer\.json"
    ):
        load_tokenizer(alone)
    # the config of its model is enough, as docs/models.md says
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(alone)("the plot")["input_ids"] == [2, 5, 6, 3]


def sentencepiece_model(folder):
    spm = pytest.importorskip("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(texts(40)))
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=50, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "spm.model"


@pytest.mark.parametrize(("kind", "name"), [("t5", "spiece.model"), ("deberta-v2", "spm.model")])
def test_a_sentencepiece_file_is_a_tokeniser(tmp_path, kind, name):
    made = sentencepiece_model(tmp_path)
    folder = save_kind(tmp_path / "m", kind, vocab_size=400)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    shutil.copyfile(made, folder / name)
    tokenizer = load_tokenizer(locate(str(folder)))
    assert tokenizer.unk_token_id not in tokenizer("the plot was good")["input_ids"]
    assert config(f"teachers=[{folder}]") is not None


@pytest.mark.parametrize(
    ("name", "content", "package", "extra"),
    [
        ("spm.model", b"\x0a\x0e\x0a\x05<unk>\x15\x00", "sentencepiece", "sentencepiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken"),
        ("own.tiktoken", b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken"),
    ],
)
def test_the_line_that_installs_what_reads_a_tokeniser_is_told(
    tmp_path, monkeypatch, name, content, package, extra
):
    folder = save_kind(tmp_path, "t5")
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    monkeypatch.setattr(pretrained, "find_spec", lambda _name: None)
    said = rf"{name}, which needs the package {package}; pip install 'sead-dist\[{extra}\]', or"
    with pytest.raises(UserError, match=said) as told:
        load_teachers([folder])
    assert "\n" not in str(told.value)
    # beside tokenizer.json it is not read
    shutil.copyfile(
        save_kind(tmp_path / "other", "t5") / "tokenizer.json", folder / "tokenizer.json"
    )
    load_tokenizer(locate(str(folder)))


def test_a_missing_half_of_what_reads_sentencepiece_is_told(tmp_path, monkeypatch):
    folder = save_kind(tmp_path, "t5")
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"\x0a\x0e")

    def found(name):
        if name.startswith("google"):
            raise ModuleNotFoundError(name)
        return name

    monkeypatch.setattr(pretrained, "find_spec", found)
    with pytest.raises(UserError, match="needs the package protobuf; pip install"):
        load_tokenizer(locate(str(folder)))
    assert json.loads((folder / "config.json").read_text())["id2label"]["0"] == LABELS[0]


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "BertTokenizer"}])
def test_capitals_that_are_lost_because_no_file_says_so_are_told(tmp_path, settings):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "Film", "film", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    about = {"model_type": "bert", "vocab_size": len(words)}
    (tmp_path / "config.json").write_text(json.dumps(about))
    path = tmp_path / "tokenizer_config.json"
    if settings is not None:
        path.write_text(json.dumps(settings))
    folder = locate(str(tmp_path))
    with pytest.raises(
        UserError, match=r"2 of its 5 words have capitals \('Film'\); write .*false"
    ):
        load_tokenizer(folder)
    for lower, said in ((False, ["The", "Film", "##s"]), (True, ["the", "film", "##s"])):
        path.write_text(json.dumps({**(settings or {}), "do_lower_case": lower}))
        assert load_tokenizer(folder).tokenize("The Films") == said
    path.unlink()
    small = [word for word in words if word == word.lower() or word.startswith("[")]
    small += ["[E0]", "[unused0]", "[UNUSED1]"]  # marks are not words
    (tmp_path / "vocab.txt").write_text("\n".join(small) + "\n")
    assert load_tokenizer(folder).tokenize("The Films") == ["the", "film", "##s"]
