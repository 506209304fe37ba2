"""Checkpoints that were read wrongly without a word: what they hold beside, and what they say."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CPU, TASK, edit_json, load_teachers, logits_of, save_teacher, sentences

from sead_dist.config.schema import StudentConfig
from sead_dist.errors import UserError
from sead_dist.models.pretrained import load_tokenizer, locate
from sead_dist.models.sequence_classifier import load_classifier
from sead_dist.models.student import build_student, check_start
from sead_dist.runtime.run_log import noted
from sead_dist.teachers.sharding import check_shardable
from sead_dist.teachers.whole import load_whole

TEXTS = sentences(5)


def add(folder, more):
    """Put further tensors, by name, into a checkpoint."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **more(load_file(path))}, path, metadata={"format": "pt"})
    return folder


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    "more",
    [
        lambda _: {f"{QUERY}.lora_A": torch.zeros(2, 32), f"{QUERY}.lora_B": torch.zeros(32, 2)},
        lambda _: {"classifier.scale": torch.zeros(2)},
        lambda held: {
            n.replace("layer.0", "layer.1"): t for n, t in held.items() if "layer.0" in n
        },
        lambda held: {f"module.{name}": tensor for name, tensor in held.items()},
    ],
    ids=["adapter", "scaled head", "more layers", "second copy"],
)
def test_invariant_11_a_teacher_whose_files_hold_more_of_it_is_refused(tmp_path, more):
    folder = add(save_teacher(tmp_path / "more"), more)
    has_more = r"its files hold \d+ tensors that a bert of its config.json has no place for"
    with pytest.raises(UserError, match=has_more):
        load_whole(load_teachers([folder])[0], CPU, False, {})
    with pytest.raises(UserError, match=has_more):
        check_shardable(load_teachers([folder])[0], False)
    with pytest.raises(UserError, match=has_more):
        load_classifier(locate(str(folder)))


def test_a_teacher_may_hold_what_no_classifier_asks(tmp_path):
    def pooler_and_words(held):
        names = ("roberta.pooler.dense.weight", "lm_head.bias", "roberta.embeddings.position_ids")
        return {name: torch.zeros(32) for name in names}

    plain = save_teacher(tmp_path / "plain", "roberta")
    folder = add(shutil.copytree(plain, tmp_path / "more"), pooler_and_words)
    one, two = (load_whole(load_teachers([each])[0], CPU, False, {}) for each in (plain, folder))
    np.testing.assert_array_equal(logits_of(one, TEXTS), logits_of(two, TEXTS))
    check_shardable(load_teachers([folder])[0], False)


def test_an_adapter_that_lies_beside_the_weights_is_refused(tmp_path):
    folder = save_teacher(tmp_path / "adapted")
    (folder / "adapter_config.json").write_text("{}")
    entry = StudentConfig(path=str(folder), shape=None, layers=None, tokenizer=None)
    for use in (lambda: load_teachers([folder]), lambda: check_start(entry, False)):
        with pytest.raises(
            UserError, match=r"adapted holds a whole model and an adapter .* merge them"
        ):
            use()


def test_invariant_04_names_that_number_no_class_0_are_refused(tmp_path):
    folder = save_teacher(tmp_path / "teacher")
    edit_json(folder / "config.json", id2label={"1": "negative", "2": "positive"})
    with pytest.raises(UserError, match="does not name the classes 0, 1"):
        load_teachers([folder])


def test_invariant_04_names_of_classes_that_contradict_each_other_are_refused(tmp_path):
    folder = save_teacher(tmp_path / "teacher")
    edit_json(folder / "config.json", label2id={"negative": 1, "positive": 0})
    with pytest.raises(UserError, match=r"negative \(label2id: 1\), positive"):
        load_teachers([folder])
    said = f"{{path: {folder}, labels: [positive, negative]}}"
    assert load_teachers([said])[0].order_C == [1, 0]


def with_words(folder, change):
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text())
    change(held["model"]["vocab"])
    path.write_text(json.dumps(held))
    return folder


def test_a_word_whose_number_is_beyond_the_embeddings_is_refused(tmp_path):
    def gap(words):
        words[list(words)[-1]] = len(words) + 50

    folder = with_words(save_teacher(tmp_path / "gap"), gap)
    with pytest.raises(UserError, match=r"123 word embeddings but its tokeniser has 174 words"):
        load_teachers([folder])


def test_a_tokeniser_of_other_words_than_the_starts_is_told(tmp_path):
    def swap(words):
        one, two = list(words)[-2:]
        words[one], words[two] = words[two], words[one]

    plain = save_teacher(tmp_path / "plain")
    same = shutil.copytree(plain, tmp_path / "same")
    other = with_words(shutil.copytree(plain, tmp_path / "other"), swap)
    for given, told in ((None, False), (same, False), (other, True)):
        named = None if given is None else str(given)
        entry = StudentConfig(path=str(plain), shape=None, layers=None, tokenizer=named)
        with noted() as said:
            build_student(entry, TASK, load_tokenizer(locate(named or str(plain))), 0)
        assert ("WARNING: 2 of the 123 words of student.tokenizer=" in said[0]) == told
