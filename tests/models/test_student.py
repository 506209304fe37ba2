"""The student at its start: a shape, a checkpoint, chosen layers; its head."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import (
    TASK,
    build_model,
    edit_json,
    example_set,
    logits_of,
    save_teacher,
    sentences,
    student_shape,
)

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.config.schema import StudentConfig, TeacherConfig
from sead_dist.data.splits import RunExamples
from sead_dist.data.tasks import TASKS
from sead_dist.errors import UserError
from sead_dist.models.start import student_tokenizer
from sead_dist.models.student import build_student

TEXTS = sentences(5)


def start(task=TASK, seed=0, mean_score=None, **given):
    entry = {"path": None, "shape": None, "layers": None, "tokenizer": None, **given}
    return build_student(
        StudentConfig(**entry), task, grammar_tokenizer(), seed, mean_score=mean_score
    )


def test_a_shape_gets_new_weights_from_the_seed(tmp_path):
    shape = str(student_shape(tmp_path))
    one, two, other = start(shape=shape), start(shape=shape), start(shape=shape, seed=1)
    assert one.config.hidden_size == 16
    assert one.config.vocab_size == len(grammar_tokenizer())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_the_shipped_shapes_are_what_their_names_say():
    # L6-H256-A8: 6 layers of width 256, 8 heads
    for name, sizes in (("L6-H256-A8", (6, 256, 8)), ("L6-H384-A12", (6, 384, 12))):
        config = start(shape=name).config
        assert (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
        ) == sizes


def test_a_task_gives_the_student_its_labels(tmp_path):
    shape = str(student_shape(tmp_path))
    assert start(shape=shape).config.id2label == {0: "negative", 1: "positive"}
    assert start(TASKS["mnli"], shape=shape).config.num_labels == 3
    regression = start(TASKS["stsb"], shape=shape).config
    assert (regression.num_labels, regression.problem_type) == (1, "regression")
    assert start(TASKS["copa"], shape=shape).config.num_labels == 1


def test_a_new_head_of_scores_starts_at_the_mean_score_and_one_that_came_stays(tmp_path):
    shape = str(student_shape(tmp_path))
    task = TASKS["stsb"]
    plain, placed = start(task, shape=shape), start(task, shape=shape, mean_score=2.5)
    assert placed.classifier.bias.tolist() == [2.5]
    assert torch.equal(placed.classifier.weight, plain.classifier.weight)
    encoder = save_teacher(tmp_path / "encoder")  # its head is of two classes
    assert start(task, path=str(encoder), mean_score=2.5).classifier.bias.tolist() == [2.5]
    scored = save_teacher(tmp_path / "scored", labels=("score",))
    own = start(task, path=str(scored)).classifier.bias
    assert torch.equal(start(task, path=str(scored), mean_score=2.5).classifier.bias, own)


def test_a_head_without_a_bias_starts_as_it_was(tmp_path):
    folder = save_teacher(tmp_path / "t", "gpt2")
    assert start(TASKS["stsb"], path=str(folder), mean_score=2.5).score.bias is None


def test_the_mean_score_is_of_labelled_training_rows_of_a_regression_task():
    scored = replace(example_set(["good", "bad", "dull"]), labels_B=np.array([1.0, 4.0, np.nan]))
    one = RunExamples(scored, scored, {}, unlabelled_rows=1, dev_in_training=0)
    assert one.labelled_rows == 2
    assert one.mean_score(TASKS["stsb"]) == 2.5
    assert one.mean_score(TASK) is None


def test_chosen_layers_are_those_of_the_checkpoint_in_their_order(tmp_path):
    folder = save_teacher(tmp_path / "t", num_hidden_layers=4)
    whole, cut = start(path=str(folder)), start(path=str(folder), layers=[1, 3])
    assert cut.config.num_hidden_layers == 2
    assert len(cut.bert.encoder.layer) == 2
    for kept, layer in enumerate((1, 3)):
        for a, b in zip(
            cut.bert.encoder.layer[kept].parameters(),
            whole.bert.encoder.layer[layer].parameters(),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert torch.equal(
        cut.bert.embeddings.word_embeddings.weight, whole.get_input_embeddings().weight
    )
    # what is saved is read again with as many layers
    cut.save_pretrained(tmp_path / "cut")
    again = start(path=str(tmp_path / "cut")).eval()
    np.testing.assert_array_equal(logits_of(again, TEXTS), logits_of(cut.eval(), TEXTS))


@pytest.mark.parametrize("kind", ["roberta", "electra", "distilbert"])
def test_layers_of_other_architectures_can_be_chosen(tmp_path, kind):
    depth = {"n_layers": 3} if kind == "distilbert" else {"num_hidden_layers": 3}
    folder = save_teacher(tmp_path / "t", kind, **depth)
    cut = start(path=str(folder), layers=[2])
    assert cut.config.num_hidden_layers == 1
    assert np.isfinite(logits_of(cut.eval(), TEXTS)).all()


@pytest.mark.parametrize("layers", [[4], [-1], []])
def test_layers_that_are_not_there_are_named(tmp_path, layers):
    folder = save_teacher(tmp_path / "t", num_hidden_layers=4)
    with pytest.raises(UserError, match=r"give one or more from 0\.\.3"):
        start(path=str(folder), layers=layers)


def test_a_head_whose_classes_align_is_kept_in_task_order(tmp_path):
    # twice the same model, once with the classes the other way round
    forward = save_teacher(tmp_path / "a", labels=("negative", "positive"))
    model = build_model()
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0).clone())
        model.classifier.bias.copy_(torch.tensor([0.5, -0.5]))
    backward = save_teacher(tmp_path / "b", labels=("positive", "negative"))
    model.config.id2label = {0: "positive", 1: "negative"}
    model.config.label2id = {"positive": 0, "negative": 1}
    model.save_pretrained(backward)
    one, two = start(path=str(forward)).eval(), start(path=str(backward)).eval()
    assert two.config.id2label == {0: "negative", 1: "positive"}
    difference = logits_of(two, TEXTS) - logits_of(one, TEXTS)
    np.testing.assert_allclose(difference, np.tile([-0.5, 0.5], (5, 1)), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1"), ("cat", "dog", "cow")])
def test_a_head_whose_classes_are_unknown_is_drawn_again_from_the_seed(tmp_path, kind, labels):
    folder = save_teacher(tmp_path / "t", kind, labels=labels)
    old = build_model(kind, labels=labels)
    one, two, other = (
        start(path=str(folder)),
        start(path=str(folder)),
        start(path=str(folder), seed=1),
    )
    assert one.config.num_labels == 2
    heads = [
        [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
        for model in (one, two, other, old)
    ]
    assert heads[0].out_features == 2
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert not torch.equal(heads[0].weight, heads[3].weight[:2])
    # the body is the checkpoint's
    assert torch.equal(one.get_input_embeddings().weight, old.get_input_embeddings().weight)


def test_the_tokeniser_is_its_own_else_of_the_start_else_of_the_first_teacher(tmp_path):
    for name in ("own", "start", "teacher"):
        save_teacher(tmp_path / name)
    teachers = [TeacherConfig(path=str(tmp_path / "teacher"))]
    given = {"tokenizer": str(tmp_path / "own"), "path": str(tmp_path / "start")}
    for name in ("own", "start", "teacher"):
        entry = StudentConfig(
            **{"path": None, "tokenizer": None, "shape": "x", "layers": None, **given}
        )
        assert student_tokenizer(entry, teachers).folder == tmp_path / name
        given.pop(next(iter(given)), None) if given else None
    with pytest.raises(UserError, match="needs a tokeniser"):
        student_tokenizer(StudentConfig(path=None, tokenizer=None, shape="x", layers=None), [])


def test_a_shape_that_is_not_there_names_the_known_ones():
    with pytest.raises(UserError, match="known: L12-H384-A12, L6-H256-A8, L6-H384-A12"):
        start(shape="L7")


def test_a_run_without_a_student_is_told_what_to_give(tmp_path):
    with pytest.raises(UserError, match="no student is set"):
        start()


def test_a_folder_of_another_width_keeps_its_body(tmp_path):
    folder = save_teacher(tmp_path / "t", labels=("a", "b", "c"))
    edit_json(folder / "config.json", classifier_dropout=0.0)
    assert start(path=str(folder)).classifier.weight.shape == (2, 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model_type: [", "is not valid YAML"),
        ("- bert", "has no model_type"),
        ("hidden_size: 32", "has no model_type"),
        ("model_type: bert\nhidden_size: 30\nnum_attention_heads: 7", "cannot be built"),
        ("model_type: no-such", "unknown model_type 'no-such'; give one of Transformers"),
        ("model_type: brt\nhidden_size: 32", "unknown model_type 'brt'; did you mean 'bert'"),
        ("model_type: [bert]", r"unknown model_type \['bert'\]"),
        (
            "model_type: bert\nhiden_size: 32",
            "unknown field 'hiden_size' of a bert; .*mean 'hidden_size'",
        ),
    ],
)
def test_a_shape_that_is_none_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "shape.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        start(shape=str(tmp_path / "shape.yaml"))
    assert "\n" not in str(caught.value)


def test_fields_that_a_config_does_not_name_are_told_and_given_on(tmp_path, caplog):
    text = (
        "model_type: deberta-v2\nposition_buckets: 8\nrelative_attention: true\nhidden_size: 32\n"
    )
    sizes = "num_attention_heads: 2\nnum_hidden_layers: 1\nintermediate_size: 64\n"
    (tmp_path / "shape.yaml").write_text(text + sizes)
    model = start(shape=str(tmp_path / "shape.yaml"))
    assert model.config.position_buckets == 8
    assert "shape.yaml: a deberta-v2 may not use position_buckets" in caplog.text


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            "shap.yaml",
            "file shap.yaml does not exist; give a YAML file, or one of L12-H384-A12, L6",
        ),
        (
            "L6-H256",
            "student.shape=L6-H256 is neither a shipped shape nor a YAML file; did you mean 'L6-H256-A8'",
        ),
        (
            "L6-H256-A9",
            "student.shape=L6-H256-A9 is neither a shipped shape nor a YAML file; did you mean 'L6-H256-A8'",
        ),
        ("L6-H257", "L6-H257 is neither a shipped shape nor a YAML file; known: L12-H384-A12"),
    ],
)
def test_a_shape_that_is_not_there_is_named_with_what_is(shape, said):
    with pytest.raises(UserError, match=said):
        start(shape=shape)


def test_a_field_under_an_old_name_that_the_config_reads_is_none_of_a_typo(tmp_path):
    text = "model_type: llama\nhidden_size: 32\nnum_hidden_layers: 1\nnum_attention_heads: 2\n"
    (tmp_path / "shape.yaml").write_text(f"{text}rope_theta: 5000.0\nnum_labels: 2\n")
    config = start(shape=str(tmp_path / "shape.yaml")).config
    assert "5000.0" in str(config.to_dict())


def test_a_tokeniser_with_more_words_than_the_student_is_refused(tmp_path):
    folder = save_teacher(tmp_path / "t")
    edit_json(folder / "config.json", vocab_size=40)
    with pytest.raises(
        UserError, match=r"t has 40 word embeddings but its tokeniser has \d+ words"
    ):
        start(path=str(folder))
