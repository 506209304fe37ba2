"""Kinds of task: what a label is, what a head gives, and how a task is scored.

All that depends on the kind of a task stands here.

Shapes: B examples, C classes (1 where a label is a score).
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from sead_dist.config.registered import take_name
from sead_dist.data import metrics
from sead_dist.data.metrics import MetricInputs
from sead_dist.errors import UserError, expect

if TYPE_CHECKING:
    from sead_dist.data.tasks import TaskSpec


# the loss of scores is their squared difference in float32
LARGEST_SCORE = 1e18


class TaskKind(ABC):
    """One kind of task. A subclass gives every attribute that has no value here."""

    name: str  # as in a task: kind: NAME
    has_classes: bool  # the largest logit is the answer; else the one logit is a score
    head_of_labels: bool  # a text row has a logit for each label, aligned by name; else it has one
    label_type: type[np.generic]  # of labels_B
    unlabelled: float  # the value in labels_B of a row without a gold label
    hard_loss: str  # a name of `objectives.losses.HARD_LOSSES`
    soft_losses: tuple[str, ...]  # loss=auto is the first; others apply unless they need classes
    default_metrics: tuple[str, ...]  # of a task that names none
    problem_type: str | None = None  # Transformers' word for it, where it has one
    card_note: str | None = None  # what a user of the model alone needs to know, for the card
    # (reader of a task, as `TaskSpec.reader`) -> the names of the metrics that the task can have
    metric_names: Callable[[str], list[str]]
    # metrics of logits_BC, by name; ValueError where a row has no label
    compute: Callable[[Sequence[str], np.ndarray, MetricInputs], dict[str, float]]
    # the majority baseline: the best score of a constant answer under a metric, of C classes
    constant: Callable[[str, int, MetricInputs], float]

    @property
    def has_float_labels(self) -> bool:
        """Whether labels_B are floats, NaN for none; else they are whole numbers, -1 for none."""
        return bool(np.issubdtype(self.label_type, np.floating))

    def outputs(self, task: "TaskSpec") -> tuple[str, ...]:
        """The names of the logits that a model gives for one text row."""
        return task.labels if self.head_of_labels else ("score",)

    @abstractmethod
    def find_problem(self, task: "TaskSpec") -> str | None:
        """What in the task's labels or scores is wrong, as the end of an error message, or None."""

    @abstractmethod
    def label_parser(self, task: "TaskSpec") -> Callable[[Any, str], float]:
        """A function: (value in a file, its place) -> class index or score. It raises a UserError
        with the place for any other value."""

    @abstractmethod
    def is_label(self, task: "TaskSpec", value: str) -> bool:
        """Whether a file's value can be a label of the task."""

    @abstractmethod
    def answers(self, task: "TaskSpec", logits_BC: np.ndarray) -> dict[str, list[Any]]:
        """The columns that a prediction adds to the rows, by name, each of B values."""


class Classification(TaskKind):
    """One of C classes. Labels are indices of classes, -1 for none; logits are [B, C]."""

    name = "classification"
    has_classes = True
    head_of_labels = True
    label_type = np.int64
    unlabelled = -1
    hard_loss = "cross_entropy"
    soft_losses = ("kl", "mse")
    default_metrics = ("accuracy",)
    problem_type: str | None = "single_label_classification"
    metric_names = staticmethod(metrics.class_metrics)
    compute = staticmethod(metrics.of_classes)
    constant = staticmethod(metrics.constant)

    def find_problem(self, task: "TaskSpec") -> str | None:
        if task.score_range is not None:
            return f"score_range is for kind 'regression', not {task.kind!r}; leave it out"
        labels = [normalise_label(label) for label in task.labels]
        if len(labels) < 2 or len(set(labels)) < len(labels):
            return f"labels is {list(task.labels)}; give two or more different names"
        if nameless := [name for name in labels if re.fullmatch(r"label_\d+", name)]:
            return f"labels has {nameless[0]!r}, which names no class; give the name of the class"
        if "f1" in task.metrics and task.reader == "plain" and len(labels) != 2:
            return f"metrics has 'f1', which needs two labels, not {len(labels)}; use f1_macro"
        choices = len(task.choices)
        if choices != (0 if self.head_of_labels else len(labels)):
            return f"choices has {choices} templates; kind 'choice' needs one for each label"
        for alias, label in {**task.aliases, **task.value_aliases}.items():
            if label not in task.labels:
                return f"alias {alias!r} stands for {label!r}; allowed: {', '.join(task.labels)}"
        return _twice_named(task)

    def label_parser(self, task: "TaskSpec") -> Callable[[Any, str], float]:
        values = file_values(task)

        def parse(value: Any, where: str) -> float:
            # a missing value (None or NaN) is not a label, even where a task has a label named None
            missing = value is None or value != value
            index = None if missing else class_of(values, str(value))
            if index is None:
                allowed = ", ".join([*task.labels, *_numbers_of_classes(task, values)])
                raise UserError(
                    f"{where}: label {value!r} in column {task.label_column!r} is outside the "
                    f"set; allowed: {allowed}; fix the row"
                )
            return index

        return parse

    def is_label(self, task: "TaskSpec", value: str) -> bool:
        return class_of(file_values(task), value) is not None

    def answers(self, task: "TaskSpec", logits_BC: np.ndarray) -> dict[str, list[Any]]:
        import torch  # tasks are read without it

        chosen_B = logits_BC.argmax(axis=1)
        probabilities_BC = torch.from_numpy(logits_BC).double().softmax(dim=1).numpy().round(6)
        columns: dict[str, list[Any]] = {"predicted_label": [task.labels[c] for c in chosen_B]}
        for label, probabilities_B in zip(task.labels, probabilities_BC.T, strict=True):
            columns[f"probability_{label}"] = probabilities_B.tolist()
        return columns


class Choice(Classification):
    """The texts of an example are scored one by one; the label is the place of the right one."""

    name = "choice"
    head_of_labels = False
    problem_type = None  # Transformers has no word for it
    card_note = "One call scores one choice: score all choices and take the highest."


class Regression(TaskKind):
    """A score. Labels are floats, NaN for none; logits are [B, 1]."""

    name = "regression"
    has_classes = False
    head_of_labels = False
    label_type = np.float64
    unlabelled = math.nan
    hard_loss = "squared_error"
    soft_losses = ("mse",)
    default_metrics = ("pearson", "spearmanr")
    problem_type = "regression"
    metric_names = staticmethod(lambda reader: list(metrics.REGRESSION))
    compute = staticmethod(metrics.of_scores)
    # a constant correlates with nothing
    constant = staticmethod(lambda name, classes, inputs: 0.0)

    def find_problem(self, task: "TaskSpec") -> str | None:
        if task.labels:
            return (
                f"labels is {list(task.labels)}, but kind 'regression' has score_range instead; "
                "leave labels out, or give kind: classification without score_range"
            )
        low, high = task.score_range or (0.0, 0.0)
        if not -math.inf < low < high < math.inf:
            return f"score_range is {task.score_range}; give [lowest, highest]"
        if max(-low, high) > LARGEST_SCORE:
            return (
                f"score_range is [{low:g}, {high:g}], and float32 does not hold the squares of "
                f"such scores; give at most {LARGEST_SCORE:g}, and divide the scores by a number"
            )
        return None

    def label_parser(self, task: "TaskSpec") -> Callable[[Any, str], float]:
        low, high = task.score_range or (-math.inf, math.inf)

        def parse(value: Any, where: str) -> float:
            score = score_of(value)
            if not low <= score <= high:  # also false for NaN
                raise UserError(
                    f"{where}: score {value!r} in column {task.label_column!r} is not allowed; "
                    f"expected a number from {low:g} to {high:g}; fix the row"
                )
            return score

        return parse

    def is_label(self, task: "TaskSpec", value: str) -> bool:
        try:
            self.label_parser(task)(value, "")
        except UserError:
            return False
        return True

    def answers(self, task: "TaskSpec", logits_BC: np.ndarray) -> dict[str, list[Any]]:
        return {"predicted_score": np.round(logits_BC[:, 0].astype(float), 6).tolist()}


KINDS: dict[str, TaskKind] = {
    kind.name: kind for kind in (Classification(), Regression(), Choice())
}


# attributes of a kind -> their types, and what to give
ATTRIBUTES: dict[str, tuple[Any, str]] = {
    "has_classes": (bool, "True or False"),
    "head_of_labels": (bool, "True or False"),
    "label_type": (type, "a type of NumPy"),
    "unlabelled": ((int, float), "a number"),
    "hard_loss": (str, "the name of a hard loss"),
    "soft_losses": ((tuple, list), "a tuple of names of losses"),
    "default_metrics": ((tuple, list), "a tuple of names of metrics"),
    "metric_names": (Callable, "a function: reader -> names of metrics"),
    "compute": (Callable, "a function: (names, logits_BC, inputs) -> a score for each name"),
    "constant": (Callable, "a function: (name, classes, inputs) -> a score"),
}


def register_task_kind(kind: TaskKind) -> None:
    """Let tasks name this kind. Raises UserError where another has the name, or where an attribute
    is missing or of another type."""
    fix = "an instance of a class of TaskKind"
    expect("kind", kind, TaskKind, fix)
    name = getattr(kind, "name", None)
    expect("name of the kind of task", name, str, "the name that tasks give as `kind`")
    for attribute, (types, what) in ATTRIBUTES.items():
        given = getattr(kind, attribute, None)
        expect(f"{attribute} of the kind of task {name!r}", given, types, what)
    take_name("kind of task", kind.name, kind, TaskKind, fix)
    KINDS[kind.name] = kind


def normalise_label(name: str) -> str:
    """The form in which label names are compared: case-folded, spaces and hyphens as `_`."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def _label_names(task: "TaskSpec") -> dict[str, int]:
    """Labels and their aliases (normalised) -> class index."""
    names = {normalise_label(alias): task.labels.index(to) for alias, to in task.aliases.items()}
    return names | {normalise_label(label): i for i, label in enumerate(task.labels)}


def number_name(name: str) -> str | None:
    """The form in which numbers are compared (+1, 1.0 and 1 are equal); None for other names."""
    if not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", name, re.ASCII):
        return None
    plain = format(Decimal(name.strip()).normalize(), "f")
    return "0" if plain == "-0" else plain


def file_values(task: "TaskSpec") -> dict[str, int]:
    """Label values of a file (normalised) -> class index.

    Numbers are class indices, unless the labels are numbers or the task gives their meaning.
    """
    named = {normalise_label(v): task.labels.index(to) for v, to in task.value_aliases.items()}
    named |= _label_names(task)
    labels = {**task.value_aliases, **task.aliases, **{label: label for label in task.labels}}
    classes_of: dict[str, set[int]] = {}
    for name, label in labels.items():
        if (number := number_name(name)) is not None:
            classes_of.setdefault(number, set()).add(task.labels.index(label))
    if not classes_of:
        classes_of = {str(index): {index} for index in range(len(task.labels))}
    # where "1.10" and "1.1" are two labels, each is found by its name alone
    return {number: min(of) for number, of in classes_of.items() if len(of) == 1} | named


def _numbers_of_classes(task: "TaskSpec", values: Mapping[str, int]) -> list[str]:
    """The numbers in `file_values` that stand for a class and are not its label."""
    of_labels = {number_name(label) for label in task.labels}
    numbers = [name for name in values if number_name(name) == name]
    return [number for number in numbers if number not in of_labels]


def class_of(values: Mapping[str, int], value: str) -> int | None:
    """The class of a file's value in `values` (as `file_values` gives them), by its name, else by
    its number; None where it has none. (A column of whole numbers with a gap is read as 1.0, 2.0.)
    """
    index = values.get(normalise_label(value))
    if index is None and (number := number_name(value)) is not None:
        index = values.get(number)
    return index


def score_of(value: Any) -> float:
    """A file's score. NaN for a value that is not a score, such as True and 4_0, which Python reads
    as numbers."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def align_name(task: "TaskSpec", name: str) -> int | None:
    """The class index of a model's label name, or None where the name does not give one.

    `LABEL_0` names no class. A bare number names one only where the task's own labels are numbers.
    """
    return _label_names(task).get(normalise_label(name))


def _twice_named(task: "TaskSpec") -> str | None:
    """The problem where a name stands for two labels: one of them would be ignored silently."""
    first = {normalise_label(label): (label, "labels") for label in task.labels}
    for key in ("aliases", "value_aliases"):
        for alias, label in getattr(task, key).items():
            before, where = first.setdefault(normalise_label(alias), (label, key))
            if before != label:
                return (
                    f"{alias!r} stands for {label!r} in {key} and for {before!r} in {where} "
                    "(capitals, blanks, - and _ do not distinguish names); remove one"
                )
    return None
