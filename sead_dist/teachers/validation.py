"""The validation of teachers. With teacher_validation on, a teacher is used only after it scored
better than the majority baseline on the selection split (invariant 5). The drift report compares a
teacher in fewer bits (bf16, fp16, 8-bit weights) with itself in fp32.

Shapes: N teachers, U unique examples of a split, R examples compared, B rows, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from sead_dist.config.yaml_text import to_flow
from sead_dist.data.examples import ExampleSet, subset
from sead_dist.data.order import Split
from sead_dist.data.tasks import TaskSpec, compute_metrics, constant_score
from sead_dist.errors import UserError
from sead_dist.teachers.base import Request, TeacherSource
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher, in_fp32


@dataclass(frozen=True)
class Drift:
    """A comparison with fp32 over `rows` examples.

    largest: the largest difference of a logit. changed: how many predicted classes differ (None for
    scores).
    """

    rows: int
    largest: float
    changed: int | None


# up to so many classes other orders are tried: 4! = 24
MOST_CLASSES_REORDERED = 4
# a file with predictions of fewer selection rows cannot be validated
FEWEST_ROWS = 50
# on these tasks the majority baseline is the state of the art, so a failure is only reported
LENIENT_TASKS = ("wnli",)


@dataclass(frozen=True)
class Validation:
    """The result for one teacher.

    score: None where it predicts too few rows to be validated. better_order: the labels in the
    order that would give it a better score, if there is one. off_scale: the range of its scores, if
    the mean of the gold scores would predict these better than it does. drift: its comparison with
    fp32, if it was requested and the teacher is not in fp32. rows: the number of rows that it
    predicts.
    """

    name: str
    metric: str
    score: float | None
    constant_score: float
    passed: bool
    better_order: list[str] | None
    off_scale: tuple[float, float] | None
    truncated_rows: int
    dev_texts_in_training: int
    drift: Drift | None = None
    rows: int = 0


def request_all(
    source: TeacherSource,
    split: Split,
    prefetch_rows: int,
    what: str,
    needed_NU: np.ndarray | None = None,
) -> np.ndarray:
    """The task-order logits_NBC of every teacher for every row of a split. All ranks call this.

    They are NaN where a teacher has no prediction, or none is requested. needed_NU: which teachers
    are to predict which examples (None: all of them).
    """
    wanted = np.arange(len(split.ids_U2))
    pieces = []
    for start in range(0, len(wanted), prefetch_rows):
        part_R = wanted[start : start + prefetch_rows]
        needed_NR = None if needed_NU is None else needed_NU[:, part_R]
        request = Request(split, part_R, needed_NR, what)
        found = source.submit(request).result()
        absent_NB1 = ~found.present_NB[..., None]
        pieces.append(found.logits_NBC.masked_fill(absent_NB1, float("nan")).numpy())
    return np.asarray(np.concatenate(pieces, axis=1)[:, split.entry_B])


def best_teacher(source: TeacherSource, task: TaskSpec, split: Split, prefetch_rows: int) -> int:
    """The teacher with the best score on a split; of equals the first. All ranks call this."""
    logits_NBC = request_all(source, split, prefetch_rows, "the choice of the feature teacher")
    metric = task.metrics[0]
    scores = [compute_metrics(task, one_BC, split.examples)[metric] for one_BC in logits_NBC]
    return scores.index(max(scores))


def better_order(
    task: TaskSpec, logits_BC: np.ndarray, examples: ExampleSet, score: float
) -> list[str] | None:
    """The order of labels that would score best, if it is better than the present one and than the
    majority baseline; else None. It is in the model's own columns, as they are aligned now."""
    classes = logits_BC.shape[1]
    if not task.task_kind.head_of_labels or classes > MOST_CLASSES_REORDERED:
        return None
    # an order that only reaches the majority baseline does not show that names are wrong
    best, found = max(score, constant_score(task, examples)), None
    for order in permutations(range(classes)):
        tried = compute_metrics(task, logits_BC[:, list(order)], examples)[task.metrics[0]]
        if tried > best:
            best, found = tried, list(order)
    return None if found is None else [task.labels[found.index(c)] for c in range(classes)]


def off_scale(
    task: TaskSpec, logits_BC: np.ndarray, examples: ExampleSet
) -> tuple[float, float] | None:
    """The range of a regression teacher's scores, if one constant score would be nearer to the gold
    ones; else None. Correlations do not depend on the scale, but the student's squared error
    does."""
    if task.task_kind.has_classes:
        return None
    scores_B, labels_B = logits_BC[:, 0].astype(float), examples.labels_B
    error = float(np.mean((scores_B - labels_B) ** 2))
    return (float(scores_B.min()), float(scores_B.max())) if error > labels_B.var() else None


def is_scored(teacher: Teacher, rows: int) -> bool:
    """Whether a teacher that predicts so many selection rows is validated on them."""
    return teacher.file is None or rows >= FEWEST_ROWS


def validate(
    task: TaskSpec,
    teachers: Sequence[Teacher],
    logits_NBC: np.ndarray,
    split: Split,
    dev_texts_in_training: int,
) -> list[Validation]:
    """Each teacher's score on the selection split, beside that of the majority baseline.

    Only the rows that it predicts count (logits_NBC: NaN in the others).
    """
    metric = task.metrics[0]
    results = []
    truncated: dict[tuple[str, int], int] = {}
    for teacher, logits_BC in zip(teachers, logits_NBC, strict=True):
        logits_BC, examples = answered(logits_BC, split.examples)
        if not is_scored(teacher, len(examples)):
            results.append(
                Validation(
                    teacher.name, metric, None, 0.0, True, None, None, 0, dev_texts_in_training,
                    rows=len(examples),
                )
            )  # fmt: skip
            continue
        constant = constant_score(task, examples)
        score = compute_metrics(task, logits_BC, examples)[metric]
        range_ = off_scale(task, logits_BC, examples)
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
                better_order=better_order(task, logits_BC, examples, score),
                off_scale=range_,
                truncated_rows=0 if teacher.answers is not None else truncated[key],
                dev_texts_in_training=dev_texts_in_training,
                rows=len(examples),
            )
        )
    return results


def request_and_validate(
    source: StoredSource,
    task: TaskSpec,
    split: Split,
    prefetch_rows: int,
    dev_texts_in_training: int,
) -> tuple[list[Validation], np.ndarray]:
    """(the teachers' validations, their logits_NBC of the selection split). All ranks call this."""
    logits_NBC = request_all(source, split, prefetch_rows, "the validation")
    return validate(task, source.teachers, logits_NBC, split, dev_texts_in_training), logits_NBC


def answered(logits_BC: np.ndarray, examples: ExampleSet) -> tuple[np.ndarray, ExampleSet]:
    """Logits and rows of the examples that a teacher predicts (NaN: it does not)."""
    present_B = ~np.isnan(logits_BC).any(axis=1)
    if present_B.all():
        return logits_BC, examples
    return logits_BC[present_B], subset(examples, present_B)


def describe(validation: Validation, teacher: Teacher, rows: int) -> str:
    """The line on one teacher's validation. rows: the number of rows of the selection split."""
    if validation.score is None:
        return (
            f"{validation.name} is not validated: it has predictions of {validation.rows} of "
            f"{rows} selection rows, and {FEWEST_ROWS} are needed"
        )
    line = f"validated {validation.name}: {validation.metric} {validation.score:.4f} "
    line += f"(majority baseline {validation.constant_score:.4f})"
    if validation.rows < rows:
        line += f" on the {validation.rows} of {rows} selection rows that it has predictions of"
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
    """The entry to write, with the labels in the model's own column order."""
    own = [""] * len(teacher.order_C)
    for task_class, column in enumerate(teacher.order_C):
        own[column] = (validation.better_order or [])[task_class]
    if teacher.file is not None:
        pairs = zip(teacher.labels(), own, strict=True)
        swapped = {name: label for name, label in pairs if name != label}
        return to_flow({"predictions": teacher.entry.path, "labels": swapped})
    return to_flow({"path": teacher.entry.path, "labels": own})


def require_passed(
    task: TaskSpec, validations: Sequence[Validation], teachers: Sequence[Teacher]
) -> None:
    """Raises UserError for a teacher that failed, with its name and the fix."""
    for validation, teacher in zip(validations, teachers, strict=True):
        if validation.passed or validation.score is None or task.name in LENIENT_TASKS:
            continue
        if validation.off_scale is not None and task.score_range is not None:
            (low, high), (least, most) = validation.off_scale, task.score_range
            raise UserError(
                f"teacher {validation.name} failed its validation: its scores run from {low:.3g} "
                f"to {high:.3g} on the selection split, those of {task.name} from {least:g} to "
                f"{most:g}, and one constant score would be nearer; give a teacher trained on this "
                "scale, or use it without validation: teacher_validation=off"
            )
        hint = "check its task and labels"
        if validation.better_order is not None:
            hint = (
                f"with other class names it would score better: {_suggestion(validation, teacher)}"
            )
        raise UserError(
            f"teacher {validation.name} failed its validation: {validation.metric} "
            f"{validation.score:.4f} on {validation.rows} selection rows, no better than the "
            f"majority baseline ({validation.constant_score:.4f}); {hint}; leave it out, or "
            "use it without validation: teacher_validation=off"
        )


# so many evenly spread rows of a large selection split are compared
MOST_ROWS = 2000


def compare(logits_RC: np.ndarray, fp32_RC: np.ndarray) -> Drift:
    """How far a teacher's logits are from those of the same model in fp32."""
    changed = None
    if logits_RC.shape[1] > 1:
        changed = int((logits_RC.argmax(axis=1) != fp32_RC.argmax(axis=1)).sum())
    return Drift(len(logits_RC), float(np.abs(logits_RC - fp32_RC).max(initial=0.0)), changed)


def measure_drift(source: StoredSource, split: Split) -> list[Drift | None]:
    """Each teacher compared with itself in fp32, in the same placement. None for a teacher in fp32,
    and for one that is not a classifier.

    The predictions that this needs are kept in the store, and do not count among the run's
    forwards. Every rank calls this while the source is idle.
    """
    reduced = [
        n
        for n, teacher in enumerate(source.teachers)
        if teacher.answers is None
        and (teacher.dtype != "fp32" or teacher.entry.quantization is not None)
    ]
    drifts: list[Drift | None] = [None] * len(source.teachers)
    if not reduced:
        return drifts
    count = len(split.ids_U2)
    entries_R = np.unique(np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(np.int64))
    twins = StoredSource(
        [in_fp32(source.teachers[n], source.world.device) for n in reduced],
        source.placement.pick(reduced),
        source.world, source.store, source.task, source.run / "drift",
        False,  # predictions of another class would be compared with themselves
        source.trust_remote_code, source.progress_or_stop,
    )  # fmt: skip
    try:
        request = Request(split, entries_R, None, "the drift report")
        said_NRC, fp32_NRC = (
            one.submit(request).result().logits_NBC.numpy() for one in (source, twins)
        )
    finally:
        twins.close()
    for n, fp32_RC in zip(reduced, fp32_NRC, strict=True):
        drifts[n] = compare(said_NRC[n], fp32_RC)
    return drifts


def describe_drift(drift: Drift) -> str:
    """The line on a comparison with fp32."""
    line = f"against fp32 on {drift.rows} rows: logits differ by at most {drift.largest:.4g}"
    if drift.changed is not None:
        share = drift.changed / max(drift.rows, 1)
        line += f", {drift.changed} predictions changed ({share:.2%})"
    return line
