"""The run's teachers: where each lies, what it is, and how its classes map to the task's.

All this is known before a teacher's weights are loaded as a model. So a user's mistake is found
before any long work.

Shapes: N teachers, U unique examples of a split.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sead_dist.config.teacher_entry import PROMPT_KEYS, TeacherConfig
from sead_dist.data.examples import entries
from sead_dist.data.order import Split
from sead_dist.errors import UserError, reading
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.inputs_check import Padding
from sead_dist.models.loaded import bare_names
from sead_dist.models.pretrained import COPY, NO_EFFECT, Checkpoint, position_limit, weight_files
from sead_dist.models.sequence_classifier import DTYPES, label_names, reject_no_head
from sead_dist.runtime.files import files_hash
from sead_dist.store.store import TeacherKey
from sead_dist.teachers.inference import SHAPES, Cut, free_rows_from, probe_config
from sead_dist.teachers.kinds import Answers, FileAnswers
from sead_dist.teachers.packing import NAME as PACKS
from sead_dist.teachers.packing import packs_from

# This file lies beside a teacher's weights if its fine-tuning left a fold of rows out. It holds the
# ids of the rows that the teacher was trained on. Soft targets on those rows are near their gold
# labels. So the soft targets of such a row come only from teachers that were not trained on it, if
# there are any.
TRAINED_ROWS = "trained_rows.safetensors"


@dataclass(frozen=True)
class Teacher:
    """A teacher of the run.

    order_C: its own logits column of each task class. parameters: its weights without word
    embeddings, which determine the cost of a forward. bytes: memory of all weights. cut: how its
    rows become batches. answers: for a kind that is not a classifier; config is empty then, and
    inputs hold the student's tokeniser.
    """

    entry: TeacherConfig
    name: str
    checkpoint: Checkpoint
    config: PretrainedConfig
    inputs: ModelInputs
    order_C: list[int]
    dtype: str
    weights_sha256: str
    parameters: int
    bytes: int
    key: TeacherKey
    cut: Cut
    answers: Answers | FileAnswers | None = None

    @property
    def file(self) -> FileAnswers | None:
        """The predictions of a file; None for other teachers."""
        return self.answers if isinstance(self.answers, FileAnswers) else None

    @property
    def trained_rows(self) -> Path | None:
        """The file with the rows that it was trained on; None where there is none, and for other
        teachers than classifiers."""
        path = self.checkpoint.folder / TRAINED_ROWS
        return path if self.answers is None and path.is_file() else None

    def manifest(self) -> dict[str, Any]:
        """The facts of this teacher that a run's record keeps. `training.identity.teacher_identity`
        picks those that a resume compares."""
        return {
            "name": self.name,
            "path": self.entry.path,
            "revision": self.checkpoint.revision,
            "weights_sha256": self.weights_sha256,
            "fingerprint": self.key.fingerprint,
            "numerics": self.key.numerics,
            "labels": self.entry.class_names or self.labels(),
            "order": self.order_C,
            "weight": self.entry.weight,
            "parameters": self.parameters,
            "max_length": self.inputs.max_length,
            "dtype": self.dtype,
            "weights": self.entry.quantization,
            "trained_rows": "" if self.trained_rows is None else files_hash([self.trained_rows]),
            **({} if self.answers is None else {"kind": self.entry.kind}),
            **({} if self.file is None else {"kind": "predictions"}),
            **({"calibrate": "on"} if self.entry.calibrates else {}),
            **{key: getattr(self.entry, key) for key in PROMPT_KEYS if self.entry.prompt},
        }

    def labels(self) -> list[str]:
        """The names of its outputs, in its own order."""
        return label_names(self.config) if self.answers is None else list(self.answers.labels)


def size_of(checkpoint: Checkpoint, head: Sequence[str]) -> tuple[int, int]:
    """(parameters without word embeddings, parameters of word embeddings), from the files' headers.

    A file that is not safetensors has no such header. There the first is a quarter of its bytes,
    the second 0, and `head` is not checked. Raises UserError where a weight of `head` is missing.
    """
    counted = words = 0
    missing = set(head)
    for path in weight_files(checkpoint):
        if path.suffix != ".safetensors":  # an old file must be loaded to find what it holds
            return path.stat().st_size // 4, 0
        said = f"{checkpoint.name}: {path.name}: its weights"
        with reading(path, COPY, said), safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            count = math.prod(shape)
            missing.difference_update([name, *bare_names(name)])
            if "word_embeddings" in name:
                words += count
            else:
                counted += count
    reject_no_head(checkpoint, missing)
    return counted, words


def weight_bytes(parameters: int, words: int, dtype: str, weights: str | None) -> int:
    """Memory of a teacher's weights. In int8 all weights but word embeddings count as one byte,
    since nearly all of them are in linear layers."""
    each = DTYPES[dtype].itemsize
    return parameters * (1 if weights == "int8" else each) + words * each


def device_model(device: torch.device) -> str:
    """The hardware that determines which kernels run: the GPU's name, or the processor and its
    vector units."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def numerics_class(
    device: torch.device,
    dtype: str,
    weights: str | None,
    attention: str,
    cut: Cut,
    shapes: str | None = None,
) -> str:
    """Canonical JSON of all but the teacher that determines a prediction's bits (invariant 3).

    shapes: the layout of batches, where it differs from that of classifiers. Placement is left out:
    a sharded teacher's weights are gathered before use, so its bits are the same.
    """
    facts: dict[str, Any] = {
        "device": device_model(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype,
        "attention": attention,
        "shapes": shapes or (SHAPES[device.type].name if cut.pack_from is None else PACKS),
    }
    if weights is not None:
        facts["weights"] = f"int8 torchao {importlib.metadata.version('torchao')}"
    if cut.free_rows is None and device.type == "cpu":
        # the self-check found that bits depend on the split of work, which threads determine too
        facts["threads"] = torch.get_num_threads()
    return json.dumps(facts, sort_keys=True)


def tokenizers_of(teachers: Sequence[Teacher]) -> dict[str, PreTrainedTokenizerBase]:
    """Each tokeniser once, by the name of the first teacher that has it."""
    models = [teacher for teacher in teachers if teacher.answers is None]
    first = {teacher.inputs.tokenizer_hash: teacher for teacher in reversed(models)}
    return {f"teacher {teacher.name}": teacher.inputs.tokenizer for teacher in first.values()}


def cut_of(
    config: PretrainedConfig,
    dtype: str,
    device: torch.device,
    weights: str | None,
    padding: Padding = "right",
) -> Cut:
    """How rows of a model of this shape are cut into batches. The self-checks determine it."""
    packs = packs_from(probe_config(config), dtype, device) if weights is None else None
    # the check of row counts compares batches padded on the right
    free_rows = free_rows_from(config, dtype, device, weights) if padding == "right" else None
    return Cut(position_limit(config) or 1 << 30, free_rows, packs, padding)


def cut_facts(config: PretrainedConfig, dtype: str, weights: str | None, padding: Padding) -> str:
    """A text of all that `cut_of` depends on within one process. The depth, the vocabulary and the
    names of the classes are not in it."""
    probe = probe_config(config)
    facts = {name: value for name, value in probe.to_dict().items() if name not in NO_EFFECT}
    shape = [probe.num_labels, probe._attn_implementation, position_limit(config)]
    return json.dumps([facts, shape, dtype, weights, padding], sort_keys=True, default=str)


def in_fp32(teacher: Teacher, device: torch.device) -> Teacher:
    """The same teacher in fp32, without quantisation."""
    cut = cut_of(teacher.config, "fp32", device, None, teacher.cut.padding)
    attention = json.loads(teacher.key.numerics)["attention"]
    numerics = numerics_class(device, "fp32", None, attention, cut)
    return replace(
        teacher,
        entry=teacher.entry.model_copy(update={"dtype": "fp32", "quantization": None}),
        dtype="fp32",
        key=replace(teacher.key, numerics=numerics),
        cut=cut,
    )


def write_trained_rows(model: Path, train: Split) -> None:
    """Write the ids of the rows that a model was trained on into its folder."""
    save_file({"ids_U2": train.ids_U2}, model / TRAINED_ROWS)


def trained_on(teacher: Teacher, ids_U2: np.ndarray) -> np.ndarray | None:
    """bool [U]: which examples a teacher was trained on; None where its folder does not record
    that.

    For a file of predictions: which examples it does not hold. Raises UserError for a damaged
    file of trained rows.
    """
    if teacher.file is not None:  # it cannot predict the rows that it lacks
        return np.asarray(teacher.file.places(ids_U2) < 0)
    path = teacher.trained_rows
    if path is None:
        return None
    with reading(path, COPY, f"teacher {teacher.name}: {path.name}"):
        known_K2 = load_file(path)["ids_U2"]
        if known_K2.dtype != np.int64 or known_K2.ndim != 2 or known_K2.shape[1] != 2:
            raise UserError(f"teacher {teacher.name}: {path.name} holds no ids of rows; {COPY}")
    _, entry_B = entries(np.concatenate([ids_U2, known_K2]))
    count = len(ids_U2)
    return np.asarray(np.isin(entry_B[:count], entry_B[count:]))


def seen_by(teachers: Sequence[Teacher], ids_U2: np.ndarray) -> np.ndarray | None:
    """The seen_NU: which teacher was trained on which of these examples, as in `trained_on`.

    None where no teacher's folder has a file of trained rows. A teacher without one counts as not
    trained on any.
    """
    if all(teacher.trained_rows is None for teacher in teachers):
        return None
    seen = [trained_on(teacher, ids_U2) for teacher in teachers]
    none_U = np.zeros(len(ids_U2), bool)
    return np.stack([none_U if one is None else one for one in seen])


def out_of_fold(teachers: Sequence[Teacher], split: Split) -> np.ndarray:
    """The fit_NU: which teachers' predictions of which examples do not come from a model that was
    trained on the example's gold label.

    A classifier counts only where its folder holds its trained rows. A file of predictions counts
    for the rows that it holds, and a language model with a prompt for all.
    """
    seen = [trained_on(teacher, split.ids_U2) for teacher in teachers]
    return np.stack([
        np.full(len(split.ids_U2), teacher.entry.prompt is not None) if one is None else ~one
        for teacher, one in zip(teachers, seen, strict=True)
    ])  # fmt: skip


def describe_folds(
    teachers: Sequence[Teacher], seen_NU: np.ndarray, train: Split, labelled: int
) -> str:
    """A line on teachers that were not trained on all rows. labelled: the number of rows with a
    label, which come first."""
    seen_NB = seen_NU[:, train.entry_B[:labelled]]
    counts = zip(teachers, seen_NB.sum(1).tolist(), strict=True)
    own = ", ".join(f"{one.name} {count}" for one, count in counts if one.trained_rows and count)
    unseen = int((~seen_NB).any(0).sum())
    return (
        f"labelled rows that teachers were trained on: {own} of {labelled}; {unseen} rows have "
        "teachers that were not trained on them, and only these are used for them"
    )
