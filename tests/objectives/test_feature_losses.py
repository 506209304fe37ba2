"""Each feature loss put together for a student and a teacher: layers, projections, start, stages."""

import pytest
import torch
from small import build_model, config

from sead_dist.errors import UserError
from sead_dist.models.hidden_states import find_layer_parts, reading, scores
from sead_dist.models.student import start_as_feature_teacher
from sead_dist.objectives.feature_losses import (
    attention_loss,
    check_feature_loss,
    cosine_loss,
    hidden_loss,
    make_feature_loss,
    without_projections,
)
from sead_dist.objectives.losses import LossTerms

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 0, 0]])
ZERO = torch.zeros(())
# wider, deeper and with other heads than the student
WIDE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def pair(method, feature_teacher=WIDE, total_steps=10, seed=0, **student):
    """A student of two layers, its feature loss, and the feature teacher."""
    student = build_model(num_hidden_layers=2, **student)
    body = build_model(seed=1, **feature_teacher)
    given = config("teachers=[a]", f"method={method}", seed=seed)
    layer_parts = find_layer_parts(body, "teacher a", method != "distilbert")
    return student, make_feature_loss(given, student, layer_parts, total_steps), body


def read_both(student, feature_loss, body):
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with feature_loss.reading() as mine:
        logits = student(**inputs).logits
    with torch.no_grad(), reading(feature_loss.feature_teacher, feature_loss.theirs) as theirs:
        body(**inputs)
    return mine, theirs, logits


def terms_of(logits) -> LossTerms:
    return LossTerms(logits.pow(2).mean(), ZERO, ZERO, ZERO)


@pytest.mark.parametrize(
    ("method", "feature_teacher", "variant"),
    [
        ("distilbert", {"num_hidden_layers": 4}, "cosine"),
        ("distilbert", WIDE, "projected cosine"),
        ("tinybert", {"num_hidden_layers": 4}, "attention by head"),
        ("tinybert", WIDE, "head-averaged attention"),
        ("minilm", {"hidden_size": 64}, "attention distributions and value relations"),
        ("minilm", WIDE, "MiniLMv2 relations, 4 heads"),
    ],
)
def test_the_form_follows_from_the_shapes_and_is_named(method, feature_teacher, variant):
    student, feature_loss, body = pair(method, feature_teacher)
    assert feature_loss.variant == variant
    mine, theirs, _ = read_both(student, feature_loss, body)
    loss_R = feature_loss.loss(mine, theirs, MASK.bool())
    assert loss_R.shape == (2,)
    assert (loss_R > 0).all()


def test_distilbert_compares_the_last_hidden_states():
    student, feature_loss, body = pair("distilbert", {"num_hidden_layers": 4})
    mine, theirs, _ = read_both(student, feature_loss, body)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True}
    with torch.no_grad():
        own, other = student(**inputs).hidden_states[2], body(**inputs).hidden_states[4]
    torch.testing.assert_close(
        feature_loss.loss(mine, theirs, MASK.bool()), cosine_loss(own, other, MASK.bool())
    )


def test_tinybert_sums_embeddings_and_each_layer_against_the_layer_that_it_follows():
    student, feature_loss, body = pair("tinybert")
    mine, theirs, _ = read_both(student, feature_loss, body)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True}
    with torch.no_grad():
        own, other = student(**inputs).hidden_states, body(**inputs).hidden_states
        embeddings, hidden = (
            feature_loss.projections["embeddings"],
            feature_loss.projections["hidden"],
        )
        expected_R = hidden_loss(embeddings(own[0]), other[0], MASK.bool())
        for layer, follows in ((1, 2), (2, 4)):
            expected_R += hidden_loss(hidden(own[layer]), other[follows], MASK.bool())
            expected_R += attention_loss(
                scores(mine.queries[layer], mine.keys[layer], 2),
                scores(theirs.queries[follows], theirs.keys[follows], 4),
                MASK.bool(),
            )
    torch.testing.assert_close(feature_loss.loss(mine, theirs, MASK.bool()), expected_R)


def test_projections_are_the_students_follow_the_seed_and_are_no_part_of_the_model():
    first, _, _ = pair("tinybert")
    again, _, _ = pair("tinybert")
    other, _, _ = pair("tinybert", seed=1)
    weights = {"a": first.state_dict(), "b": again.state_dict(), "c": other.state_dict()}
    names = {name for name in weights["a"] if name.startswith("projections.")}
    assert names == {"projections.embeddings.weight", "projections.hidden.weight"}
    for name in names:
        assert weights["a"][name].shape == (64, 32)
        assert torch.equal(weights["a"][name], weights["b"][name])
        assert not torch.equal(weights["a"][name], weights["c"][name])
    assert set(without_projections(weights["a"])) == set(
        build_model(num_hidden_layers=2).state_dict()
    )


def test_fillers_do_not_count_and_rows_are_shares_of_the_global_batch():
    student, feature_loss, body = pair("minilm")
    mine, theirs, logits = read_both(student, feature_loss, body)
    loss_R = feature_loss.loss(mine, theirs, MASK.bool()).detach()
    given = (terms_of(logits), mine, theirs, MASK)
    only_first = feature_loss.join(*given, torch.tensor([True, False]), 5)
    torch.testing.assert_close(only_first.feature, loss_R[0] / 5)
    both = feature_loss.join(*given, torch.tensor([True, True]), 5)
    torch.testing.assert_close(both.feature, loss_R.sum() / 5)
    torch.testing.assert_close(both.total.detach(), terms_of(logits).total.detach() + both.feature)
    # two text rows that make one example are one share of it
    one = feature_loss.join(*given, torch.tensor([True]), 5)
    torch.testing.assert_close(one.feature, loss_R.mean() / 5)


def test_tinybert_has_two_stages_and_every_parameter_a_gradient_in_both():
    student, feature_loss, body = pair("tinybert")
    assert feature_loss.until == 5
    assert [feature_loss.has_no_head(step) for step in (1, 5, 6)] == [True, True, False]
    # one step at least teaches the head
    assert pair("tinybert", total_steps=1)[1].until == 0
    assert not pair("minilm")[1].has_no_head(1)
    mine, theirs, logits = read_both(student, feature_loss, body)
    valid_B = torch.tensor([True, True])
    first = feature_loss.join(terms_of(logits), mine, theirs, MASK, valid_B, 2)
    torch.testing.assert_close(first.total.detach(), first.feature)
    first.total.backward()
    norms = {name: float(p.grad.norm()) for name, p in student.named_parameters()}
    assert norms["classifier.weight"] == 0
    assert norms["projections.hidden.weight"] > 0
    student.zero_grad()
    _, _, logits = read_both(student, feature_loss, body)
    second = feature_loss.join(terms_of(logits), None, None, MASK, valid_B, 2)
    assert second.feature == 0
    second.total.backward()
    norms = {name: float(p.grad.norm()) for name, p in student.named_parameters()}
    assert norms["classifier.weight"] > 0
    assert norms["projections.hidden.weight"] == 0


def test_the_student_starts_from_evenly_spaced_layers_of_the_feature_teacher():
    student = build_model(num_hidden_layers=2)
    body = build_model(seed=1, num_hidden_layers=4)
    head = student.classifier.weight.clone()
    assert start_as_feature_teacher(student, body)
    for mine, theirs in ((0, 1), (1, 3)):
        own = student.bert.encoder.layer[mine].state_dict()
        for name, weight in body.bert.encoder.layer[theirs].state_dict().items():
            assert torch.equal(own[name], weight)
    assert torch.equal(
        student.bert.embeddings.word_embeddings.weight, body.bert.embeddings.word_embeddings.weight
    )
    assert torch.equal(student.classifier.weight, head)


@pytest.mark.parametrize(("kind", "sizes"), [("bert", WIDE), ("distilbert", {})])
def test_where_the_feature_teachers_layers_do_not_fit_the_student_keeps_its_own(kind, sizes):
    student = build_model(num_hidden_layers=2)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    assert not start_as_feature_teacher(student, build_model(kind, seed=1, **sizes))
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize(
    ("words", "stage", "said"),
    [
        (
            ["feature_loss=minilm"],
            None,
            "feature_loss=minilm needs a teacher, and there are none; give teachers",
        ),
        (
            ["feature_loss=minilm", "teachers=[a]", "ensemble=none"],
            None,
            "and ensemble=none uses none; give another ensemble",
        ),
        (["method=tinybert", "teachers=[a]"], 3, "feature_loss=tinybert .* give deepspeed=zero2"),
        (
            ["student_init=feature_teacher", "teachers=[a]"],
            None,
            "student_init=feature_teacher needs a feature_loss, and there is none",
        ),
    ],
)
def test_what_rules_layer_outputs_out_is_told(words, stage, said):
    with pytest.raises(UserError, match=said):
        check_feature_loss(config(*words), stage)


@pytest.mark.parametrize("stage", [None, 1, 2])
def test_what_allows_layer_outputs_passes(stage):
    check_feature_loss(config("method=tinybert", "teachers=[a]"), stage)
