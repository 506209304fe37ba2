"""The baselines' losses over a teacher's hidden states and attention, each put together for one
student and one feature teacher: which layers are compared, by which loss, through which
projections, in which steps.

Shapes: R text rows, B examples, L tokens, H width.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.data.order import micro_batch_seed
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import (
    LayerOutputs,
    LayerParts,
    Wanted,
    body_of,
    find_layer_parts,
    layer_stack,
    reading,
    scores,
)
from sead_dist.models.hidden_states_check import needs_attention
from sead_dist.models.loaded import head_names, pooler_names
from sead_dist.objectives.inner_losses import (
    attention_loss,
    cosine_loss,
    hidden_loss,
    layer_map,
    minilm_loss,
    relation_heads,
    relations_loss,
)
from sead_dist.objectives.losses import LossTerms

# the student's child that holds what is learned beside it; no part of the final model
PROJECTIONS = "projections"
# the loss of a start that is repaired: no value of `feature_loss`
REPAIR = "repair"
# as BERT's own new weights
PROJECTION_SCALE = 0.02


@dataclass(frozen=True)
class Rest:
    """Parameters, by name, that nothing teaches before step `until` (from 0): their learning rate
    is 0 until then, and rises over `warmup` steps to that of the others."""

    names: frozenset[str]
    until: int
    warmup: int

    def share(self, step: int) -> float:
        """Their share of the learning rate at a step (from 0)."""
        return max(0.0, min(1.0, (step - self.until + 1) / (self.warmup + 1)))


@dataclass(frozen=True)
class FeatureLoss:
    """One method's loss. mine, theirs: what is read of student and feature teacher; until: the step
    (from 0) before which the layer outputs count; variant: the form used, in words; rest: the
    student's parameters that nothing teaches until then."""

    method: str
    student: LayerParts
    feature_teacher: LayerParts
    mine: Wanted
    theirs: Wanted
    projections: nn.ModuleDict
    variant: str
    weight: float
    until: int
    rest: Rest | None = None

    def has_no_head(self, step: int) -> bool:
        """Whether after this step (from 1) nothing has taught the student's head yet."""
        return self.method == "tinybert" and step <= self.until

    def reading(self) -> AbstractContextManager[LayerOutputs]:
        """Inside, the student's forward fills what is given."""
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
        """The step's loss with this one in it, over the valid rows of the global batch. student,
        feature_teacher: None in a step that asks for logits alone.

        Every parameter gets a gradient in every step, if only of zeros: ranks exchange all of them.
        """
        idle = terms.total * 0.0
        for parameter in self.projections.parameters():
            idle = idle + parameter.sum() * 0.0
        if student is None or feature_teacher is None:
            return replace(terms, total=terms.total + idle)
        loss_B = (
            self.loss(student, feature_teacher, mask_RL.bool()).reshape(len(valid_B), -1).mean(1)
        )
        inner = torch.where(valid_B, loss_B, torch.zeros_like(loss_B)).sum() / valid_rows
        task = idle if self.method in ("tinybert", REPAIR) else terms.total + idle
        return replace(terms, total=task + self.weight * inner, inner=inner.detach())

    def loss(
        self, student: LayerOutputs, feature_teacher: LayerOutputs, mask_RL: torch.Tensor
    ) -> torch.Tensor:
        """loss_R of each text row."""
        if self.method == "distilbert":
            (mine,), (theirs,) = self.mine.hidden, self.theirs.hidden
            own_RLH = self.projected(student.hidden[mine], "hidden")
            return cosine_loss(own_RLH, feature_teacher.hidden[theirs], mask_RL)
        if self.method == REPAIR:
            return self.hidden_states_loss(student, feature_teacher, mask_RL)
        if self.method == "tinybert":
            return self.tinybert_loss(student, feature_teacher, mask_RL)
        (mine,), (theirs,) = self.mine.attention, self.theirs.attention
        maps_S = (student.queries[mine], student.keys[mine], student.values[mine])
        maps_T = (
            feature_teacher.queries[theirs],
            feature_teacher.keys[theirs],
            feature_teacher.values[theirs],
        )
        if self.student.heads == self.feature_teacher.heads:
            return minilm_loss(maps_S, maps_T, self.feature_teacher.heads, mask_RL)
        heads = relation_heads(maps_S[0].shape[-1], maps_T[0].shape[-1], self.feature_teacher.heads)
        return relations_loss(maps_S, maps_T, heads, mask_RL)

    def tinybert_loss(
        self, student: LayerOutputs, feature_teacher: LayerOutputs, mask_RL: torch.Tensor
    ) -> torch.Tensor:
        """loss_R: embeddings, and hidden states and attention of every layer. (Jiao et al. 2020,
        eq. 11 and 6 without the prediction layer, every lambda 1.)"""
        own_RLH = self.projected(student.hidden[0], "embeddings")
        loss_R = hidden_loss(own_RLH, feature_teacher.hidden[0], mask_RL)
        for mine, theirs in zip(self.mine.attention, self.theirs.attention, strict=True):
            own_RLH = self.projected(student.hidden[mine], "hidden")
            loss_R = loss_R + hidden_loss(own_RLH, feature_teacher.hidden[theirs], mask_RL)
            own_RALL = scores(student.queries[mine], student.keys[mine], self.student.heads)
            their_RALL = scores(
                feature_teacher.queries[theirs],
                feature_teacher.keys[theirs],
                self.feature_teacher.heads,
            )
            loss_R = loss_R + attention_loss(own_RALL, their_RALL, mask_RL)
        return loss_R

    def hidden_states_loss(
        self, student: LayerOutputs, feature_teacher: LayerOutputs, mask_RL: torch.Tensor
    ) -> torch.Tensor:
        """loss_R: the mean over layers of the squared error of hidden states. (Jiao et al. 2020,
        eq. 8.)"""
        losses = [
            hidden_loss(
                self.projected(student.hidden[mine], "hidden"),
                feature_teacher.hidden[theirs],
                mask_RL,
            )
            for mine, theirs in zip(self.mine.hidden, self.theirs.hidden, strict=True)
        ]
        return torch.stack(losses).mean(0)

    def projected(self, states_RLH: torch.Tensor, name: str) -> torch.Tensor:
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
                "student_init=feature_teacher is for a method with a feature_loss; "
                "give method=distilbert, or student_init=own"
            )
    elif not config.taught:
        missing = "ensemble=none asks none" if config.teachers else "there are none"
        raise UserError(f"{asks} needs a teacher to follow, and {missing}; give teachers=[DIR]")
    elif zero_stage == 3:
        raise UserError(
            f"{asks} needs each rank to hold the student whole, and DeepSpeed's stage 3 splits it; "
            "give deepspeed=zero2 or zero1"
        )


def make_feature_loss(
    config: RunConfig, model: PreTrainedModel, feature_teacher: LayerParts, total_steps: int
) -> FeatureLoss:
    """The loss that `feature_loss` names, for this student; its projections become the student's.

    Raises UserError for a student that cannot be read.
    """
    method = config.feature_loss
    assert method is not None
    student = find_layer_parts(model, "the student", needs_attention(method))
    last, their_last = len(student.layers), len(feature_teacher.layers)
    chosen = layer_map(last, their_last)
    mine, theirs = {
        "distilbert": (Wanted((last,)), Wanted((their_last,))),
        "tinybert": (
            Wanted((0, *range(1, last + 1)), tuple(range(1, last + 1))),
            Wanted((0, *sorted(set(chosen))), tuple(chosen)),
        ),
        "minilm": (Wanted((), (last,)), Wanted((), (their_last,))),
    }[method]
    names: tuple[str, ...] = ("embeddings", "hidden") if method == "tinybert" else ()
    if method == "distilbert" and student.width != feature_teacher.width:
        names = ("hidden",)
    untaught = frozenset(head_names(model) | pooler_names(model))
    projections = new_projections(names, student.width, feature_teacher.width, config.seed)
    model.add_module(PROJECTIONS, projections)
    until = total_steps
    if method == "tinybert":
        # at least one step is left for the task
        until = min(round(config.feature_stage_ratio * total_steps), total_steps - 1)
    rest = None
    if 0 < until < total_steps:
        rest = Rest(untaught, until, config.warmup(total_steps - until))
    return FeatureLoss(
        method, student, feature_teacher, mine, theirs, projections,
        variant_of(method, student, feature_teacher), config.feature_loss_weight, until, rest,
    )  # fmt: skip


def make_repair_loss(
    model: PreTrainedModel, feature_teacher: LayerParts, total_steps: int, seed: int
) -> FeatureLoss:
    """The loss of a start that is repaired: each layer's hidden states against those of the layer
    that it stands for. Head and pooler stay as they are. A projection becomes the model's where the
    widths differ."""
    student = find_layer_parts(model, "the student", attention=False)
    names = () if student.width == feature_teacher.width else ("hidden",)
    untaught = frozenset(head_names(model) | pooler_names(model))
    projections = new_projections(names, student.width, feature_teacher.width, seed)
    model.add_module(PROJECTIONS, projections)
    layers = len(student.layers)
    chosen = layer_map(layers, len(feature_teacher.layers))
    return FeatureLoss(
        REPAIR, student, feature_teacher, Wanted(tuple(range(1, layers + 1))),
        Wanted(tuple(chosen)), projections, "hidden states", 1.0, total_steps,
        Rest(untaught, total_steps, 0),
    )  # fmt: skip


def variant_of(method: str, student: LayerParts, feature_teacher: LayerParts) -> str:
    """Which form of the loss these shapes get, in words."""
    same_heads = student.heads == feature_teacher.heads
    if method == "distilbert":
        return "cosine" if student.width == feature_teacher.width else "projected cosine"
    if method == "tinybert":
        return "attention by head" if same_heads else "head-averaged attention"
    if same_heads:
        return "attention distributions and value relations"
    heads = relation_heads(student.width, feature_teacher.width, feature_teacher.heads)
    return f"MiniLMv2 relations, {heads} heads"


def new_projections(names: tuple[str, ...], width: int, to: int, seed: int) -> nn.ModuleDict:
    """A linear map without bias for each name, drawn from the run's seed."""
    generator = torch.Generator().manual_seed(micro_batch_seed(seed, -1, -1))
    projections = nn.ModuleDict()
    for name in names:
        projections[name] = linear = nn.Linear(width, to, bias=False)
        nn.init.normal_(linear.weight, std=PROJECTION_SCALE, generator=generator)
    return projections


def without_projections(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's own weights."""
    return {k: v for k, v in weights.items() if not k.startswith(f"{PROJECTIONS}.")}


def start_as_feature_teacher(student: PreTrainedModel, feature_teacher: PreTrainedModel) -> bool:
    """Give the student all of the feature teacher's body but the layers between evenly spaced ones,
    where all of it fits. (After Sanh et al. 2019, section 3: one layer of two.) Returns whether it
    did.

    Raises UserError where the student then computes something else from these weights.
    """
    if layer_stack(student) is None or layer_stack(feature_teacher) is None:
        return False  # fewer layers than run
    own = find_layer_parts(student, "the student", attention=False)
    whole = find_layer_parts(feature_teacher, "the feature teacher", attention=False)
    numbers = layer_map(len(own.layers), len(whole.layers))
    chosen = replace(whole, layers=[whole.layers[number - 1] for number in numbers])
    mine, theirs = outside(student, own), outside(feature_teacher, whole)
    pairs = list(zip(own.layers, chosen.layers, strict=True))
    fits = (
        student.config.model_type == feature_teacher.config.model_type
        and shapes_of(mine) == shapes_of(theirs)
        and all(shapes_of(a.state_dict()) == shapes_of(b.state_dict()) for a, b in pairs)
    )
    if not fits:
        return False
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
    for one, other in pairs:
        one.load_state_dict(other.state_dict())
    check_same_states(
        states_of(student, own), states_of_layers(feature_teacher, chosen), feature_teacher.dtype
    )
    return True


def outside(model: PreTrainedModel, layer_parts: LayerParts) -> dict[str, torch.Tensor]:
    """The body's tensors that are in none of its layers, by their names in it."""
    inside = {
        id(tensor)
        for layer in layer_parts.layers
        for tensor in layer.state_dict(keep_vars=True).values()
    }
    body = body_of(model)
    state = (model if body is None else body[1]).state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if id(tensor) not in inside}


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def check_same_states(
    mine: list[torch.Tensor], theirs: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Raises UserError where the student's hidden states are not those of the feature teacher with
    the same layers alone: then their configurations ask for different arithmetic."""
    for number, (own_RLH, their_RLH) in enumerate(zip(mine, theirs, strict=True)):
        off = float((own_RLH - their_RLH).abs().max() / their_RLH.abs().max().clamp(min=1.0))
        if not off <= (1e-3 if dtype == torch.float32 else 0.1):
            raise UserError(
                "student_init=feature_teacher: with that teacher's weights the student's hidden "
                f"states {number} differ from the teacher's by {off:.2g}; give a student whose "
                "config differs from the teacher's in its number of layers alone, or "
                "student_init=own"
            )


def states_of_layers(model: PreTrainedModel, layer_parts: LayerParts) -> list[torch.Tensor]:
    """The same of a model with these layers of it alone."""
    stack = layer_stack(model)
    assert stack is not None
    whole = list(stack)
    del stack[:]
    stack.extend(layer_parts.layers)
    try:
        return states_of(model, layer_parts)
    finally:
        del stack[:]
        stack.extend(whole)


def states_of(model: PreTrainedModel, layer_parts: LayerParts) -> list[torch.Tensor]:
    """The hidden states of a few words, from what enters the first layer on; each [1, L, H]."""
    wanted = Wanted(tuple(range(len(layer_parts.layers) + 1)))
    ids_RL = torch.arange(8, device=model.device)[None] + min(8, model.config.vocab_size - 8)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), reading(layer_parts, wanted) as found:
        model(input_ids=ids_RL, attention_mask=torch.ones_like(ids_RL))
    model.train(was_training)
    return [found.hidden[number].cpu() for number in wanted.hidden]
