"""Each loss over layer outputs against values worked out by hand, its gradient against finite
differences, and its blindness to padding."""

import math

import pytest
import torch

from sead_dist.models.hidden_states import layer_map, scores
from sead_dist.objectives.feature_losses import (
    attention_loss,
    cosine_loss,
    hidden_loss,
    minilm_loss,
    relation_heads,
    relation_loss,
    relations_loss,
)

LOG = math.log


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask(*rows) -> torch.Tensor:
    return torch.tensor(rows).bool()


def test_cosine_loss_by_hand():
    # row 1: angles of 0 and 90 degrees -> 1 - 1 and 1 - 0; row 2: 180 degrees -> 2, then padding
    student = tensor([[[3, 4], [2, 0]], [[1, 1], [5, 0]]])
    teacher = tensor([[[6, 8], [0, 7]], [[-2, -2], [5, 0]]])
    found = cosine_loss(student, teacher, mask([1, 1], [1, 0]))
    torch.testing.assert_close(found, tensor([(0 + 1) / 2, 2]))


def test_hidden_loss_by_hand():
    # means over two numbers: (1 + 9) / 2 = 5 and (0 + 4) / 2 = 2; in row 2 the second is padding
    student = tensor([[[1, 3], [0, 2]], [[1, 3], [100, 100]]])
    teacher = torch.zeros_like(student) + tensor([0, 0])
    found = hidden_loss(student, teacher, mask([1, 1], [1, 0]))
    torch.testing.assert_close(found, tensor([(5 + 2) / 2, 5]))


def test_scores_are_products_by_head_over_the_root_of_the_heads_width():
    # two heads of width 1, then one of width 2
    left, right = tensor([[[1, 2]]]), tensor([[[3, 5]]])
    torch.testing.assert_close(scores(left, right, 2), tensor([[[[3]], [[10]]]]))
    torch.testing.assert_close(scores(left, right, 1), tensor([[[[13 / math.sqrt(2)]]]]))
    # the row is the left one's token, the column the right one's
    two = scores(tensor([[[1.0], [2.0]]]), tensor([[[10.0], [100.0]]]), 1)
    torch.testing.assert_close(two, tensor([[[[10, 100], [20, 200]]]]))


def test_attention_loss_by_hand():
    student = tensor([[[[1, 0], [0, 0]], [[0, 2], [0, 0]]]])
    teacher = torch.zeros_like(student)
    # head 1: MSE 1/4, head 2: 4/4; their mean
    torch.testing.assert_close(
        attention_loss(student, teacher, mask([1, 1])), tensor([(1 / 4 + 4 / 4) / 2])
    )
    # one token alone: only the first corner counts, 1 and 0
    torch.testing.assert_close(attention_loss(student, teacher, mask([1, 0])), tensor([1 / 2]))


def test_attention_of_other_head_counts_is_averaged_over_heads_first():
    student = tensor([[[[1, 1], [1, 1]], [[3, 3], [3, 3]]]])
    teacher = tensor([[[[5, 5], [5, 5]]]])
    # the heads' mean is 2 everywhere: (5 - 2)^2
    torch.testing.assert_close(attention_loss(student, teacher, mask([1, 1])), tensor([9]))


def test_relation_loss_by_hand():
    # the teacher's rows: (1/2, 1/2) and (3/4, 1/4); the student's: (1/4, 3/4) and (3/4, 1/4)
    teacher = tensor([[[[0, 0], [LOG(3), 0]]]])
    student = tensor([[[[0, LOG(3)], [LOG(3), 0]]]])
    first = 0.5 * LOG(0.5 / 0.25) + 0.5 * LOG(0.5 / 0.75)
    torch.testing.assert_close(
        relation_loss(student, teacher, mask([1, 1])), tensor([(first + 0) / 2])
    )
    # with one token there is one key, and all weight is on it
    torch.testing.assert_close(relation_loss(student, teacher, mask([1, 0])), tensor([0]))


def test_minilm_loss_is_of_attention_and_of_values_with_values():
    # one head of width 1, two tokens; scores are products of two numbers
    query_T, key_T, value_T = tensor([[[1], [0]]]), tensor([[[LOG(3)], [0]]]), tensor([[[0], [0]]])
    same = torch.zeros_like(query_T)
    # attention: (3/4, 1/4) and (1/2, 1/2) against (1/2, 1/2) twice
    attention = (0.75 * LOG(0.75 / 0.5) + 0.25 * LOG(0.25 / 0.5)) / 2
    student, teacher = (same, same, same), (query_T, key_T, value_T)
    torch.testing.assert_close(minilm_loss(student, teacher, 1, mask([1, 1])), tensor([attention]))
    # values: v v^T has LOG(3) in its first corner and zeros elsewhere, so the same two rows
    value_T = tensor([[[math.sqrt(LOG(3))], [0]]])
    torch.testing.assert_close(
        minilm_loss(student, (same, same, value_T), 1, mask([1, 1])), tensor([attention])
    )


def test_relations_loss_is_of_queries_keys_and_values_each_with_themselves():
    root = math.sqrt(LOG(3))
    one, none = tensor([[[root], [0]]]), tensor([[[0], [0]]])
    each = (0.75 * LOG(0.75 / 0.5) + 0.25 * LOG(0.25 / 0.5)) / 2
    for place in range(3):
        teacher = [one if place == n else none for n in range(3)]
        found = relations_loss([none] * 3, teacher, 1, mask([1, 1]))
        torch.testing.assert_close(found, tensor([each]))
    torch.testing.assert_close(
        relations_loss([none] * 3, [one] * 3, 1, mask([1, 1])), tensor([3 * each])
    )


def test_relation_heads_cut_widths_that_differ():
    student = [torch.randn(1, 3, 8, dtype=torch.float64) for _ in range(3)]
    teacher = [torch.randn(1, 3, 12, dtype=torch.float64) for _ in range(3)]
    assert relations_loss(student, teacher, 4, mask([1, 1, 1])).shape == (1,)
    assert relation_heads(256, 768, 12) == 8
    assert relation_heads(384, 768, 12) == 12
    assert relation_heads(312, 768, 12) == 12
    assert relation_heads(7, 768, 12) == 1


def test_layers_are_mapped_evenly_and_the_last_on_the_last():
    assert layer_map(6, 12) == [2, 4, 6, 8, 10, 12]
    assert layer_map(4, 12) == [3, 6, 9, 12]
    assert layer_map(2, 3) == [2, 3]
    assert layer_map(3, 3) == [1, 2, 3]
    assert layer_map(4, 2) == [1, 1, 2, 2]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def triple(width: int, seed: int) -> list[torch.Tensor]:
    return [drawn(2, 3, width, seed=seed + n) for n in range(3)]


# by name: (the loss of the student's tensors and a mask, the student's tensors)
TOKENS = [drawn(2, 3, 4, seed=0)]
CASES = {
    "cosine": (lambda m, s: cosine_loss(s, drawn(2, 3, 4, seed=1), m), TOKENS),
    "hidden": (lambda m, s: hidden_loss(s, drawn(2, 3, 4, seed=1), m), TOKENS),
    "attention": (
        lambda m, q, k: attention_loss(scores(q, k, 2), drawn(2, 2, 3, 3, seed=1), m),
        [drawn(2, 3, 4, seed=2), drawn(2, 3, 4, seed=3)],
    ),
    "head-averaged attention": (
        lambda m, q, k: attention_loss(scores(q, k, 2), drawn(2, 4, 3, 3, seed=1), m),
        [drawn(2, 3, 4, seed=2), drawn(2, 3, 4, seed=3)],
    ),
    "minilm": (lambda m, *s: minilm_loss(s, triple(8, 10), 2, m), triple(4, 20)),
    "relations": (lambda m, *s: relations_loss(s, triple(6, 10), 2, m), triple(4, 20)),
}
MASK = mask([1, 1, 1], [1, 1, 0])


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_finite_differences(case):
    loss, given = CASES[case]
    inputs = [one.clone().requires_grad_() for one in given]
    assert torch.autograd.gradcheck(lambda *student: loss(MASK, *student), inputs)


@pytest.mark.parametrize("case", CASES)
def test_padding_counts_neither_in_the_loss_nor_in_the_gradient(case):
    loss, given = CASES[case]
    inputs = [one.clone().requires_grad_() for one in given]
    loss_R = loss(MASK, *inputs)
    loss_R.sum().backward()
    for one in inputs:
        assert one.grad[1, 2].abs().max() == 0
        assert one.grad[1, :2].abs().max() > 0
        changed = one.detach().clone()
        changed[1, 2] = 1000.0
        others = [changed if other is one else other for other in inputs]
        torch.testing.assert_close(loss(MASK, *others), loss_R, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_agrees_costs_nothing(case):
    loss = {
        "cosine": lambda s: cosine_loss(s, 3 * s, MASK),
        "hidden": lambda s: hidden_loss(s, s, MASK),
        "attention": lambda s: attention_loss(scores(s, s, 2), scores(s, s, 2), MASK),
        "head-averaged attention": lambda s: attention_loss(
            scores(s, s, 2), scores(s, s, 2).repeat(1, 2, 1, 1), MASK
        ),
        "minilm": lambda s: minilm_loss([s] * 3, [s] * 3, 2, MASK),
        "relations": lambda s: relations_loss([s] * 3, [s] * 3, 2, MASK),
    }[case]
    assert loss(drawn(2, 3, 4, seed=5)).abs().max() < 1e-12
