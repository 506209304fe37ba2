"""Every way to combine teachers, worked out by hand. N teachers, B rows, C classes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from small import config

from sead_dist.config.registered import ADDED
from sead_dist.data.kinds import KINDS
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.objectives import ensemble
from sead_dist.objectives.ensemble import (
    Ensemble,
    check_method,
    combine,
    make_ensemble,
    needs_selection,
    unseen,
)
from sead_dist.objectives.weightings import (
    WEIGHTINGS,
    ByRow,
    Known,
    Weighting,
    chosen_teacher,
    register_ensemble,
)


def logs(rows) -> torch.Tensor:
    """Logits whose softmax is these probabilities, NBC."""
    return torch.log(torch.tensor(rows, dtype=torch.float32))


def ask(method, logits_NBC, labels=None, weights=None, temperature=1.0, present=None, **more):
    N, B = logits_NBC.shape[:2]
    present_NB = torch.ones(N, B, dtype=torch.bool) if present is None else torch.tensor(present)
    labels_B = None if labels is None else torch.tensor(labels)
    weights_N = torch.full((N,), 1 / N) if weights is None else torch.tensor(weights)
    teachers = TeacherLogits(logits_NBC, present_NB)
    return combine(method, teachers, labels_B, weights_N, temperature, **more)


def frozen_weights(method, given, scores, chosen) -> torch.Tensor:
    known = Known(given, chosen, (), scores)
    return ensemble.frozen_weights(method, known)


TWO = logs([[[0.8, 0.2]], [[0.5, 0.5]]])


def test_mean_of_logits():
    found = ask("mean_logits", torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]]]))
    assert found.logits_BC.tolist() == [[2.0, 1.0]]
    torch.testing.assert_close(found.targets_BC, torch.softmax(torch.tensor([[2.0, 1.0]]), -1))


def test_mean_of_probabilities():
    found = ask("mean_probabilities", TWO)
    torch.testing.assert_close(found.targets_BC, torch.tensor([[0.65, 0.35]]))
    # its logits give the targets again at the temperature
    torch.testing.assert_close(torch.softmax(found.logits_BC, -1), found.targets_BC)


def test_mean_of_probabilities_at_a_temperature():
    # (16:1) at T = 2 is (4:1); (1:1) stays
    found = ask("mean_probabilities", logs([[[16.0, 1.0]], [[1.0, 1.0]]]), temperature=2.0)
    torch.testing.assert_close(found.targets_BC, torch.tensor([[0.65, 0.35]]))
    torch.testing.assert_close(torch.softmax(found.logits_BC / 2.0, -1), found.targets_BC)


def test_fixed_weights_are_normalised():
    weights_N = frozen_weights("fixed", [3.0, 1.0], [], None)
    assert weights_N.tolist() == [0.75, 0.25]
    found = ask("fixed", TWO, weights=weights_N.tolist())
    torch.testing.assert_close(found.targets_BC, torch.tensor([[0.725, 0.275]]))


def test_score_weights_are_the_selection_scores_above_zero():
    weights_N = frozen_weights("score", [1.0, 1.0, 1.0], [0.9, 0.3, -0.2], None)
    torch.testing.assert_close(weights_N, torch.tensor([0.75, 0.25, 0.0]))
    with pytest.raises(UserError, match="ensemble=score: every teacher's weight is 0"):
        frozen_weights("score", [1.0, 1.0], [-0.1, 0.0], None)


def test_equal_weights_look_neither_at_the_given_ones_nor_at_scores():
    assert frozen_weights("mean_logits", [5.0, 1.0], [0.9, 0.1], None).tolist() == [0.5, 0.5]


def test_confidence_by_hand():
    # CA-MKD: w_n = (1 - exp(l_n) / sum_m exp(l_m)) / (N - 1), l the cross-entropy with the gold
    # label; exp(l) = 1/p: for p = 0.8, 0.5, 0.2 these are 1.25, 2, 5, sum 8.25
    three = logs([[[0.8, 0.2]] * 3, [[0.5, 0.5]] * 3, [[0.2, 0.8]] * 3])
    found = ask("confidence", three, labels=[0, 1, -1])
    weights = [(1 - 1.25 / 8.25) / 2, (1 - 2 / 8.25) / 2, (1 - 5 / 8.25) / 2]
    torch.testing.assert_close(found.weights_NB[:, 0], torch.tensor(weights))
    torch.testing.assert_close(found.weights_NB[:, 1], torch.tensor(weights[::-1]))
    # equal on an unlabelled row
    torch.testing.assert_close(found.weights_NB[:, 2], torch.full((3,), 1 / 3))
    expected = sum(w * p for w, p in zip(weights, (0.8, 0.5, 0.2), strict=True))
    assert found.targets_BC[0, 0].item() == pytest.approx(expected)


def test_confidence_where_gold_labels_may_not_be_seen_weighs_all_alike():
    torch.testing.assert_close(ask("confidence", TWO).weights_NB, torch.full((2, 1), 0.5))


def test_entropy_by_hand():
    # the sure teacher has entropy 0.5004, the unsure one ln 2
    sure = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    unsure = math.log(2)
    weight = math.exp(-sure) / (math.exp(-sure) + math.exp(-unsure))
    found = ask("entropy", TWO)
    assert found.weights_NB[:, 0].tolist() == pytest.approx([weight, 1 - weight])
    assert found.targets_BC[0, 0].item() == pytest.approx(weight * 0.8 + (1 - weight) * 0.5)


def test_a_teacher_that_was_not_asked_has_no_weight_and_rows_do_not_mix():
    torch.manual_seed(0)
    logits_NBC = torch.randn(3, 4, 2)
    present = [[True] * 4, [False, True, True, True], [True, True, False, True]]
    for method in ("mean_logits", "mean_probabilities", "confidence", "entropy", "fixed"):
        found = ask(method, logits_NBC, labels=[0, 1, 0, -1], present=present)
        torch.testing.assert_close(found.weights_NB.sum(0), torch.ones(4))
        assert found.weights_NB[1, 0] == 0
        assert found.weights_NB[2, 2] == 0
        alone = ask(method, logits_NBC[:, 1:2], labels=[1], present=[row[1:2] for row in present])
        torch.testing.assert_close(found.targets_BC[1:2], alone.targets_BC)


def test_those_that_are_asked_count_alike_where_none_of_them_has_any_weight():
    three = logs([[[0.8, 0.2]], [[0.5, 0.5]], [[0.1, 0.9]]])
    present = [[False], [True], [True]]
    found = ask("fitted", three, weights=[1.0, 0.0, 0.0], present=present)
    assert found.weights_NB[:, 0].tolist() == [0, 0.5, 0.5]
    assert found.targets_BC[0, 0].item() == pytest.approx(0.3)


def test_of_a_row_the_teachers_are_asked_that_were_not_trained_on_it_where_there_are_any():
    seen_NR = np.array([[True, False, True], [False, False, True]])
    assert unseen(None, seen_NR).tolist() == [[False, True, True], [True, True, True]]
    # one that nobody would ask stays unasked
    needed_NR = np.array([[True, True, False], [False, True, True]])
    assert unseen(needed_NR, seen_NR).tolist() == [[True, True, False], [False, True, True]]


def test_one_teacher_alone_is_the_ensemble_whatever_the_method():
    logits_NBC = torch.randn(1, 5, 3)
    expected = torch.softmax(logits_NBC[0] / 2.0, -1)
    for method in WEIGHTINGS:
        routes_B = torch.zeros(5, dtype=torch.long) if method == "routed" else None
        found = ask(method, logits_NBC, labels=[0, 1, 2, -1, 0], temperature=2.0, routes_B=routes_B)
        torch.testing.assert_close(found.targets_BC, expected)


@pytest.mark.parametrize("method", ["single", "random", "routed"])
def test_of_one_teacher_the_combined_logits_are_its_own(method):
    """loss=mse fits them, so they must not be moved on the way over probabilities."""
    logits_NBC = torch.tensor([[[5.0, -5.0]], [[1.0, 2.0]]])
    routes_B = torch.tensor([1]) if method == "routed" else None
    found = ask(method, logits_NBC, weights=[0.0, 1.0], temperature=2.0, routes_B=routes_B)
    assert found.logits_BC.tolist() == [[1.0, 2.0]]


def test_regression_takes_the_mean_of_scores():
    found = ask("mean_logits", torch.tensor([[[1.0]], [[4.0]]]), regression=True)
    assert found.targets_BC.tolist() == [[2.5]]


@pytest.mark.parametrize(
    ("method", "loss", "message"),
    [("entropy", "mse", "ensemble=entropy needs classes"), ("mean_logits", "kl", "loss=kl needs")],
)
def test_what_regression_cannot_do_is_refused(method, loss, message):
    given = config("teachers=[a,b]", ensemble=method, loss=loss)
    with pytest.raises(UserError, match=message):
        check_method(given, KINDS["regression"])
    check_method(given, KINDS["classification"])


def test_a_method_without_what_it_needs_is_refused():
    with pytest.raises(UserError, match="ensemble=routed needs teacher_column=COLUMN"):
        check_method(config("teachers=[a,b]", ensemble="routed"), KINDS["classification"])
    with pytest.raises(UserError, match="teacher=c is not a teacher of this run; give one of a, b"):
        check_method(config("teachers=[a,b]", teacher="c"), KINDS["classification"])


def test_single_is_the_best_teacher_by_selection_or_the_one_that_is_named():
    assert frozen_weights("single", [1.0] * 3, [0.5, 0.9, 0.9], None).tolist() == [0, 1, 0]
    assert frozen_weights("single", [1.0] * 3, [], 2).tolist() == [0, 0, 1]
    found = ask("single", TWO, weights=[0.0, 1.0], present=[[False], [True]])
    torch.testing.assert_close(found.targets_BC, torch.tensor([[0.5, 0.5]]))


def test_routed_takes_each_rows_own_teacher():
    two = logs([[[0.8, 0.2]] * 2, [[0.4, 0.6]] * 2])
    found = ask("routed", two, routes_B=torch.tensor([1, 0]))
    torch.testing.assert_close(found.targets_BC, torch.tensor([[0.4, 0.6], [0.8, 0.2]]))


def test_answers_weighs_teachers_by_the_probability_of_the_gold_label():
    three = logs([[[0.8, 0.2]] * 3, [[0.5, 0.5]] * 3, [[0.2, 0.8]] * 3])
    found = ask("answers", three, labels=[0, 1, -1])
    weights = torch.tensor([0.8, 0.5, 0.2]) / 1.5
    torch.testing.assert_close(found.weights_NB[:, 0], weights)
    torch.testing.assert_close(found.weights_NB[:, 1], weights.flip(0))
    torch.testing.assert_close(found.weights_NB[:, 2], torch.full((3,), 1 / 3))
    # 0.8 * 0.8 + 0.5 * 0.5 + 0.2 * 0.2 of 1.5
    torch.testing.assert_close(found.targets_BC[0, 0], torch.tensor(0.93 / 1.5))


def test_answers_of_scores_do_not_depend_on_their_scale():
    # squared errors 1 and 3, of mean 2: exp(-0.5) to exp(-1.5), whatever the unit
    for unit in (1.0, 100.0):
        scores = torch.tensor([[[2.0]], [[1.0 + 3**0.5]]]) * unit
        found = ask("answers", scores, labels=[1.0 * unit], regression=True)
        first = 1 / (1 + math.exp(-1.0))
        torch.testing.assert_close(found.weights_NB[:, 0], torch.tensor([first, 1 - first]))
    unlabelled = ask("answers", scores, labels=[math.nan], regression=True)
    assert unlabelled.weights_NB[:, 0].tolist() == [0.5, 0.5]


class Older(Weighting):
    """By the order in which teachers are given."""

    def frozen(self, known):
        return torch.arange(len(known.given), 0.0, -1.0)


@pytest.fixture
def older():
    register_ensemble("older", Older())
    yield
    del WEIGHTINGS["older"], ADDED.owners["ensemble"]["older"]


def test_a_registered_weighting_may_freeze_weights_and_leave_the_rest(older):
    given = config("teachers=[a,b]", ensemble="older")
    weights_N = frozen_weights("older", [1.0, 1.0], [], None)
    torch.testing.assert_close(weights_N, torch.tensor([2 / 3, 1 / 3]))
    ensemble = make_ensemble(given, KINDS["classification"], weights_N)
    teachers = TeacherLogits(TWO, torch.ones(2, 1, dtype=torch.bool))
    found = ensemble.soft_targets(teachers, None, None, 0, 0)
    torch.testing.assert_close(found.weights_NB[:, 0], weights_N)
    assert not needs_selection(given)
    Older.frozen = lambda self, known: torch.tensor([2.0, -1.0])
    with pytest.raises(
        UserError, match=r"ensemble=older gave the weights \[2.0, -1.0\]; expected 0 or more"
    ):
        frozen_weights("older", [1.0, 1.0], [], None)
    Older.frozen = lambda self, known: torch.ones(3)
    with pytest.raises(
        UserError,
        match=r"ensemble=older gave weights of the shape \(3,\) .* each of the 2 teachers",
    ):
        frozen_weights("older", [1.0, 1.0], [], None)


def test_a_weighting_of_an_older_version_is_refused_with_the_new_name():
    """A method of another name would never be called."""

    class AsksAll(Weighting):
        asks_all = True

    with pytest.raises(UserError) as told:
        register_ensemble("older", AsksAll())
    assert str(told.value) == (
        "the ensemble 'older' has asks_all, which is called needs_all now; rename it"
    )
    assert "older" not in ADDED.owners["ensemble"]


def test_weights_of_another_shape_are_refused():
    with pytest.raises(
        UserError, match=r"weights have the shape \(1, 2\); expected \[teachers, rows\]"
    ):
        ask(ByRow(lambda logits_NBC, labels_B: torch.ones(1, 2)), TWO)


def test_the_random_teacher_is_a_function_of_seed_step_and_micro_batch():
    places = [(step, micro) for step in range(100) for micro in range(4)]
    chosen = [chosen_teacher(7, *place, 3) for place in places]
    torch.manual_seed(123)
    torch.rand(17)
    assert chosen == [chosen_teacher(7, *place, 3) for place in places]
    assert chosen != [chosen_teacher(8, *place, 3) for place in places]
    # every teacher has its share
    assert all(100 < count < 170 for count in Counter(chosen).values())
    assert len(Counter(chosen)) == 3


def test_agreement_counts_valid_rows_that_were_asked():
    student_BC = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teachers = TeacherLogits(
        torch.tensor([[[5.0, 0], [0, 5.0], [0, 5.0]], [[5.0, 0], [5.0, 0], [5.0, 0]]]),
        torch.tensor([[True, True, True], [True, False, True]]),
    )
    ensemble = Ensemble(WEIGHTINGS["mean_logits"], torch.ones(2), 1.0, True, 0)
    found = ensemble.agreement(student_BC, teachers, torch.tensor([True, True, False]))
    np.testing.assert_array_equal(found.numpy(), [[1, 1], [2, 1]])


def test_teachers_that_answer_a_row_share_out_its_weights():
    three = logs([[[0.8, 0.2]] * 2, [[0.5, 0.5]] * 2, [[0.1, 0.9]] * 2])
    present = [[True, False], [True, False], [False, False]]
    found = ask("fixed", three, weights=[0.2, 0.6, 0.2], present=present)
    torch.testing.assert_close(found.weights_NB[:, 0], torch.tensor([0.25, 0.75, 0.0]))
    assert found.weights_NB[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert found.targets_BC.isfinite().all()


@pytest.mark.parametrize("method", ["confidence", "entropy", "answers"])
def test_a_weighting_by_answers_sees_only_those_that_are_there(method):
    """Row 1 is answered by two of three: it is weighted as if there were two."""
    three = logs([[[0.8, 0.2]] * 2, [[0.6, 0.4]] * 2, [[0.1, 0.9]] * 2])
    present = [[True, True], [True, True], [True, False]]
    found = ask(method, three, labels=[0, 0], present=present)
    all_there = ask(method, three[:, :1], labels=[0])
    two = ask(method, three[:2, 1:], labels=[0])
    torch.testing.assert_close(found.weights_NB[:, :1], all_there.weights_NB)
    torch.testing.assert_close(found.weights_NB[:2, 1:], two.weights_NB)
    assert found.weights_NB[2, 1] == 0


def test_the_ensemble_answers_for_whom_is_there_and_knows_which_rows_are_complete():
    ensemble = Ensemble(WEIGHTINGS["mean_logits"], torch.tensor([0.5, 0.5]), 1.0, True, 0)
    logits_NBC = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[math.nan] * 2, [3.0, 0.0]]])
    assert ensemble.answer(logits_NBC, None).logits_BC.tolist() == [[1.0, 0.0], [2.0, 0.0]]
    assert ensemble.complete(logits_NBC, None).tolist() == [False, True]
    one = Ensemble(WEIGHTINGS["single"], torch.tensor([1.0, 0.0]), 1.0, True, 0)
    assert one.complete(logits_NBC, None).tolist() == [True, True]
    routed = Ensemble(WEIGHTINGS["routed"], torch.tensor([0.5, 0.5]), 1.0, True, 0)
    assert routed.complete(logits_NBC, torch.tensor([1, 0])).tolist() == [False, True]
    assert routed.complete(logits_NBC, torch.tensor([0, 1])).tolist() == [True, True]
    calibrated = Ensemble(
        WEIGHTINGS["mean_logits"],
        torch.tensor([0.5, 0.5]),
        1.0,
        True,
        0,
        calibration_N=torch.tensor([1.0, 3.0]),
    )
    assert calibrated.answer(logits_NBC, None).logits_BC.tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("method", "weights", "routes"),
    [("single", [0.0, 1.0], None), ("fixed", [0.0, 1.0], None), ("routed", [0.5, 0.5], [1, 1])],
)
def test_who_teaches_no_row_answers_none_in_the_ensembles_place(method, weights, routes):
    """As in training: such a teacher is not asked there."""
    logits_NBC = torch.tensor([[[5.0, 0.0], [5.0, 0.0]], [[0.0, 1.0], [math.nan] * 2]])
    one = Ensemble(WEIGHTINGS[method], torch.tensor(weights), 1.0, has_classes=True, seed=0)
    routes_B = None if routes is None else torch.tensor(routes)
    said = one.answer(logits_NBC, routes_B)
    assert said.weights_NB.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    mean = Ensemble(WEIGHTINGS["fitted"], torch.tensor([0.0, 1.0]), 1.0, has_classes=True, seed=0)
    assert mean.answer(logits_NBC, None).weights_NB.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_who_was_not_validated_is_not_chosen_and_has_no_score():
    known = Known([1, 1], None, (), [None, 0.7], names=["gpt", "a"])
    assert WEIGHTINGS["single"].frozen(known).tolist() == [0.0, 1.0]
    with pytest.raises(UserError, match="could be validated on it; name one, such as teacher=g"):
        WEIGHTINGS["single"].frozen(Known([1, 1], None, (), [None, None], names=["gpt", "a"]))
    with pytest.raises(UserError, match="and gpt has predictions of too few"):
        WEIGHTINGS["score"].frozen(known)


def test_weights_are_fitted_on_the_rows_that_all_answer():
    random = np.random.default_rng(0)
    labels_B = random.integers(0, 2, 260)
    right = np.eye(2)[labels_B] * 2 + random.normal(size=(260, 2))
    logits_NBC = np.stack([right, random.normal(size=(260, 2))])
    whole = Known([1, 1], None, (), (), logits_NBC=logits_NBC[:, :210], labels_B=labels_B[:210])
    absent = logits_NBC.copy()
    absent[1, 210:] = np.nan
    known = Known([1, 1], None, (), (), logits_NBC=absent, labels_B=labels_B)
    fitted = WEIGHTINGS["fitted"]
    assert torch.equal(fitted.frozen(known), fitted.frozen(whole))
    absent[1, 190:] = np.nan
    with pytest.raises(UserError, match="a prediction of every teacher, and there are 190"):
        fitted.frozen(known)
