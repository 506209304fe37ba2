"""The baselines' losses over a teacher's hidden states and attention. They are pure functions, with
one value per text row. `FeatureLoss` is a method's loss for one student and one feature teacher:
which layers are compared, by which loss, through which projections, in which steps.

Padding tokens do not count: neither as tokens nor as keys of attention. A row's loss is a mean over
its own tokens, so it does not depend on its neighbours (invariant 2). The papers' code takes the
mean over all tokens of a batch.

Shapes: R text rows, B examples, L tokens, H width, A heads, D width of a head (A * D = H), S
student's, T teacher's. mask_RL: True for tokens that are text.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.data.order import micro_batch_seed
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import (
    NEVER,
    LayerOutputs,
    LayerParts,
    WantedLayers,
    find_layer_parts,
    layer_map,
    reading,
    scores,
)
from sead_dist.models.hidden_states_check import layers_read_by, needs_attention
from sead_dist.models.loaded import head_names, pooler_names
from sead_dist.objectives.losses import LossTerms

# the student's child module that holds the projections; the final model lacks it
PROJECTIONS = "projections"
# the name of the loss of a start that is repaired; it is not a value of `feature_loss`
REPAIR = "repair"
# as BERT's own new weights
PROJECTION_SCALE = 0.02


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
    """loss_R: the sum over queries, keys and values of the KL of their relations with themselves.
    The vectors are cut into `heads` relation heads in both. (MiniLMv2: Wang et al. 2021, section
    3.1, with equal weights.)"""
    pairs = zip(student, teacher, strict=True)
    return torch.stack(
        [relation_loss(scores(s, s, heads), scores(t, t, heads), mask_RL) for s, t in pairs]
    ).sum(0)


def relation_heads(student_width: int, teacher_width: int, most: int) -> int:
    """The most relation heads, `most` or fewer, that cut both widths evenly. (Our own rule; the
    paper takes more heads than the teacher has, where its widths allow.)"""
    both = math.gcd(student_width, teacher_width)
    return next(heads for heads in range(most, 0, -1) if both % heads == 0)


@dataclass(frozen=True)
class Rest:
    """Names of parameters that no loss reaches before step `until` (from 0). Their learning rate is
    0 until then. After that it rises over `warmup` steps to that of the others."""

    names: frozenset[str]
    until: int
    warmup: int

    def share(self, step: int) -> float:
        """Their share of the learning rate at a step (from 0)."""
        return max(0.0, min(1.0, (step - self.until + 1) / (self.warmup + 1)))


@dataclass(frozen=True)
class FeatureLoss:
    """One method's loss. mine, theirs: what is read of student and feature teacher. until: the
    layer outputs count before this step (from 0). variant: the form used, in words. rest: the
    student's parameters that no loss reaches until then."""

    method: str
    student: LayerParts
    feature_teacher: LayerParts
    mine: WantedLayers
    theirs: WantedLayers
    projections: nn.ModuleDict
    variant: str
    weight: float
    until: int
    rest: Rest | None = None

    def has_no_head(self, step: int) -> bool:
        """Whether no loss has reached the student's head by the end of this step (from 1)."""
        return self.method == "tinybert" and step <= self.until

    def reading(self) -> AbstractContextManager[LayerOutputs]:
        """Inside the block, the student's forward fills the outputs that it gives."""
        return reading(self.student, self.mine)

    def join(
        self,
        terms: LossTerms,
        student: LayerOutputs | None,
        feature_teacher: LayerOutputs | None,
        mask_RL: torch.Tensor,
        valid_B: torch.Tensor,
        valid_rows: int,
    ) -> LossTerms:
        """The step's loss with this one in it, over the valid rows of the global batch. TinyBERT's
        loss, and that of a repair, replaces the others. student, feature_teacher: None in a step
        that needs logits alone.

        Ranks exchange all gradients, so every projection gets one in every step, if only of zeros.
        """
        idle = terms.total * 0.0
        for parameter in self.projections.parameters():
            idle = idle + parameter.sum() * 0.0
        if student is None or feature_teacher is None:
            return replace(terms, total=terms.total + idle)
        loss_R = self.loss(student, feature_teacher, mask_RL.bool())
        loss_B = loss_R.reshape(len(valid_B), -1).mean(1)
        feature = torch.where(valid_B, loss_B, torch.zeros_like(loss_B)).sum() / valid_rows
        task = idle if self.method in ("tinybert", REPAIR) else terms.total + idle
        return replace(terms, total=task + self.weight * feature, feature=feature.detach())

    def loss(
        self, student: LayerOutputs, feature_teacher: LayerOutputs, mask_RL: torch.Tensor
    ) -> torch.Tensor:
        """loss_R of each text row, by the method. DistilBERT: cosines. MiniLM: relations. Repair:
        the mean over layers of the squared error of hidden states (Jiao et al. 2020, eq. 8).
        TinyBERT: the sum of the squared errors of embeddings, hidden states and attention (eq. 11
        and 6 without the prediction layer, every lambda 1)."""
        states = [
            (self.projected(student.hidden[mine], mine), feature_teacher.hidden[theirs])
            for mine, theirs in zip(self.mine.hidden, self.theirs.hidden, strict=True)
        ]
        maps = [
            (student.maps(mine), feature_teacher.maps(theirs))
            for mine, theirs in zip(self.mine.attention, self.theirs.attention, strict=True)
        ]
        heads = self.feature_teacher.heads
        if self.method == "distilbert":
            return cosine_loss(*states[0], mask_RL)
        if self.method == "minilm":
            maps_S, maps_T = maps[0]
            if self.student.heads == heads:
                return minilm_loss(maps_S, maps_T, heads, mask_RL)
            heads = relation_heads(maps_S[0].shape[-1], maps_T[0].shape[-1], heads)
            return relations_loss(maps_S, maps_T, heads, mask_RL)
        losses = [hidden_loss(own_RLH, their_RLH, mask_RL) for own_RLH, their_RLH in states]
        if self.method == REPAIR:
            return torch.stack(losses).mean(0)
        loss_R = losses[0]
        for layer_R, (maps_S, maps_T) in zip(losses[1:], maps, strict=True):
            own_RALL = scores(maps_S[0], maps_S[1], self.student.heads)
            their_RALL = scores(maps_T[0], maps_T[1], heads)
            loss_R = loss_R + layer_R + attention_loss(own_RALL, their_RALL, mask_RL)
        return loss_R

    def projected(self, states_RLH: torch.Tensor, layer: int) -> torch.Tensor:
        name = "hidden" if layer else "embeddings"
        if name not in self.projections:
            return states_RLH
        through: torch.Tensor = self.projections[name](states_RLH)
        return through


def check_feature_loss(config: RunConfig, zero_stage: int | None) -> None:
    """Raises UserError for a loss over layer outputs that the run's other keys rule out."""
    asks = f"feature_loss={config.feature_loss}"
    if config.feature_loss is None:
        if config.student_init == "feature_teacher":
            raise UserError(
                "student_init=feature_teacher needs a feature_loss, and there is none; "
                "give method=distilbert, or student_init=own"
            )
    elif not config.taught:
        why = "there are none; give teachers=[DIR]"
        if config.teachers:
            why = f"ensemble={config.ensemble} uses none; give another ensemble"
        raise UserError(f"{asks} needs a teacher, and {why}")
    elif zero_stage == 3:
        raise UserError(
            f"{asks} needs each rank to hold the student whole, and DeepSpeed's stage 3 splits it; "
            "give deepspeed=zero2 or zero1"
        )


def feature_steps(config: RunConfig, total_steps: int) -> int:
    """The number of a run's steps that use the feature teacher. These are its first steps."""
    if config.feature_loss != "tinybert":
        return total_steps if config.feature_loss is not None else 0
    # at least one step is left for the task
    return min(round(config.feature_stage_ratio * total_steps), total_steps - 1)


def make_feature_loss(
    config: RunConfig, model: PreTrainedModel, feature_teacher: LayerParts, total_steps: int
) -> FeatureLoss:
    """The loss that `feature_loss` names, for this student. Its projections are added to the
    student.

    Raises UserError for a student that cannot be read.
    """
    method, until = config.feature_loss, feature_steps(config, total_steps)
    assert method is not None
    warmup = config.warmup(total_steps - until) if 0 < until < total_steps else None
    weight = config.feature_loss_weight
    return _put_together(method, model, feature_teacher, config.seed, weight, until, warmup)


def make_repair_loss(
    model: PreTrainedModel, feature_teacher: LayerParts, total_steps: int, seed: int
) -> FeatureLoss:
    """The loss of a start that is repaired: each layer's hidden states against those of the layer
    that it stands for. Head and pooler stay as they are. Where the widths
    differ, a projection is added to the model."""
    return _put_together(REPAIR, model, feature_teacher, seed, 1.0, total_steps, 0)


def _put_together(
    method: str, model: PreTrainedModel, feature_teacher: LayerParts, seed: int, weight: float,
    until: int, warmup: int | None,
) -> FeatureLoss:  # fmt: skip
    """seed: the projections (linear maps without bias) are drawn from it. warmup: of head and
    pooler, which no loss reaches before `until` (None: a loss does)."""
    student = find_layer_parts(model, "the student", needs_attention(method))
    mine = layers_read_by(method, student)
    followed = [0, *layer_map(len(student.layers), len(feature_teacher.layers))]
    theirs = WantedLayers(
        tuple(followed[layer] for layer in mine.hidden),
        tuple(followed[layer] for layer in mine.attention),
    )
    untaught = frozenset(head_names(model) | pooler_names(model))
    names = {"tinybert": ["embeddings", "hidden"], "minilm": []}.get(method, ["hidden"])
    if method != "tinybert" and student.width == feature_teacher.width:
        names = []
    generator = torch.Generator().manual_seed(micro_batch_seed(seed, -1, -1))
    projections = nn.ModuleDict()
    for name in names:
        projections[name] = linear = nn.Linear(student.width, feature_teacher.width, bias=False)
        nn.init.normal_(linear.weight, std=PROJECTION_SCALE, generator=generator)
    model.add_module(PROJECTIONS, projections)
    return FeatureLoss(
        method, student, feature_teacher, mine, theirs, projections,
        variant_of(method, student, feature_teacher), weight, until,
        None if warmup is None else Rest(untaught, until, warmup),
    )  # fmt: skip


def variant_of(method: str, student: LayerParts, feature_teacher: LayerParts) -> str:
    """Which form of the loss these shapes get, in words."""
    same_heads = student.heads == feature_teacher.heads
    if method == REPAIR:
        return "hidden states"
    if method == "distilbert":
        return "cosine" if student.width == feature_teacher.width else "projected cosine"
    if method == "tinybert":
        return "attention by head" if same_heads else "head-averaged attention"
    if same_heads:
        return "attention distributions and value relations"
    heads = relation_heads(student.width, feature_teacher.width, feature_teacher.heads)
    return f"MiniLMv2 relations, {heads} heads"


def without_projections(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's own weights."""
    return {k: v for k, v in weights.items() if not k.startswith(f"{PROJECTIONS}.")}
