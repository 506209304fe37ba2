"""What a run needs of endpoints and of files of predictions.

The requests to endpoints are counted and logged before the first is sent, since they cost money.
The file also checks whether files of predictions have enough rows. It leaves out training rows
without a gold label and a prediction.

Shapes: N teachers, B training rows, U unique examples.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import ExampleSet, has_label, subset
from sead_dist.data.order import Split
from sead_dist.data.splits import RunExamples
from sead_dist.errors import UserError
from sead_dist.objectives.ensemble import Ensemble
from sead_dist.objectives.weightings import WEIGHTINGS
from sead_dist.runtime.console import counted, counted_rows
from sead_dist.runtime.run_log import tell
from sead_dist.teachers.endpoint import Endpoint
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher, seen_by
from sead_dist.teachers.validation import FEWEST_ROWS, is_scored

REMOVED = "unlabelled rows without a prediction in any file"


def tell_requests(source: StoredSource, splits: Iterable[Split]) -> None:
    """Log one line for each endpoint to which this process sends requests: their largest number.

    Rows that are in the store are not counted. Raises UserError where an endpoint would get more
    requests than its max_requests.
    """
    splits = list(splits)
    for n, teacher in enumerate(source.teachers):
        if not isinstance(teacher.answers, Endpoint) or not source.placement.is_alone(n):
            continue
        rows = requests = tokens = 0
        for split in splits:
            present_U = source.table(n, split).lookup(np.arange(len(split.ids_U2)))[1]
            missing_M = split.row_U[~present_U]
            texts_b = split.examples.texts_b
            found = teacher.answers.count(
                [split.examples.texts_a[row] for row in missing_M],
                None if texts_b is None else [texts_b[row] for row in missing_M],
            )
            rows += len(missing_M)
            requests, tokens = requests + found[0], tokens + found[1]
        requests += teacher.answers.count_first() if rows else 0
        said = f"at most {requests:,} requests of about {tokens:,} tokens for {rows:,} rows"
        most = teacher.answers.most
        if most is not None and teacher.answers.client.sent + requests > most:
            raise UserError(
                f"teacher {teacher.name}: this run would send {said}, and max_requests is {most}; "
                "raise max_requests, or give fewer rows (data.max_train_examples, "
                "augment.copies=null)"
            )
        tell(f"teacher {teacher.name}: {said}")


def check_scored(config: RunConfig, examples: RunExamples, teachers: Sequence[Teacher]) -> None:
    """Raises UserError where the ensemble needs each teacher's score, and a file has none.

    A file has no score where it predicts too few rows of the selection split.
    """
    selection = examples.selection
    if not (config.taught and WEIGHTINGS[config.ensemble].by_scores and selection.has_gold):
        return
    for teacher in teachers:
        answered = int(has_answer_NB([teacher], selection).sum())
        if not is_scored(teacher, answered):
            raise UserError(
                f"ensemble={config.ensemble} needs each teacher's score, and {teacher.name} has "
                f"predictions of {answered} of {counted(len(selection), 'selection row')}, where a "
                f"score needs {FEWEST_ROWS}; give a file with more predictions, or use "
                "ensemble=mean_probabilities or ensemble=fixed"
            )


def check_fitted(config: RunConfig, examples: RunExamples, teachers: Sequence[Teacher]) -> None:
    """Raises UserError where weights are fitted to gold labels, and too few rows serve for that.

    Such a row is in the selection split, has a gold label, and has a prediction in every file.
    """
    selection = examples.selection
    files = [teacher.file for teacher in teachers if teacher.file is not None]
    if not (config.taught and files and WEIGHTINGS[config.ensemble].fewest_rows):
        return
    weighting = WEIGHTINGS[config.ensemble]
    answered_B = has_label(selection.labels_B)
    for file in files:
        answered_B = answered_B & (file.places(selection.ids_B2) >= 0)
    if (count := int(answered_B.sum())) < weighting.fewest_rows:
        raise UserError(weighting.too_few(config.ensemble, count))


def answered_examples(
    config: RunConfig, examples: RunExamples, teachers: Sequence[Teacher]
) -> RunExamples:
    """The examples without training rows that have neither a gold label nor a prediction.

    A student learns nothing from such rows. Raises UserError where no training row is left, and
    where a split to score has neither gold labels nor predictions.
    """
    if config.feature_loss is not None or not any(teacher.file for teacher in teachers):
        return examples
    for part in (examples.selection, *examples.official.values()):
        if not part.has_gold and not answered_NB(config, teachers, part).any():
            raise UserError(
                f"{part.split} has no gold labels, and no file has a prediction of its rows, so "
                "the student cannot be scored on it; give predictions of its rows, or gold labels"
            )
    train = examples.train
    kept_B = has_label(train.labels_B) | answered_NB(config, teachers, train).any(0)
    if kept_B.all():
        return examples
    if not kept_B.any():
        raise UserError(
            "no training row has a gold label or a prediction; give a file with predictions of "
            "training rows"
        )
    text_kept = kept_B[examples.labelled_rows : examples.labelled_rows + examples.unlabelled_rows]
    copies_kept = kept_B[examples.labelled_rows + examples.unlabelled_rows :]
    copied = tuple(np.array(examples.copied, object)[copies_kept]) if examples.copied else ()
    counts = Counter(examples.removed)
    counts[REMOVED] += int((~kept_B).sum())
    return replace(
        examples,
        train=subset(train, kept_B),
        unlabelled_rows=int(text_kept.sum()),
        rest_rows=int(text_kept[: examples.rest_rows].sum()),
        copied=copied,
        removed=dict(counts),
    )


def answered_NB(config: RunConfig, teachers: Sequence[Teacher], part: ExampleSet) -> np.ndarray:
    """Which rows have a prediction by which teachers, where the run's keys let it use them."""
    weighting = WEIGHTINGS[config.ensemble]
    found_NB = has_answer_NB(teachers, part)
    for n, teacher in enumerate(teachers):
        named = config.teacher in (None, teacher.name) or not weighting.one_teacher
        found_NB[n] &= named and (teacher.entry.weight > 0 or not weighting.by_weight)
        if part.routes_B is not None:
            found_NB[n] &= part.routes_B == n
    return found_NB


def has_answer_NB(teachers: Sequence[Teacher], part: ExampleSet) -> np.ndarray:
    """Which rows each teacher can predict: a file those that it holds, another teacher all rows."""
    everything_B = np.ones(len(part), bool)
    return np.stack([
        everything_B if teacher.file is None else teacher.file.places(part.ids_B2) >= 0
        for teacher in teachers
    ])  # fmt: skip


def seen_examples(
    config: RunConfig, teachers: Sequence[Teacher], ids_U2: np.ndarray
) -> np.ndarray | None:
    """seen_NU: which teacher was trained on which of these examples. Other teachers predict these.

    None where no teacher is left out for that.
    """
    picks = WEIGHTINGS[config.ensemble].picks_teacher
    return None if picks else seen_by(teachers, ids_U2)


def idle_row_lines(ensemble: Ensemble, teachers: Sequence[Teacher], train: ExampleSet) -> list[str]:
    """A line on unlabelled rows that stay in the batches without a loss.

    The teachers that are chosen, or drawn for a batch, are files without a prediction of these
    rows.
    """
    answers_NB = has_answer_NB(teachers, train)
    if ensemble.weighting.goes_by_place:
        taught_B, which = answers_NB.all(0), "a file that is drawn for them has no prediction"
    else:
        weighs_N = (ensemble.weights_N.numpy() > 0) | ensemble.weighting.needs_all
        names = [teacher.name for teacher, weighs in zip(teachers, weighs_N, strict=True) if weighs]
        taught_B = answers_NB[weighs_N].any(0)
        which = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no prediction of them"
        if ensemble.weighting.one_teacher:
            which += f" (a new run with teacher={names[0]} leaves them out)"
    idle = int((~has_label(train.labels_B) & ~taught_B).sum())
    if not idle or train.routes_B is not None:
        return []
    rows = counted(idle, "unlabelled row")
    return [f"WARNING: {rows} stay in the batches without a loss: {which}"]


def file_lines(examples: RunExamples, teachers: Sequence[Teacher]) -> list[str]:
    """Lines on the files among the teachers: the rows they predict, and the rows left out."""
    files = [teacher.file for teacher in teachers if teacher.file is not None]
    lines = [line for file in files for line in file.lines]
    lines += [f"WARNING: {line}" for file in files for line in file.remarks]
    count = examples.removed.get(REMOVED, 0)
    return lines + ([f"left out: {counted_rows(count, REMOVED)}"] if count else [])
