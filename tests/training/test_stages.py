"""TinyBERT's second stage: what rested in the first begins again, and no further than it should."""

import pytest
import torch
from small import ALONE, build_model, config

from sead_dist.models.hidden_states import find_layer_parts
from sead_dist.objectives.feature_losses import Rest, make_feature_loss
from sead_dist.training.engine import Engine
from sead_dist.training.identity import RULES, rules_of

STEPS, UNTIL, RATE = 40, 20, 1e-3
IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])


def built(kind="bert", **keys):
    """A student, its feature loss and its engine, all of them from the run's own functions."""
    given = config(
        "teachers=[a]", "method=tinybert", learning_rate=RATE, max_grad_norm=0,
        **{"warmup_steps": 0, "lr_scheduler_type": "constant", **keys},
    )  # fmt: skip
    student = build_model(kind)
    feature_teacher = find_layer_parts(build_model(seed=1), "teacher a", True)
    feature_loss = make_feature_loss(given, student, feature_teacher, STEPS)
    assert feature_loss.until == UNTIL
    return student, feature_loss, Engine(student, given, ALONE, STEPS, feature_loss.rest)


def loss_of(student, feature_loss, step):
    """Made-up losses of a step, that reach what the method's do; each step has its own."""
    with feature_loss.reading() as inside:
        logits = student(input_ids=(IDS + step) % 60, attention_mask=torch.ones_like(IDS)).logits
    if step >= feature_loss.until:
        return (logits * torch.tensor([3.0, -2.0])).mean()
    maps = (*inside.queries.values(), *inside.keys.values())
    read = sum(
        feature_loss.projections["hidden"](state).pow(2).mean() for state in inside.hidden.values()
    )
    read = read + feature_loss.projections["embeddings"](inside.hidden[0]).pow(2).mean()
    return read + sum(one.pow(2).mean() for one in maps) + logits.sum() * 0.0


def take(student, feature_loss, engine, steps):
    """Take these steps; by how much each moved the parameters that rested, at most."""
    moved = []
    for step in steps:
        engine.wake(step)
        before = {n: p.detach().clone() for n, p in student.named_parameters()}
        with engine.accumulate(last=True):
            engine.backward(loss_of(student, feature_loss, step))
        engine.step()
        after = dict(student.named_parameters())
        moved.append(
            max(float((after[n] - before[n]).abs().max()) for n in feature_loss.rest.names)
        )
    return moved


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert"])
def test_what_rests_is_what_the_first_stage_gives_no_gradient(kind):
    student, feature_loss, engine = built(kind)
    loss_of(student, feature_loss, 0).backward()
    still = {n for n, p in student.named_parameters() if p.grad is None or not bool(p.grad.any())}
    engine.close()
    assert still >= feature_loss.rest.names > set()
    # the last layer's values and what follows them are read, and so are all the others
    assert not {name for name in still - feature_loss.rest.names if "layer" in name}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_first_steps_of_the_second_stage_go_no_further_than_the_learning_rate(decay):
    student, feature_loss, engine = built(weight_decay=decay)
    at_rest = take(student, feature_loss, engine, range(UNTIL))
    first = take(student, feature_loss, engine, range(UNTIL, UNTIL + 5))
    engine.close()
    assert at_rest == [0.0] * UNTIL
    # decay takes a share of the weight itself; gradients that grow let Adam go a little further
    most = RATE * (1 + decay * 4)
    assert 0.9 * RATE < first[0] <= most * 1.001
    assert all(0.5 * RATE < step <= most * 1.15 for step in first)


def test_the_learning_rate_of_what_rested_rises_over_a_warm_up_of_its_own():
    student, feature_loss, engine = built(warmup_steps=0.25)
    assert feature_loss.rest.warmup == 5
    take(student, feature_loss, engine, range(UNTIL))
    moved = take(student, feature_loss, engine, range(UNTIL, UNTIL + 7))
    engine.close()
    shares = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0]
    for step, share in zip(moved, shares, strict=True):
        assert 0.5 * share * RATE < step <= share * RATE * 1.1
    assert engine.learning_rate == RATE
    assert [Rest(frozenset(), 4, 1).share(step) for step in (0, 3, 4, 5, 6)] == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("stop", [UNTIL - 1, UNTIL, UNTIL + 1, UNTIL + 9])
def test_invariant_06_resumed_around_the_second_stage_every_bit_is_the_same(tmp_path, stop):
    student, feature_loss, engine = built(warmup_steps=0.1, lr_scheduler_type="linear")
    take(student, feature_loss, engine, range(stop))
    engine.save(tmp_path)
    take(student, feature_loss, engine, range(stop, STEPS))
    engine.close()
    again, other, resumed = built(warmup_steps=0.1, lr_scheduler_type="linear")
    resumed.load(tmp_path)
    take(again, other, resumed, range(stop, STEPS))
    resumed.close()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name)), name


def test_sgd_has_the_second_stages_learning_rate_too():
    student, feature_loss, engine = built(optim="sgd")
    assert take(student, feature_loss, engine, range(UNTIL)) == [0.0] * UNTIL
    assert take(student, feature_loss, engine, [UNTIL])[0] > 0
    engine.close()


def test_a_run_of_one_stage_has_the_groups_and_rules_that_it_had():
    given = config("teachers=[a]", "method=minilm")
    engine = Engine(build_model(), given, ALONE, STEPS)
    assert [sorted(group) for group in engine.optimizer.param_groups].count([]) == 0
    assert len(engine.optimizer.param_groups) == 2
    assert not any("rested" in group for group in engine.optimizer.param_groups)
    engine.close()
    assert rules_of(given) == RULES
    assert rules_of(config("teachers=[a]", "method=tinybert")) == {**RULES, "stages": 2}
