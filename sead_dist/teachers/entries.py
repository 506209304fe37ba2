"""The teachers of a run, read from their entries: classifiers, language models, files of
predictions, and kinds that plugins register.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sead_dist.config.registered import LANGUAGE_MODEL
from sead_dist.config.schema import RunConfig, TeacherConfig, teacher_names
from sead_dist.data.splits import RunExamples, own_files
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError
from sead_dist.models.inputs import ModelInputs, settle, teacher_inputs
from sead_dist.models.pretrained import (
    NO_EFFECT,
    Checkpoint,
    check_vocabulary,
    code_hash,
    load_model_config,
    load_tokenizer,
    locate,
    setting_hash,
    tokenizer_hash,
    weights_hash,
)
from sead_dist.models.sequence_classifier import (
    align_classes,
    check_problem_type,
    head_weights,
    label_names,
    outline,
)
from sead_dist.runtime.distributed import World, gather_objects, on_every_rank
from sead_dist.store.store import TeacherKey
from sead_dist.teachers.inference import Cut, check_quantize
from sead_dist.teachers.kinds import Answers, FileAnswers, fingerprint_of, open_answers, open_file
from sead_dist.teachers.language_model import SCHEME, LanguageModel
from sead_dist.teachers.prompts import Opening
from sead_dist.teachers.teacher import (
    Teacher,
    cut_facts,
    cut_of,
    numerics_class,
    size_of,
    weight_bytes,
)


def _hash_all(checkpoints: Sequence[Checkpoint | None], world: World) -> list[str]:
    """The weight hash of every checkpoint ('' for None). Each rank reads a share of the files."""

    def mine() -> dict[int, str]:
        share = range(world.rank, len(checkpoints), world.size)
        found = {index: checkpoints[index] for index in share}
        return {index: "" if of is None else weights_hash(of) for index, of in found.items()}

    shares = gather_objects(world, on_every_rank(world, mine))
    return [shares[index % world.size][index] for index in range(len(checkpoints))]


def read_teachers(
    config: RunConfig,
    task: TaskSpec,
    world: World,
    student: PreTrainedTokenizerBase | None = None,
    examples: RunExamples | None = None,
) -> list[Teacher]:
    """The teachers of a run, in the order given. Every rank gets the same list.

    student: the student's tokeniser; teachers with an equal tokeniser share this object. examples:
    the run's rows, in which a file of predictions finds its rows, and of which a prompt may show
    some.

    Raises UserError for the first teacher that cannot be used.
    """
    # the checkpoints of classifiers; None for teachers of other kinds
    checkpoints = on_every_rank(
        world,
        lambda: [
            locate(e.path, e.revision, as_teacher=True) if e.is_model else None
            for e in config.teachers
        ],
    )
    hashes = _hash_all(checkpoints, world)
    teachers = on_every_rank(
        world,
        lambda: _build_teachers(config, task, world.device, checkpoints, hashes, student, examples),
    )
    _check_same_numerics(config, world, [teacher.key.numerics for teacher in teachers])
    return teachers


# keys of an entry that only a classifier has, and those of them that a language model has too
OF_MODEL = ("offload", "quantization", "revision", "dtype", "max_length")
OF_LANGUAGE_MODEL = OF_MODEL[2:]


def other_teacher(
    opening: Opening, student: PreTrainedTokenizerBase, examples: RunExamples | None
) -> Teacher:
    """A teacher that is not a classifier.

    examples: the run's rows, in which a file of predictions finds its rows. Raises UserError for a
    teacher that cannot be used, and for keys of its entry that only a classifier has. Raises
    ValueError for a file of predictions without `examples`.
    """
    config, task, entry, name = opening.config, opening.task, opening.entry, opening.name
    answers: Answers | FileAnswers
    if entry.predictions is not None:
        if examples is None:
            raise ValueError(f"teacher {name} is a file, and needs the run's rows")
        answers = open_file(entry, name, task, examples, own_files(task, config.data))
        order_C, fingerprint = list(range(task.num_labels)), answers.fingerprint
    else:
        plain = TeacherConfig(path=entry.path)
        allowed = OF_LANGUAGE_MODEL if entry.kind == LANGUAGE_MODEL else ()
        for of_model in OF_MODEL:
            if of_model not in allowed and getattr(entry, of_model) != getattr(plain, of_model):
                raise UserError(
                    f"teacher {name}: {of_model}={getattr(entry, of_model)} is for a model, and "
                    f"its kind is {entry.kind}; leave it out"
                )
        answers, order_C = open_answers(opening)
        fingerprint = fingerprint_of(entry, answers)
    checkpoint, max_length = Checkpoint(entry.path, Path(entry.path), None), config.max_length
    numerics = json.dumps({"shapes": "predictions" if entry.predictions else entry.kind})
    cut, about = Cut(1 << 30, None), ("fp32", "", 0, 0)
    if isinstance(answers, LanguageModel):
        checkpoint, max_length = answers.source.checkpoint, answers.max_length
        numerics = numerics_class(opening.device, answers.dtype, None, "auto", cut, SCHEME)
        about = answers.dtype, answers.weights_sha256, answers.parameters, answers.bytes
    key = TeacherKey(fingerprint, numerics, entry.path, task.num_labels)
    return Teacher(
        entry, name, checkpoint, PretrainedConfig(),
        ModelInputs(student, tokenizer_hash(student), max_length, "right"),
        order_C, *about, key, cut, answers,
    )  # fmt: skip


@dataclass
class Shared:
    """What teachers of a run have in common. It is made once: loading it for each of 64 teachers
    would take seconds and half a gigabyte."""

    tokenizers: dict[str, PreTrainedTokenizerBase]  # by hash
    # by setting: tokeniser, its hash, the model on the meta device
    outlines: dict[str, tuple[PreTrainedTokenizerBase, str, PreTrainedModel]] = field(
        default_factory=dict
    )
    inputs: dict[tuple[str, str, str | None, str, int], tuple[ModelInputs, Cut]] = field(
        default_factory=dict
    )
    cuts: dict[str, Cut] = field(default_factory=dict)

    def outline_of(
        self, checkpoint: Checkpoint, shape: PretrainedConfig, trust_remote_code: bool
    ) -> tuple[PreTrainedTokenizerBase, str, PreTrainedModel]:
        """(tokeniser, its hash, model on the meta device) of a checkpoint."""
        setting = setting_hash(checkpoint)
        if setting in self.outlines:
            settle(self.outlines[setting][0], shape)
            return self.outlines[setting]
        loaded = load_tokenizer(checkpoint, trust_remote_code)
        settle(loaded, shape)
        check_vocabulary(checkpoint.name, loaded, shape)
        tokens = tokenizer_hash(loaded)
        parts = outline(shape, trust_remote_code)
        self.outlines[setting] = self.tokenizers.setdefault(tokens, loaded), tokens, parts
        return self.outlines[setting]

    def inputs_of(
        self,
        entry: TeacherConfig,
        shape: PretrainedConfig,
        tokens: str,
        max_length: int,
        dtype: str,
        device: torch.device,
    ) -> tuple[ModelInputs, Cut]:
        """What a teacher is fed, checked, and how its rows are cut into batches."""
        facts = json.dumps(shape.to_diff_dict(), sort_keys=True, default=str)
        kind = (facts, dtype, entry.quantization, tokens, max_length)
        if kind not in self.inputs:
            inputs = teacher_inputs(self.tokenizers[tokens], tokens, shape, max_length)
            about = cut_facts(shape, dtype, entry.quantization, inputs.padding)
            if about not in self.cuts:
                self.cuts[about] = cut_of(shape, dtype, device, entry.quantization, inputs.padding)
            self.inputs[kind] = inputs, self.cuts[about]
        return self.inputs[kind]


def _build_teachers(
    config: RunConfig,
    task: TaskSpec,
    device: torch.device,
    checkpoints: Sequence[Checkpoint | None],
    hashes: Sequence[str],
    student: PreTrainedTokenizerBase | None,
    examples: RunExamples | None,
) -> list[Teacher]:
    shared = Shared({} if student is None else {tokenizer_hash(student): student})
    teachers: list[Teacher] = []
    for entry, name, checkpoint, weights in zip(
        config.teachers, teacher_names(config.teachers), checkpoints, hashes, strict=True
    ):
        if checkpoint is not None:
            about = entry, name, checkpoint, weights
            teachers.append(_classifier(*about, config, task, device, shared))
            continue
        if student is None:
            raise ValueError(f"a teacher of kind {entry.kind} needs the student's tokeniser")
        train = None if examples is None or entry.predictions is not None else examples.labelled
        opening = Opening(entry, name, task, config, device, train)
        teachers.append(other_teacher(opening, student, examples))
    return teachers


def _classifier(
    entry: TeacherConfig,
    name: str,
    checkpoint: Checkpoint,
    weights: str,
    config: RunConfig,
    task: TaskSpec,
    device: torch.device,
    shared: Shared,
) -> Teacher:
    """A teacher that is a classifier. weights: the hash of its weights."""
    shape = load_model_config(checkpoint, config.trust_remote_code)
    tokenizer, tokens, parts = shared.outline_of(checkpoint, shape, config.trust_remote_code)
    # before the names of the classes, as those of an encoder without a head mean nothing
    parameters, words = size_of(checkpoint, head_weights(parts))
    order_C = align_classes(task, entry.path, label_names(shape), entry.class_names)
    check_problem_type(task, entry.path, shape)
    max_length = entry.max_length or config.max_length
    dtype = entry.dtype or config.teacher_precision
    if entry.quantization is not None:
        check_quantize(name)
    inputs, cut = shared.inputs_of(entry, shape, tokens, max_length, dtype, device)
    attention = parts.config._attn_implementation
    numerics = numerics_class(device, dtype, entry.quantization, attention, cut)
    code = code_hash(checkpoint, type(shape), type(tokenizer), type(parts))
    key = TeacherKey(
        _fingerprint(weights, shape, inputs, code), numerics, entry.path, task.num_labels
    )
    held = weight_bytes(parameters, words, dtype, entry.quantization)
    return Teacher(
        entry, name, checkpoint, shape, inputs, order_C, dtype, weights, parameters, held, key, cut
    )


def _fingerprint(
    weights: str, config: PretrainedConfig, inputs: ModelInputs, code: str | None
) -> str:
    """A hash of all that a prediction depends on.

    Predictions that were kept under the first rules of input stay valid where the rules give the
    same tensors. A padding id or segment ids that differed then differ in the config or the
    tokeniser. code: the hash of the Python files that came with the checkpoint and were run.
    """
    shape = {key: value for key, value in config.to_dict().items() if key not in NO_EFFECT}
    always, otherwise = inputs.facts()
    facts: list[Any] = [weights, shape, *always, *otherwise]
    if code is not None:
        facts.append({"code": code})
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_same_numerics(config: RunConfig, world: World, mine: list[str]) -> None:
    """Raises UserError where ranks compute in different numerics classes, unless store.accept is
    any. Unequal hardware would mix the predictions of two classes."""
    everyone = gather_objects(world, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0] and config.store.accept != "any":
            raise UserError(
                f"rank {rank} computes in the numerics class {theirs[0]}, but rank 0 in "
                f"{everyone[0][0]}; run on equal machines, or accept mixed predictions with "
                "store.accept=any"
            )
