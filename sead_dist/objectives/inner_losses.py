"""Losses over what happens inside student and teacher: pure functions, one value per text row.

Padding tokens count in none of them: not as tokens, nor as keys of attention. A row's loss is a
mean over its own tokens, so it does not depend on its neighbours (invariant 2); the papers' code
takes the mean over all tokens of a batch.

Shapes: R text rows, L tokens, H width, A heads, D width of a head (A * D = H), S student's, T
teacher's. mask_RL: True for tokens that are text.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from sead_dist.models.hidden_states import NEVER, scores


def token_mean(values_RL: torch.Tensor, mask_RL: torch.Tensor) -> torch.Tensor:
    """Each row's mean over its tokens."""
    weights_RL = mask_RL.to(values_RL.dtype)
    return (values_RL * weights_RL).sum(1) / weights_RL.sum(1)


def cosine_loss(
    student_RLH: torch.Tensor, teacher_RLH: torch.Tensor, mask_RL: torch.Tensor
) -> torch.Tensor:
    """loss_R: the mean over tokens of 1 - cos(h_S, h_T). (Sanh et al. 2019, section 2: the
    cosine embedding loss of hidden states, which the paper gives in words.)"""
    return token_mean(1 - F.cosine_similarity(student_RLH, teacher_RLH, dim=-1), mask_RL)


def hidden_loss(
    student_RLH: torch.Tensor, teacher_RLH: torch.Tensor, mask_RL: torch.Tensor
) -> torch.Tensor:
    """loss_R: MSE(H_S W, H_T), with the student's states already projected. (Jiao et al. 2020,
    eq. 8 for hidden states and eq. 9 for embeddings.)"""
    return token_mean(((student_RLH - teacher_RLH) ** 2).mean(-1), mask_RL)


def attention_loss(
    student_RALL: torch.Tensor, teacher_RALL: torch.Tensor, mask_RL: torch.Tensor
) -> torch.Tensor:
    """loss_R: 1/h * sum over heads of MSE(A_S, A_T), of scores before the softmax. (Jiao et al.
    2020, eq. 7.) Where the numbers of heads differ, heads are averaged first (our own variant)."""
    if student_RALL.shape[1] != teacher_RALL.shape[1]:
        student_RALL, teacher_RALL = student_RALL.mean(1, True), teacher_RALL.mean(1, True)
    square_RLL = ((student_RALL - teacher_RALL) ** 2).mean(1)
    pairs_RLL = (mask_RL[:, :, None] & mask_RL[:, None, :]).to(square_RLL.dtype)
    return (square_RLL * pairs_RLL).sum((1, 2)) / pairs_RLL.sum((1, 2))


def relation_loss(
    student_RALL: torch.Tensor, teacher_RALL: torch.Tensor, mask_RL: torch.Tensor
) -> torch.Tensor:
    """loss_R: 1/(A |x|) * sum over heads and tokens of KL(teacher || student) of the softmax of
    scores. (Wang et al. 2020: L_AT of section 3.1 where they are of queries and keys, L_VR of
    section 3.2 where they are of values and values.)"""
    outside_R11L = ~mask_RL[:, None, None, :]
    log_q_RALL = F.log_softmax(student_RALL.masked_fill(outside_R11L, NEVER), dim=-1)
    p_RALL = F.softmax(teacher_RALL.masked_fill(outside_R11L, NEVER), dim=-1)
    kl_RAL = F.kl_div(log_q_RALL, p_RALL, reduction="none").sum(-1)
    return token_mean(kl_RAL.mean(1), mask_RL)


def minilm_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    heads: int,
    mask_RL: torch.Tensor,
) -> torch.Tensor:
    """loss_R = L_AT + L_VR of the last layer, with as many heads in both. (Wang et al. 2020,
    sections 3.1 and 3.2.) student, teacher: their queries, keys and values, each [R, L, H]."""
    (query_S, key_S, value_S), (query_T, key_T, value_T) = student, teacher
    attention_R = relation_loss(
        scores(query_S, key_S, heads), scores(query_T, key_T, heads), mask_RL
    )
    return attention_R + relation_loss(
        scores(value_S, value_S, heads), scores(value_T, value_T, heads), mask_RL
    )


def relations_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    heads: int,
    mask_RL: torch.Tensor,
) -> torch.Tensor:
    """loss_R: the sum over queries, keys and values of the KL of their relations with themselves,
    vectors cut into `heads` relation heads in both. (MiniLMv2: Wang et al. 2021, section 3.1, with
    equal weights.)"""
    pairs = zip(student, teacher, strict=True)
    return torch.stack(
        [relation_loss(scores(s, s, heads), scores(t, t, heads), mask_RL) for s, t in pairs]
    ).sum(0)


def relation_heads(student_width: int, teacher_width: int, most: int) -> int:
    """The most relation heads, `most` or fewer, that cut both widths evenly. (Our own rule; the
    paper takes more heads than the teacher has, where its widths allow.)"""
    both = math.gcd(student_width, teacher_width)
    return next(heads for heads in range(most, 0, -1) if both % heads == 0)


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """For each student layer (from 1) the teacher's that it follows: evenly spaced, the last on the
    last. (Jiao et al. 2020: the uniform map g(m) = m * N / M, here rounded up where M does not
    divide N.)"""
    return [-(-m * teacher_layers // student_layers) for m in range(1, student_layers + 1)]
