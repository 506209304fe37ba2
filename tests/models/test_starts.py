"""What is trained is what was given (invariant 11): weights of a start, its layers, its saving."""

import copy
import errno
import os
import shutil

import numpy as np
import pytest
import torch
from kinds import assert_layers_work_as
from safetensors.torch import load_file, save_file
from small import (
    ALONE,
    CPU,
    TASK,
    build_model,
    edit_json,
    example_set,
    load_teachers,
    logits_of,
    read,
    save_teacher,
    sentences,
    words,
    write_task,
)
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.config.load import load_config
from sead_dist.config.schema import StudentConfig, TeacherConfig
from sead_dist.data.tasks import TASKS
from sead_dist.errors import RunError, UserError
from sead_dist.models import resaved
from sead_dist.models import sequence_classifier as models
from sead_dist.models.hidden_states import WantedLayers as Read
from sead_dist.models.hidden_states import body_of, find_layer_parts, reading
from sead_dist.models.loaded import check_whole, head_names, pooler_names
from sead_dist.models.sequence_classifier import build_teacher, unshared
from sead_dist.models.student import build_student, check_start, start_as_feature_teacher
from sead_dist.runs.distillation import distill, finetune
from sead_dist.runs.prediction import load_answerer
from sead_dist.runtime.run_log import noted

TEXTS = sentences(5)
PREFIXES = [
    "module.",
    "0.auto_model.",
    "model.",
    "student.",
    "module.model.",
    "model.0.auto_model.",
    "module._orig_mod.student.",
]
# a kind's least sizes; hidden width 32
SIZES = {
    "modernbert": {"intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2, "num_layers": 3},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 3},
    "llama": {"intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3},
    "qwen3": {"intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3},
    "gemma": {"intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3},
}
USUAL = {"intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
RELATIVE = {"relative_attention": True, "position_biased_input": False}
# the layers' kinds with what lies beside their layers
CUT = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 2},
    "mpnet": {},
    "deberta": {**RELATIVE, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "deberta-v2": {
        **RELATIVE,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
        "type_vocab_size": 0,
    },
    "rembert": {"input_embedding_size": 16},
}


def start(folder, task=TASK, seed=0, **given):
    entry = {"path": str(folder), "shape": None, "layers": None, "tokenizer": None, **given}
    return build_student(StudentConfig(**entry), task, grammar_tokenizer(), seed)


def entry(folder, **given):
    return StudentConfig(
        **{"path": str(folder), "shape": None, "layers": None, "tokenizer": None, **given}
    )


def make(kind, folder=None, seed=0, cls=AutoModelForSequenceClassification, **more):
    """A model of this kind with three layers, in `folder` where one is given."""
    names = {"num_labels": 2, "id2label": {0: "negative", 1: "positive"}}
    names["label2id"] = {"negative": 0, "positive": 1}
    sizes = SIZES.get(kind) or ({} if kind == "distilbert" else USUAL)
    width = {} if kind in ("distilbert", "t5", "gpt2") else {"hidden_size": 32}
    fields = {"vocab_size": len(grammar_tokenizer()), "pad_token_id": 0, "initializer_range": 0.3}
    special = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(seed)
    given = {**fields, **special, **names, **width, **sizes, **CUT.get(kind, {}), **more}
    model = cls.from_config(AutoConfig.for_model(kind, **given)).eval()
    if folder is not None:
        model.save_pretrained(folder)
        grammar_tokenizer().save_pretrained(folder)
    return model


def rename(folder, change):
    """Give every tensor of a checkpoint the name that `change` makes of it (None: leave it out)."""
    path = folder / "model.safetensors"
    named = {change(name): tensor for name, tensor in load_file(path).items()}
    named.pop(None, None)
    save_file(named, path, metadata={"format": "pt"})
    return folder


def without_head(name):
    return None if name.startswith("classifier") else name


@pytest.mark.parametrize("prefix", PREFIXES)
def test_invariant_11_a_wrappers_prefix_is_taken_off_a_start(tmp_path, prefix):
    plain = rename(save_teacher(tmp_path / "plain"), without_head)
    wrapped = shutil.copytree(plain, tmp_path / "wrapped")
    rename(wrapped, lambda name: prefix + name)
    # sentence encoders and others hold the bare encoder
    bare = shutil.copytree(plain, tmp_path / "bare")
    rename(bare, lambda name: prefix + name.removeprefix("bert."))
    expected = start(plain).state_dict()
    for folder in (wrapped, bare):
        with noted() as said:
            model = start(folder)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        assert f"the prefix {prefix!r} was removed" in said[0]
        model.save_pretrained(tmp_path / "saved")
        assert load_file(tmp_path / "saved" / "model.safetensors").keys() == expected.keys()
        check_start(entry(folder), False)


def test_a_wrappers_prefix_is_taken_off_a_teacher(tmp_path):
    plain = save_teacher(tmp_path / "plain")
    wrapped = shutil.copytree(plain, tmp_path / "wrapped")
    rename(wrapped, lambda name: "module.model." + name)
    assert [teacher.name for teacher in load_teachers([wrapped])] == ["wrapped"]
    one, two = (
        build_teacher(TeacherConfig(path=str(folder)), "fp32", CPU, False)
        for folder in (plain, wrapped)
    )
    np.testing.assert_array_equal(logits_of(one, TEXTS), logits_of(two, TEXTS))


def test_invariant_11_the_log_says_how_many_tensors_were_loaded_and_which_are_new(tmp_path):
    folder = rename(save_teacher(tmp_path / "t"), without_head)
    total = len(build_model().state_dict())
    with noted() as said:
        start(folder)
    assert said == [
        f"start {folder}: {total - 2} of {total} tensors loaded; new: classifier.bias, "
        "classifier.weight"
    ]


def test_a_language_models_checkpoint_needs_a_new_head_and_pooler_alone(tmp_path):
    source = make("bert", tmp_path / "mlm", cls=AutoModelForMaskedLM)
    with noted() as said:
        model = start(tmp_path / "mlm")
    own = source.bert.state_dict()
    for name, tensor in model.bert.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(tensor, own[name])
    assert "new: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias" in said[0]
    assert "not used from its files: cls.predictions" in said[0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda folder: edit_json(folder / "config.json", intermediate_size=96),
            r"3 of \d+ tensors have other shapes .*intermediate.dense.bias: \[64\] in the file, "
            r"\[96\] by the config; give the config.json",
        ),
        (
            lambda folder: rename(folder, lambda name: "teacher_net." + name),
            r"tensors of a bert are not in its files, which hold teacher_net.*instead: bert\.emb",
        ),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=2),
            r"16 of \d+ tensors of a bert are not in its files: bert.encoder.layer.1",
        ),
        (
            lambda folder: rename(folder, lambda n: None if n.endswith("pooler.dense.bias") else n),
            r"1 of \d+ tensors of a bert are not in its files: bert.pooler.dense.bias",
        ),
    ],
)
def test_invariant_11_weights_that_are_missing_or_do_not_fit_are_refused_by_name(
    tmp_path, spoil, said
):
    folder = save_teacher(tmp_path / "t")
    spoil(folder)
    for ask in (
        lambda: start(folder),
        lambda: check_start(entry(folder), False),
        lambda: build_teacher(TeacherConfig(path=str(folder)), "fp32", CPU, False),
    ):
        with pytest.raises(UserError, match=rf"{said}|lacks the weights classifier") as caught:
            ask()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rf"start .*{said}"):
        start(folder)


def test_a_body_that_base_model_prefix_does_not_name_is_not_drawn_again(tmp_path, monkeypatch):
    folder = save_teacher(tmp_path / "t", labels=("cat", "dog"))
    expected = build_model(labels=("cat", "dog"))
    monkeypatch.setattr(type(expected), "base_model_prefix", "nothing")
    model = start(folder)
    own = expected.bert.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.bert.state_dict().items())
    assert not torch.equal(model.classifier.weight, expected.classifier.weight)
    rename(folder, lambda name: None if "layer.0.output.dense" in name else name)
    with pytest.raises(UserError, match=r"2 of \d+ tensors .*layer.0.output.dense"):
        start(folder)


def test_the_pretrained_part_of_a_head_is_kept(tmp_path):
    source = make("modernbert", tmp_path / "mlm", cls=AutoModelForMaskedLM)
    with noted() as said:
        model = start(tmp_path / "mlm")
    assert torch.equal(model.head.dense.weight, source.head.dense.weight)
    assert "new: classifier.bias, classifier.weight;" in said[0]


@pytest.mark.parametrize(
    ("kind", "inner", "final"),
    [
        ("roberta", "classifier.dense", "classifier.out_proj"),
        ("electra", "classifier.dense", "classifier.out_proj"),
        ("distilbert", "pre_classifier", "classifier"),
        ("modernbert", "head.dense", "classifier"),
    ],
)
@pytest.mark.parametrize("labels", [("cat", "dog"), ("cat", "dog", "cow")])
def test_of_a_head_of_other_classes_only_the_last_layer_is_new(
    tmp_path, kind, inner, final, labels
):
    names = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    names["label2id"] = {name: index for index, name in enumerate(labels)}
    source = make(kind, tmp_path / "t", **names)
    with noted() as said:
        model = start(tmp_path / "t")
    assert torch.equal(model.get_submodule(inner).weight, source.get_submodule(inner).weight)
    assert not torch.equal(
        model.get_submodule(final).weight, source.get_submodule(final).weight[:2]
    )
    assert f"{final}.weight" in said[0].split("new: ")[1]
    assert f"{inner}.weight" not in said[0].split("new: ")[1]


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("layers", [[0, 2], [2, 1]])
def test_chosen_layers_make_the_model_that_is_saved(tmp_path, kind, layers):
    whole = make(kind, tmp_path / "whole")
    cut = start(tmp_path / "whole", layers=layers).eval()
    # the same by hand: a smaller model of the kind, filled from the checkpoint's tensors by name
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 2
    expected = AutoModelForSequenceClassification.from_config(config).eval()
    state = whole.state_dict()
    with torch.no_grad():
        for name, tensor in expected.state_dict().items():
            parts = name.split(".")
            if (
                number := next((i for i, part in enumerate(parts) if part.isdigit()), None)
            ) is not None:
                parts[number] = str(layers[int(parts[number])])
            tensor.copy_(state[".".join(parts)])
    np.testing.assert_allclose(logits_of(cut, TEXTS), logits_of(expected, TEXTS), atol=1e-5)
    cut.save_pretrained(tmp_path / "cut")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut").eval()
    np.testing.assert_allclose(logits_of(again, TEXTS), logits_of(cut, TEXTS), atol=1e-5)
    assert again.config.num_hidden_layers == 2
    numbers = [m.layer_idx for m in cut.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(numbers)) in ([], [0, 1])


def test_a_layer_may_be_chosen_twice(tmp_path):
    make("bert", tmp_path / "whole")
    cut = start(tmp_path / "whole", layers=[1, 1])
    first, second = (layer.output.dense.weight for layer in cut.bert.encoder.layer)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


# what the layers of a kind have of their own beside weights
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
BY_LAYER = {
    "modernbert": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gpt2": {},
    "llama": GROUPED,
    "qwen3": {
        **GROUPED,
        **SLIDING,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "gemma": GROUPED,
}


@pytest.mark.parametrize("kind", BY_LAYER)
@pytest.mark.parametrize("layers", [[0, 1], [0, 2, 1]])
def test_layers_of_any_kind_work_as_they_did_and_are_read_again(tmp_path, kind, layers):
    whole = make(kind, tmp_path / "whole", **BY_LAYER[kind])
    check_start(entry(tmp_path / "whole", layers=layers), False)
    cut = start(tmp_path / "whole", layers=layers)
    assert not cut.training
    assert_layers_work_as(cut, whole, layers)
    cut.save_pretrained(tmp_path / "cut")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut").eval()
    np.testing.assert_allclose(logits_of(again, TEXTS), logits_of(cut, TEXTS), atol=1e-5)
    assert again.config.num_hidden_layers == len(layers)


REFUSED = {
    "t5": ({}, [0, 2], "the layers of a t5 cannot be chosen"),
    "albert": ({}, [0, 2], "the layers of a albert cannot be chosen"),
    "bert": ({}, [0, 3], r"give one or more from 0\.\.2"),
    # its first layer has no norm of its own
    "modernbert": ({}, [1, 2], r"differs in model\.layers\.0\.attn_norm.*layer 0 first"),
    # scores of a layer are divided by its number
    "gpt2": (
        {"scale_attn_by_inverse_layer_idx": True},
        [0, 2],
        r"differs in transformer\.h\.1\.attn\.scaling",
    ),
    "xlm": ({"emb_dim": 32, "n_layers": 3, "n_heads": 2}, [0, 2], "are not one list of layers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_that_would_be_others_in_a_new_place_are_refused(tmp_path, kind):
    more, layers, said = REFUSED[kind]
    make(kind, tmp_path / "whole", **more)
    given = {"layers": layers}
    for ask in (
        lambda: start(tmp_path / "whole", **given),
        lambda: check_start(entry(tmp_path / "whole", **given), False),
    ):
        with pytest.raises(UserError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["regression", "multi_label_classification", None])
def test_the_problem_type_of_a_student_is_what_is_trained(tmp_path, said):
    folder = save_teacher(tmp_path / "t", problem_type=said)
    one = save_teacher(tmp_path / "one", labels=("score",), problem_type=said)
    assert start(folder).config.problem_type == "single_label_classification"
    assert start(one).config.problem_type == "single_label_classification"
    assert start(folder, TASKS["stsb"]).config.problem_type == "regression"
    assert start(folder, TASKS["copa"]).config.problem_type is None


@pytest.mark.parametrize("said", ["regression", "multi_label_classification"])
def test_a_teacher_whose_logits_mean_something_else_is_refused(tmp_path, said):
    folder = save_teacher(tmp_path / "t", problem_type=said)
    line = rf"t has problem_type={said} .* needs single_label_classification; leave it out"
    with pytest.raises(UserError, match=line) as caught:
        load_teachers([folder])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=line):
        load_answerer(str(folder), TASK, None, CPU, example_set(["good"]))
    edit_json(folder / "config.json", problem_type="single_label_classification")
    assert len(load_teachers([folder])) == 1
    # of a text's candidates the one with the largest logit counts, whatever trained it
    one = save_teacher(tmp_path / "one", labels=("score",), problem_type=said)
    assert len(load_teachers([one], task=TASKS["copa"])) == 1


def test_a_score_is_not_read_from_a_classifiers_logit(tmp_path):
    one = save_teacher(tmp_path / "t", labels=("a",), problem_type="multi_label_classification")
    with pytest.raises(UserError, match="needs regression"):
        load_teachers([one], task=TASKS["stsb"])


def in_order(tmp_path, **changes):
    """The words of a short run from a checkpoint."""
    data = write_task(tmp_path / "data")
    start_from = save_teacher(tmp_path / "start", labels=("LABEL_0", "LABEL_1"))
    given = {"student": start_from, "student__shape": "null", "max_steps": 2, **changes}
    return words(data, [], tmp_path / "run", **given)


def run(given):
    return distill(load_config(given), ALONE, show_table=False)


def test_the_account_of_a_start_stands_in_the_log_of_distill_and_finetune(tmp_path):
    folder = run(in_order(tmp_path))
    line = (
        "tensors loaded; new: classifier.bias, classifier.weight (its head had the classes LABEL_0"
    )
    assert line in (folder / "log.txt").read_text()
    assert read(folder / "model" / "config.json")["problem_type"] == "single_label_classification"
    kept = [
        w for w in in_order(tmp_path) if not w.startswith(("student", "teachers", "output_dir"))
    ]
    given = [*kept, f"encoders=[{tmp_path / 'start'}]", f"output_dir={tmp_path / 'made'}"]
    made = finetune(load_config(given), ALONE, show_table=False)
    assert line in (made[0] / "log.txt").read_text()
    assert not list(folder.glob(".trial*"))


def test_finetune_refuses_a_start_that_does_not_fit_before_the_first_teacher(tmp_path):
    kept = [
        w for w in in_order(tmp_path) if not w.startswith(("student", "teachers", "output_dir"))
    ]
    bad = shutil.copytree(tmp_path / "start", tmp_path / "bad")
    rename(bad, lambda name: "strange." + name)
    encoders = f"encoders=[{tmp_path / 'start'},{bad}]"
    with pytest.raises(UserError, match=r"bad: .* which hold strange\."):
        finetune(load_config([*kept, encoders, f"output_dir={tmp_path / 'made'}"]), ALONE)
    assert not (tmp_path / "made").exists()


def test_invariant_11_a_student_that_is_not_read_as_it_was_saved_is_refused_before_training(
    tmp_path, monkeypatch
):
    given = in_order(tmp_path)
    real = models.write_weights

    def other_weights(model, weights, folder):
        name = "bert.encoder.layer.0.output.dense.weight"
        real(model, {**weights, name: -weights[name]}, folder)

    def other_config(model, weights, folder):
        real(model, weights, folder)
        edit_json(folder / "config.json", hidden_act="relu")

    def one_less(model, weights, folder):
        real(model, {n: w for n, w in weights.items() if "pooler" not in n}, folder)

    for broken, said in (
        (other_weights, "gives other logits for the first row"),
        (other_config, "gives other logits for the first row"),
        (one_less, "plain Transformers does not find the tensors bert.pooler"),
    ):
        monkeypatch.setattr(resaved, "write_weights", broken)
        with pytest.raises(UserError, match=said) as caught:
            run(given)
        assert "\n" not in str(caught.value)
        # nothing stays that would keep the fixed run out
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    monkeypatch.setattr(resaved, "write_weights", real)
    run(given)


def test_invariant_11_a_finished_model_that_is_not_the_trained_one_is_refused(
    tmp_path, monkeypatch
):
    given = in_order(tmp_path)
    real = models.write_weights

    def broken(model, weights, folder):
        real(model, {**weights, "classifier.bias": weights["classifier.bias"] + 1e-6}, folder)

    monkeypatch.setattr(models, "write_weights", broken)
    with pytest.raises(RunError, match=r"not what was trained: classifier.bias differs") as caught:
        run(given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "run_summary.json").exists()
    monkeypatch.setattr(models, "write_weights", real)
    run(given)
    assert read(tmp_path / "run" / "run_summary.json")["finished"]


def test_a_checkpoint_may_lack_second_names_of_shared_tensors_alone(tmp_path):
    model = make("bert", cls=AutoModelForMaskedLM)
    kept = unshared(model)
    assert kept.keys() < model.state_dict().keys()
    check_whole(model, kept.keys(), tmp_path)
    short = [name for name in kept if name != "bert.embeddings.LayerNorm.weight"]
    with pytest.raises(RunError, match=r"lacks the tensor bert.embeddings.LayerNorm.weight"):
        check_whole(model, short, tmp_path)
    with pytest.raises(RunError, match=r"holds the unknown tensor other\.weight"):
        check_whole(model, [*kept, "other.weight"], tmp_path)


def test_a_resume_from_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    given = in_order(tmp_path, save_steps=1, keep_training_state="true")
    folder = run(given)
    (folder / "run_summary.json").unlink()
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    path = newest / "student.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "pooler" not in name}
    save_file(kept, path)
    with pytest.raises(RunError, match=r"lacks the tensor bert.pooler.dense.weight") as caught:
        run(given)
    assert "\n" not in str(caught.value)


def states(model, depth):
    inputs = grammar_tokenizer()(TEXTS[0], return_tensors="pt")
    wanted = Read(tuple(range(depth + 1)))
    with torch.no_grad(), reading(find_layer_parts(model, "it", attention=False), wanted) as found:
        model(**inputs)
    return [found.hidden[number] for number in range(depth + 1)]


@pytest.mark.parametrize(
    "kind", ["bert", "electra", "distilbert", "mpnet", "deberta", "deberta-v2"]
)
def test_a_student_as_deep_as_its_feature_teacher_has_the_feature_teachers_hidden_states(kind):
    feature_teacher, own = make(kind, seed=1), make(kind, seed=2)
    head = {n: w.clone() for n, w in own.state_dict().items() if n in models.head_weights(own)}
    assert start_as_feature_teacher(own, feature_teacher)
    for mine, theirs in zip(states(own, 3), states(feature_teacher, 3), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in head.items())


def test_a_student_whose_arithmetic_is_not_the_feature_teachers_is_told():
    feature_teacher, own = make("bert", seed=1), make("bert", seed=2, hidden_act="relu")
    with pytest.raises(UserError, match=r"hidden states 1 differ .*student_init=own"):
        start_as_feature_teacher(own, feature_teacher)
    assert len(feature_teacher.bert.encoder.layer) == 3


def test_a_model_without_a_body_of_its_own_has_its_last_layer_for_a_head():
    model = build_model()
    # as some that come with their own code: everything lies side by side
    for name, child in list(model.bert.named_children()):
        model.add_module(name, child)
    del model.bert
    assert body_of(model) is None
    assert head_names(model) == {"classifier.weight", "classifier.bias"}
    assert pooler_names(model) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_trial_of_saving_that_fails_is_told_with_its_fix_and_leaves_no_file(
    tmp_path, monkeypatch
):
    def write(model, weights, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(folder / "model.safetensors"))

    monkeypatch.setattr(resaved, "write_weights", write)
    row = dict(grammar_tokenizer()(TEXTS[0], return_tensors="pt"))
    told = f"the student cannot be saved in {tmp_path}: .*File too large.*; free space, raise the "
    with pytest.raises(RunError, match=told):
        resaved.check_saving(build_model(), row, tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_the_trial_of_saving_leaves_the_students_config_as_it_was(tmp_path):
    model = build_model()
    before = model.config.to_dict()
    row = dict(grammar_tokenizer()(TEXTS[0], return_tensors="pt"))
    resaved.check_saving(model, row, tmp_path, False)
    assert model.config.to_dict() == before
