"""The feature teacher: the one teacher whose layer outputs the student is trained on.

Layer outputs are too large to keep. So every rank holds the feature teacher and runs it on the
student's own micro-batches, in every epoch. Its logits come from the store, as any teacher's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.data.order import Batch
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import LayerOutputs, LayerParts, WantedLayers, reading
from sead_dist.models.hidden_states_check import check_kind, check_layer_outputs
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.inputs_check import Padding
from sead_dist.models.sequence_classifier import outline
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.whole import load_whole


@dataclass(frozen=True)
class FeatureTeacher:
    """A loaded feature teacher, for the student's batches.

    until: the step (from 0) from which the method no longer needs its hidden states and attention.
    """

    name: str
    model: PreTrainedModel
    layer_parts: LayerParts
    wanted: WantedLayers
    until: int

    # not inference_mode: tensors made in it must not be part of a graph
    @torch.no_grad()
    def layer_outputs(self, batch: Batch) -> LayerOutputs:
        """The wanted layer outputs of a micro-batch's text rows, fillers included."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.inputs.items()}
        with reading(self.layer_parts, self.wanted) as found:
            self.model(**inputs)
        return found


def candidates(config: RunConfig, teachers: Sequence[Teacher]) -> list[Teacher]:
    """The teachers that may become the feature teacher: the one that `teacher` names, else all."""
    if config.feature_loss is None:
        return []
    return [t for t in teachers if config.teacher is None or t.name == config.teacher]


def check_feature_teacher(
    config: RunConfig,
    teachers: Sequence[Teacher],
    inputs: ModelInputs,
    ranks: int,
) -> None:
    """Raises UserError for a candidate that cannot give its layer outputs on the student's batches.

    inputs: the student's. ranks: how many the run has.
    """
    key = f"feature_loss={config.feature_loss}"
    other = "" if config.teacher is not None else ", or choose another teacher: teacher=NAME"
    for teacher in candidates(config, teachers):
        if teacher.answers is not None:
            what = "a file" if teacher.file is not None else f"of kind {teacher.entry.kind}"
            raise UserError(
                f"teacher {teacher.name} is {what}, and {key} needs the "
                f"hidden states of a model; leave it out{other}"
            )
        placement = teacher.entry.placement or config.placement
        if placement in ("partitioned", "sharded") and ranks > 1:
            raise UserError(
                f"teacher {teacher.name} is {placement}, and {key} needs it on every rank; give "
                f"its entry placement: colocated{other}"
            )
        if teacher.entry.quantization is not None:
            raise UserError(
                f"teacher {teacher.name} has quantization={teacher.entry.quantization}, and {key} "
                f"needs its exact hidden states; give dtype: bf16 in place of quantization{other}"
            )
        if teacher.inputs.tokenizer_hash != inputs.tokenizer_hash:
            raise UserError(
                f"teacher {teacher.name} has another tokeniser than the student, and {key} "
                f"compares them token by token; give a student with the teacher's tokeniser{other}"
            )
        longest = teacher.cut.longest
        if longest < inputs.max_length:
            raise UserError(
                f"teacher {teacher.name} reads at most {longest} tokens, and {key} runs it on "
                f"the student's rows of up to {inputs.max_length}; give "
                f"max_length={longest}{other}"
            )
        check_padding(teacher, inputs.padding, key, other)
        assert config.feature_loss is not None
        parts = outline(teacher.config, config.trust_remote_code)
        name = f"teacher {teacher.name}"
        check_kind(parts, inputs, config.feature_loss, name)


def check_padding(teacher: Teacher, side: Padding, key: str, other: str) -> None:
    """Raises UserError for a teacher that needs another padding than the student's rows have."""
    found = teacher.cut.padding
    if found == side:
        return
    kind = teacher.config.model_type
    needs = (
        "whose logits change with the padding of a batch"
        if found == "none"
        else f"whose rows must be padded on the {found}"
    )
    raise UserError(
        f"teacher {teacher.name} is a {kind}, {needs}, and {key} runs it on the student's rows, "
        f"padded on the {side}; leave it out{other}"
    )


def colocate_candidates(config: RunConfig, teachers: Sequence[Teacher]) -> list[Teacher]:
    """The teachers; where placement is auto, candidates for the feature teacher are made colocated,
    unless their entries name a placement."""
    may = {teacher.name for teacher in candidates(config, teachers)}
    return [
        replace(teacher, entry=teacher.entry.model_copy(update={"placement": "colocated"}))
        if teacher.name in may and config.placement == "auto" and teacher.entry.placement is None
        else teacher
        for teacher in teachers
    ]


def load_feature_teacher(
    config: RunConfig, teacher: Teacher, device: torch.device
) -> PreTrainedModel:
    """The feature teacher's model, in eval mode and its own dtype. Its inputs follow the same rules
    as any teacher's.

    Raises UserError where its hidden states and attention are not found as expected.
    """
    # its rows are the student's, which are padded and not packed
    padded = replace(teacher, cut=replace(teacher.cut, pack_from=None))
    model = load_whole(padded, device, config.trust_remote_code, {})
    if config.feature_loss is not None:
        check_layer_outputs(model, teacher.inputs, config.feature_loss, f"teacher {teacher.name}")
    return model
