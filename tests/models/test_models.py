"""Checkpoints found and read, classes aligned by name (invariant 4), nothing unpickled (9)."""

import json
import pickle

import numpy as np
import pytest
import torch
from small import (
    ALONE,
    CPU,
    TASK,
    build_model,
    config,
    edit_json,
    load_teachers,
    logits_of,
    model_inputs,
    save_teacher,
    sentences,
)

from sead_dist.config.schema import TeacherConfig
from sead_dist.data.tasks import TASKS
from sead_dist.errors import UserError
from sead_dist.models.pretrained import (
    load_model_config,
    load_tokenizer,
    locate,
    position_limit,
    tokenizer_hash,
    weight_files,
    weights_hash,
)
from sead_dist.models.sequence_classifier import (
    align_classes,
    build_teacher,
    head_weights,
    outline,
    save_model,
)
from sead_dist.teachers.entries import read_teachers


def test_invariant_04_classes_are_aligned_by_name_and_alias():
    assert align_classes(TASKS["mnli"], "m", ["CONTRADICTION", "entailment", "Neutral"], None) == [
        1,
        2,
        0,
    ]
    assert align_classes(TASKS["rte"], "m", ["not entailment", "ENTAILMENT"], None) == [1, 0]
    assert align_classes(TASK, "m", ["Positive", "NEGATIVE"], None) == [1, 0]
    # what the person says counts, in the model's own order
    assert align_classes(TASK, "m", ["LABEL_0", "LABEL_1"], ["positive", "negative"]) == [1, 0]
    assert align_classes(TASK, "m", ["LABEL_0", "LABEL_1"], "task_order") == [0, 1]


def test_invariant_04_names_that_say_nothing_are_refused_with_the_line_to_add():
    with pytest.raises(UserError) as caught:
        align_classes(TASK, "DIR", ["LABEL_0", "LABEL_1"], None)
    assert "{path: DIR, labels: [negative, positive]}" in str(caught.value)
    assert "labels: task_order" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["positive", "sad"], None, "'sad' is not a label of task small"),
        (["positive", "positive"], None, "they do not name exactly the labels of"),
        (["a", "b", "c"], None, "num_labels=3 but task small needs 2"),
        (["LABEL_0", "LABEL_1"], ["negative", "bad"], "'bad' is not a label"),
        (["LABEL_0", "LABEL_1"], ["negative"], "they do not name exactly the labels of"),
    ],
)
def test_invariant_04_classes_that_cannot_be_aligned_are_refused(names, labels, message):
    with pytest.raises(UserError, match=message):
        align_classes(TASK, "DIR", names, labels)


def test_regression_and_choices_have_one_column():
    assert align_classes(TASKS["stsb"], "m", ["LABEL_0"], None) == [0]
    assert align_classes(TASKS["copa"], "m", ["LABEL_0"], None) == [0]


def test_a_checkpoint_is_a_folder_or_a_run_folders_model(tmp_path):
    save_teacher(tmp_path / "run" / "model")
    assert locate(str(tmp_path / "run")).folder == tmp_path / "run" / "model"
    assert locate(str(tmp_path / "run" / "model")).folder == tmp_path / "run" / "model"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        locate(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"is a folder of models \(run\); give one of them"):
        locate(str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        locate(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="neither a folder nor reachable on the hub"):
        locate("nobody/nothing")


def test_a_folder_without_weights_is_named(tmp_path):
    folder = save_teacher(tmp_path / "t")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"holds no weights; give a folder .* of model\.safetensors"
    ):
        weight_files(locate(str(folder)))


def test_the_weights_hash_sees_every_byte(tmp_path):
    folder = save_teacher(tmp_path / "t")
    before = weights_hash(locate(str(folder)))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert weights_hash(locate(str(folder))) != before


def test_an_encoder_that_was_never_fine_tuned_is_no_teacher(tmp_path):
    folder = save_teacher(tmp_path / "t")
    build_model().bert.save_pretrained(folder)
    with pytest.raises(UserError, match="never fine-tuned to classify"):
        build_teacher(TeacherConfig(path=str(folder)), "fp32", CPU, False)


def test_a_teacher_is_in_eval_mode_without_gradients_in_its_dtype(tmp_path):
    folder = save_teacher(tmp_path / "t", hidden_dropout_prob=0.5)
    for dtype, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = build_teacher(TeacherConfig(path=str(folder)), dtype, CPU, False)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert {p.dtype for p in model.parameters()} == {expected}


def test_older_folders_with_pytorch_model_bin_give_the_same_teacher(tmp_path):
    folder = save_teacher(tmp_path / "t")
    model = build_teacher(TeacherConfig(path=str(folder)), "fp32", CPU, False)
    texts = sentences(3)
    expected = logits_of(model, texts)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = build_teacher(TeacherConfig(path=str(folder)), "fp32", CPU, False)
    np.testing.assert_array_equal(logits_of(again, texts), expected)


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_invariant_09_a_pickled_teacher_is_not_executed(tmp_path):
    folder = save_teacher(tmp_path / "t")
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Trap(mark))),
        lambda path: torch.save({"classifier.weight": Trap(mark)}, path),
    ):
        write(folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="its weights cannot be read") as caught:
            build_teacher(TeacherConfig(path=str(folder)), "fp32", CPU, False)
        assert "\n" not in str(caught.value)
        assert not mark.exists()
    # the trap works where it is let loose
    pickle.loads(pickle.dumps(Trap(mark))).close()
    assert mark.exists()


def test_invariant_09_code_that_comes_with_a_checkpoint_is_not_run_unasked(tmp_path):
    folder = save_teacher(tmp_path / "t")
    mark = tmp_path / "executed"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C"})
    with pytest.raises(UserError, match=r"its config\.json cannot be read: .* custom code"):
        load_model_config(locate(str(folder)), trust_remote_code=False)
    assert not mark.exists()


def test_a_tokeniser_without_padding_is_refused_with_the_fix(tmp_path):
    folder = save_teacher(tmp_path / "t")
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match='no padding token; set "pad_token"'):
        load_tokenizer(locate(str(folder)))


def test_a_tokeniser_is_known_by_what_it_does(tmp_path):
    one = load_tokenizer(locate(str(save_teacher(tmp_path / "a"))))
    two = load_tokenizer(locate(str(save_teacher(tmp_path / "b", seed=1))))
    assert tokenizer_hash(one) == tokenizer_hash(two)
    # truncation and padding are ours
    two(["a b c"], padding="max_length", max_length=9, truncation=True)
    assert tokenizer_hash(one) == tokenizer_hash(two)
    two.add_tokens(["wunderbar"])
    assert tokenizer_hash(one) != tokenizer_hash(two)


def test_teachers_of_one_tokeniser_share_it_and_others_do_not(tmp_path):
    paths = [save_teacher(tmp_path / f"teacher-{seed}", seed=seed) for seed in range(4)]
    # written otherwise, but the same to a text
    edit_json(paths[1] / "tokenizer_config.json", remark="mine")
    tokens = json.loads((paths[2] / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (paths[2] / "tokenizer.json").write_text(json.dumps(tokens))
    one, alike, other, same = load_teachers(paths)
    assert one.inputs.tokenizer is alike.inputs.tokenizer is same.inputs.tokenizer
    assert other.inputs.tokenizer is not one.inputs.tokenizer
    assert other.inputs.tokenizer_hash != one.inputs.tokenizer_hash
    assert other.inputs.tokenizer(first)["input_ids"] != one.inputs.tokenizer(first)["input_ids"]
    student = load_tokenizer(locate(str(paths[3])))
    given = config(f"teachers=[{paths[0]},{paths[2]}]", max_length=32)
    one, other = read_teachers(given, TASK, ALONE, student)
    assert one.inputs.tokenizer is student
    assert other.inputs.tokenizer is not student


def test_position_limits():
    assert position_limit(build_model("bert").config) == 80
    # RoBERTa's positions start after the padding index
    assert position_limit(build_model("roberta").config) == 79
    # MPNet's after 1, whatever its config says
    assert position_limit(build_model("mpnet").config) == 78


def test_a_saved_model_is_read_by_transformers_with_its_labels(tmp_path):
    from transformers import pipeline

    model = build_model()
    save_model(model, model.state_dict(), model_inputs().save, tmp_path)
    found = pipeline("text-classification", str(tmp_path))("the plot was good")
    assert found[0]["label"] in ("negative", "positive")
    assert (tmp_path / "model.safetensors").is_file()


def test_a_saved_tokeniser_truncates_as_its_model_asks_whoever_used_it_last(tmp_path):
    tokenizer = load_tokenizer(locate(str(save_teacher(tmp_path / "teacher"))))
    tokenizer(["the plot was good"], truncation=True, max_length=7, padding="max_length")
    model = build_model()
    save_model(model, model.state_dict(), model_inputs(32, tokenizer).save, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 32
    assert saved["padding"] is None


def test_a_tokeniser_that_cuts_off_the_beginning_is_another(tmp_path):
    one = load_tokenizer(locate(str(save_teacher(tmp_path / "t"))))
    before = tokenizer_hash(one)
    one.truncation_side = "left"
    assert tokenizer_hash(one) != before


def test_an_index_that_names_no_weights_is_told(tmp_path):
    folder = save_teacher(tmp_path / "t")
    (folder / "model.safetensors").unlink()
    for text in ("{}", "[]", "no JSON", '{"weight_map": {"a": 1}}', "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"has no weight_map|index.json cannot be read: "):
            weight_files(locate(str(folder)))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2", "mpnet"])
def test_the_head_is_known_without_loading_weights(kind):
    model = build_model(kind)
    body = {id(parameter) for parameter in getattr(model, model.base_model_prefix).parameters()}
    expected = [name for name, p in model.named_parameters() if id(p) not in body]
    seen = outline(model.config)
    assert {p.device.type for p in seen.parameters()} == {"meta"}
    assert head_weights(seen) == expected
    assert any("classifier" in name for name in expected)
