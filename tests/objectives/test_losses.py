"""Losses against values worked out by hand, and gradients against finite differences."""

import math

import pytest
import torch
from small import config
from torch.nn import functional as F

from sead_dist.data.kinds import KINDS
from sead_dist.errors import UserError
from sead_dist.objectives.losses import (
    SOFT_LOSSES,
    SoftLoss,
    SoftTargets,
    hard_loss,
    make_loss,
    soft_loss,
    total_loss,
)

# softmax((0, ln 3)) is (1/4, 3/4)
LN3 = math.log(3.0)


def soft_of(logits_BC: torch.Tensor, temperature: float) -> SoftTargets:
    targets_BC = torch.softmax(logits_BC / temperature, -1)
    weights_NB = torch.ones(1, len(logits_BC))
    return SoftTargets(targets_BC, logits_BC, weights_NB, temperature)


def test_kl_by_hand_and_its_factor():
    student_BC = torch.tensor([[0.0, 0.0]])
    teacher = soft_of(torch.tensor([[0.0, LN3]]), 1.0)
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert soft_loss(student_BC, teacher, "kl").item() == pytest.approx(by_hand)
    # logits twice as large at T = 2 are the same distributions; the loss counts T^2 = 4 fold
    twice = soft_of(torch.tensor([[0.0, 2 * LN3]]), 2.0)
    assert soft_loss(2 * student_BC, twice, "kl").item() == pytest.approx(4 * by_hand)


def test_the_factor_keeps_the_gradient_of_soft_targets_as_large_at_any_temperature():
    # Hinton et al. 2015: for large T, d/dz of T^2 * KL goes to (z - v) / C with centred logits
    student_BC = torch.tensor([[0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    teacher_BC = torch.tensor([[-0.5, 0.5]], dtype=torch.float64)
    soft_loss(student_BC, soft_of(teacher_BC, 1000.0), "kl").sum().backward()
    expected = (student_BC.detach() - teacher_BC) / 2
    torch.testing.assert_close(student_BC.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_student_that_says_what_its_teachers_say_has_no_soft_loss():
    # in fp32 rounding alone, times T^2, can pass 1e-6
    logits_BC = torch.randn(5, 3, dtype=torch.float64)
    for loss in ("kl", "mse", "mse_centered"):
        assert soft_loss(logits_BC, soft_of(logits_BC, 3.0), loss).abs().max() < 1e-12


def test_squared_error_is_the_mean_over_classes():
    found = soft_loss(torch.tensor([[1.0, 5.0]]), soft_of(torch.tensor([[3.0, 4.0]]), 2.0), "mse")
    assert found.tolist() == [(4 + 1) / 2]


def test_centred_squared_error_does_not_see_what_probabilities_do_not_depend_on():
    student_BC, target_BC = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 4.0]])
    # less their means: (-2, 2) and (-.5, .5)
    found = soft_loss(student_BC, soft_of(target_BC, 1.0), "mse_centered")
    assert found.tolist() == [1.5**2]
    shifted = soft_loss(student_BC + 7, soft_of(target_BC - 2, 1.0), "mse_centered")
    assert shifted.tolist() == [1.5**2]


def test_hard_loss_by_hand_and_nothing_where_there_is_no_label():
    student_BC = torch.tensor([[0.0, LN3], [0.0, LN3], [7.0, -7.0]])
    found = hard_loss(student_BC, torch.tensor([1, 0, -1]))
    torch.testing.assert_close(found, -torch.tensor([0.75, 0.25, 1.0]).log())
    scores = hard_loss(
        torch.tensor([[2.0], [9.0]]), torch.tensor([3.5, float("nan")]), "squared_error"
    )
    assert scores.tolist() == [2.25, 0.0]


def test_labelled_rows_weigh_both_losses_and_unlabelled_rows_the_soft_alone():
    student_BC = torch.tensor([[0.0, LN3], [0.0, LN3], [0.0, 0.0]])
    soft = soft_of(torch.tensor([[0.0, 0.0]] * 3), 1.0)
    labels_B = torch.tensor([0, -1, 1])
    valid_B = torch.tensor([True, True, False])
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    terms = total_loss(student_BC, labels_B, valid_B, soft, "kl", 0.3, valid_rows=2)
    assert terms.total.item() == pytest.approx((0.3 * kl + 0.7 * math.log(4) + kl) / 2)
    assert terms.soft.item() == pytest.approx(2 * kl / 2)
    assert terms.hard.item() == pytest.approx(math.log(4) / 2)


def test_without_teachers_the_hard_loss_is_all():
    student_BC = torch.tensor([[0.0, LN3], [5.0, 0.0]])
    labels_B, valid_B = torch.tensor([1, -1]), torch.tensor([True, True])
    terms = total_loss(student_BC, labels_B, valid_B, None, "kl", 0.9, valid_rows=2)
    assert terms.total.item() == pytest.approx(-math.log(0.75) / 2)
    assert terms.soft.item() == 0.0


def test_shares_of_micro_batches_sum_to_the_mean_over_the_global_batch():
    student_BC, teacher_BC = torch.randn(6, 3), torch.randn(6, 3)
    labels_B = torch.tensor([0, 1, 2, -1, 0, 1])
    valid_B = torch.ones(6, dtype=torch.bool)

    def share(part):
        soft = soft_of(teacher_BC[part], 2.0)
        return total_loss(
            student_BC[part], labels_B[part], valid_B[part], soft, "kl", 0.5, valid_rows=6
        ).total

    whole = share(slice(0, 6))
    torch.testing.assert_close(share(slice(0, 1)) + share(slice(1, 6)), whole)


@pytest.mark.parametrize("loss", ["kl", "mse", "none"])
def test_gradients_agree_with_finite_differences(loss):
    torch.manual_seed(0)
    student_BC = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher_BC = torch.randn(4, 3, dtype=torch.float64)
    labels_B = torch.tensor([0, 2, -1, 1])
    valid_B = torch.tensor([True, True, True, False])
    soft = None if loss == "none" else soft_of(teacher_BC, 2.5)

    def total(logits_BC):
        return total_loss(logits_BC, labels_B, valid_B, soft, loss, 0.4, valid_rows=3).total

    assert torch.autograd.gradcheck(total, (student_BC,))


def test_regression_gradients_agree_with_finite_differences_with_a_missing_score():
    student_BC = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    labels_B = torch.tensor([0.5, float("nan"), 4.0], dtype=torch.float64)
    scores_BC = torch.randn(3, 1, dtype=torch.float64)
    soft = SoftTargets(scores_BC, scores_BC, torch.ones(1, 3), 1.0)
    valid_B = torch.ones(3, dtype=torch.bool)

    def total(logits_BC):
        return total_loss(logits_BC, labels_B, valid_B, soft, "mse", 0.4, 3, "squared_error").total

    assert torch.autograd.gradcheck(total, (student_BC,))


def test_the_hard_loss_is_cross_entropy():
    student_BC, labels_B = torch.randn(8, 4), torch.randint(4, (8,))
    expected = F.cross_entropy(student_BC, labels_B)
    torch.testing.assert_close(hard_loss(student_BC, labels_B).mean(), expected)


def test_a_loss_that_gives_one_number_for_all_rows_is_refused(monkeypatch):
    """It would be counted once for each row."""
    monkeypatch.setitem(SOFT_LOSSES, "mean", SoftLoss(lambda student, soft: student.mean()))
    with pytest.raises(
        UserError, match=r"loss=mean gave the shape \(\) for 2 rows; expected one value"
    ):
        soft_loss(torch.ones(2, 3), soft_of(torch.ones(2, 3), 1.0), "mean")


def test_the_share_of_the_soft_loss_goes_evenly_from_alpha_to_alpha_end():
    def shares(total_steps, **keys):
        loss = make_loss(config(**keys), KINDS["classification"], total_steps)
        return [loss.alpha_at(step) for step in range(total_steps)]

    assert shares(4, alpha=0.9, alpha_end=0.3) == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert shares(1, alpha=0.9, alpha_end=0.3) == [0.9]
    assert shares(4, alpha=0.9) == [0.9] * 4


def test_a_row_that_no_teacher_answers_counts_by_its_gold_label_alone():
    """And one without a label not at all; the number of rows stays."""
    student_BC = torch.tensor([[0.0, 0.0], [0.0, LN3], [0.0, LN3]])
    soft = soft_of(torch.tensor([[0.0, LN3], [5.0, 0.0], [5.0, 0.0]]), 1.0)
    soft.weights_NB[:, 1:] = 0
    labels_B, valid_B = torch.tensor([1, 1, -1]), torch.ones(3, dtype=torch.bool)
    found = total_loss(student_BC, labels_B, valid_B, soft, "kl", 0.9, 3)
    first = soft_loss(student_BC[:1], soft_of(torch.tensor([[0.0, LN3]]), 1.0), "kl").item()
    hard = [math.log(2), math.log(4 / 3)]
    by_hand = (0.9 * first + 0.1 * hard[0] + hard[1]) / 3
    assert found.total.item() == pytest.approx(by_hand)
    assert found.soft.item() == pytest.approx(first / 3)
