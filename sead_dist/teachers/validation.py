"""The validation: no teacher teaches before it has shown, on the selection split, that it knows
more than the best constant answer (invariant 5).

Shapes: N teachers, U unique examples, B rows, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from sead_dist.data.order import Split
from sead_dist.data.task_files import TaskSpec, compute_metrics, constant_score
from sead_dist.errors import UserError
from sead_dist.teachers.base import Request, TeacherSource
from sead_dist.teachers.drift import Drift, describe_drift
from sead_dist.teachers.teacher import Teacher

# orders of classes tried: 4! = 24
MOST_CLASSES_REORDERED = 4
# here the best constant answer is the state of the art, so a failure is only told
LENIENT_TASKS = ("wnli",)


@dataclass(frozen=True)
class Validation:
    """better_order: the labels in the order under which the teacher would score better, if any.
    off_scale: the range of its scores, where they miss the gold ones by more than their mean does.
    drift: against itself in fp32, where that was asked for and it is not in fp32.
    """

    name: str
    metric: str
    score: float
    constant_score: float
    passed: bool
    better_order: list[str] | None
    off_scale: tuple[float, float] | None
    truncated_rows: int
    dev_texts_in_training: int
    drift: Drift | None = None


def ask_all(
    source: TeacherSource, split: Split, teachers: int, look_ahead: int, what: str
) -> np.ndarray:
    """Every teacher's task-order logits_NBC for every row of a split. All ranks call this."""
    wanted = np.arange(len(split.ids_U2))
    pieces = []
    for start in range(0, len(wanted), look_ahead):
        request = Request(split, wanted[start : start + look_ahead], None, what)
        pieces.append(source.submit(request).result().logits_NBC.numpy())
    return np.asarray(np.concatenate(pieces, axis=1)[:, split.entry_B])


def best_teacher(
    source: TeacherSource, task: TaskSpec, split: Split, teachers: int, look_ahead: int
) -> int:
    """The teacher that scores best on a split, the first of equals. All ranks call this."""
    logits_NBC = ask_all(source, split, teachers, look_ahead, "the choice of the feature teacher")
    metric = task.metrics[0]
    scores = [compute_metrics(task, one_BC, split.examples)[metric] for one_BC in logits_NBC]
    return scores.index(max(scores))


def better_order(
    task: TaskSpec, logits_BC: np.ndarray, split: Split, score: float
) -> list[str] | None:
    """The order of labels, in the model's own columns as aligned now, that would score best, when
    that is better than the present one."""
    classes = logits_BC.shape[1]
    if not task.task_kind.head_of_labels or classes > MOST_CLASSES_REORDERED:
        return None
    best, found = score, None
    for order in permutations(range(classes)):
        tried = compute_metrics(task, logits_BC[:, list(order)], split.examples)[task.metrics[0]]
        if tried > best:
            best, found = tried, list(order)
    return None if found is None else [task.labels[found.index(c)] for c in range(classes)]


def off_scale(task: TaskSpec, logits_BC: np.ndarray, split: Split) -> tuple[float, float] | None:
    """The range of a regression teacher's scores, where one constant score would be nearer to the
    gold ones: correlations do not see another scale, the student's squared error does."""
    if task.task_kind.has_classes:
        return None
    scores_B, labels_B = logits_BC[:, 0].astype(float), split.examples.labels_B
    error = float(np.mean((scores_B - labels_B) ** 2))
    return (float(scores_B.min()), float(scores_B.max())) if error > labels_B.var() else None


def validate(
    task: TaskSpec,
    teachers: Sequence[Teacher],
    logits_NBC: np.ndarray,
    split: Split,
    dev_texts_in_training: int,
) -> list[Validation]:
    """Each teacher's score on the selection split beside the best constant answer's."""
    metric = task.metrics[0]
    constant = constant_score(task, split.examples)
    results = []
    truncated: dict[tuple[str, int], int] = {}
    for teacher, logits_BC in zip(teachers, logits_NBC, strict=True):
        score = compute_metrics(task, logits_BC, split.examples)[metric]
        range_ = off_scale(task, logits_BC, split)
        key = teacher.inputs.key
        if key not in truncated:
            truncated[key] = teacher.inputs.tokens(split.examples).truncated
        results.append(
            Validation(
                name=teacher.name,
                metric=metric,
                score=score,
                constant_score=constant,
                passed=score > constant and range_ is None,
                better_order=better_order(task, logits_BC, split, score),
                off_scale=range_,
                truncated_rows=0 if teacher.answers is not None else truncated[key],
                dev_texts_in_training=dev_texts_in_training,
            )
        )
    return results


def describe(validation: Validation, teacher: Teacher, rows: int) -> str:
    line = f"validated {validation.name}: {validation.metric} {validation.score:.4f} "
    line += f"(constant {validation.constant_score:.4f})"
    if validation.better_order is not None:
        line += f"; WARNING: it would score better with {_suggestion(validation, teacher)}"
    if validation.truncated_rows:
        cut, length = validation.truncated_rows, teacher.inputs.max_length
        line += f"; {cut} of {rows} rows truncated to {length} tokens"
    if validation.dev_texts_in_training:
        line += f"; {validation.dev_texts_in_training} dev texts occur in the training text"
    if validation.drift is not None:
        line += f"; {describe_drift(validation.drift)}"
    return line


def _suggestion(validation: Validation, teacher: Teacher) -> str:
    """The entry to write: labels in the model's own column order."""
    own = [""] * len(teacher.order_C)
    for task_class, column in enumerate(teacher.order_C):
        own[column] = (validation.better_order or [])[task_class]
    return f"{{path: {teacher.entry.path}, labels: [{', '.join(own)}]}}"


def require_passed(
    task: TaskSpec, validations: Sequence[Validation], teachers: Sequence[Teacher]
) -> None:
    """Stop the run for a teacher that failed. Raises UserError naming it and the fix."""
    for validation, teacher in zip(validations, teachers, strict=True):
        if validation.passed or task.name in LENIENT_TASKS:
            continue
        if validation.off_scale is not None and task.score_range is not None:
            (low, high), (least, most) = validation.off_scale, task.score_range
            raise UserError(
                f"teacher {validation.name} failed its validation: its scores run from {low:.3g} "
                f"to {high:.3g} on the selection split, those of {task.name} from {least:g} to "
                f"{most:g}, and one constant score would be nearer; give a teacher trained on this "
                "scale, or teach all the same with teacher_validation=off"
            )
        hint = "check its task and labels"
        if validation.better_order is not None:
            hint = (
                f"with other class names it would score better: {_suggestion(validation, teacher)}"
            )
        raise UserError(
            f"teacher {validation.name} failed its validation: {validation.metric} "
            f"{validation.score:.4f} on the selection split, no better than a constant answer "
            f"({validation.constant_score:.4f}); {hint}; leave it out, or teach all the "
            "same with teacher_validation=off"
        )
