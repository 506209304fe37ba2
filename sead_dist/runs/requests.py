"""What a run will ask: of endpoints, told before it asks since requests cost money; whether files
of predictions answer enough; and which training rows are left where all teachers are such files.

Shapes: N teachers, B training rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import has_label, subset
from sead_dist.data.order import Split
from sead_dist.data.splits import RunExamples
from sead_dist.errors import UserError
from sead_dist.objectives.weightings import WEIGHTINGS
from sead_dist.runtime.console import counted, counted_rows
from sead_dist.teachers.endpoint import Endpoint
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.validation import FEWEST_ROWS

REMOVED = "unlabelled rows that no file of predictions answers"


def tell_requests(
    source: StoredSource, splits: Iterable[Split], say: Callable[[str], None]
) -> None:
    """One line for each endpoint that this process asks: the rows that are not in the store yet, at
    most. Raises UserError where they take more requests than it may be sent."""
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
                "raise it, or give fewer rows (data.max_train_examples, augment.copies=null)"
            )
        say(f"teacher {teacher.name}: {said}")


def check_scored(config: RunConfig, examples: RunExamples, teachers: Sequence[Teacher]) -> None:
    """Raises UserError where teachers count by their scores, and a file answers too few rows of the
    selection split to have one."""
    selection = examples.selection
    if not (config.taught and WEIGHTINGS[config.ensemble].by_scores and selection.has_gold):
        return
    for teacher in teachers:
        if teacher.file is None:
            continue
        answered = int((teacher.file.places(selection.ids_B2) >= 0).sum())
        if answered < FEWEST_ROWS:
            raise UserError(
                f"ensemble={config.ensemble} goes by each teacher's score, and {teacher.name} "
                f"answers {answered} of {counted(len(selection), 'selection row')}, where "
                f"{FEWEST_ROWS} are needed for one; give a file that answers more, or use "
                "ensemble=mean_probabilities, or fixed"
            )


def check_fitted(config: RunConfig, examples: RunExamples, teachers: Sequence[Teacher]) -> None:
    """Raises UserError where weights are fitted to gold labels, and too few rows of the selection
    split have one and an answer of each file."""
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
    """The same without unlabelled rows and copies that no teacher answers: nothing would be learnt
    from them. Labelled ones stay, for their labels. Raises UserError where no row is left."""
    if not teachers:
        return examples
    one = config.teacher if WEIGHTINGS[config.ensemble].one_teacher else None
    files = [teacher.file for teacher in teachers if one in (None, teacher.name)]
    if not files or any(file is None for file in files):
        return examples
    for part in (examples.selection, *examples.official.values()):
        found = [file.places(part.ids_B2) for file in files if file is not None]
        if not part.has_gold and not any((places_B >= 0).any() for places_B in found):
            raise UserError(
                f"{part.split} has no gold labels, and no file answers one of its rows, so that "
                "nothing can be told of the student there; give answers to it, or gold labels"
            )
    train = examples.train
    kept_B = has_label(train.labels_B)
    for file in files:
        if file is not None:
            kept_B = kept_B | (file.places(train.ids_B2) >= 0)
    if kept_B.all():
        return examples
    if not kept_B.any():
        raise UserError("no training row has a label or an answer; give a file that answers some")
    text_kept = kept_B[examples.labelled_rows : examples.labelled_rows + examples.transfer_rows]
    copies_kept = kept_B[examples.labelled_rows + examples.transfer_rows :]
    copied = tuple(np.array(examples.copied, object)[copies_kept]) if examples.copied else ()
    counts = Counter(examples.removed)
    counts[REMOVED] += int((~kept_B).sum())
    return replace(
        examples,
        train=subset(train, kept_B),
        transfer_rows=int(text_kept.sum()),
        rest_rows=int(text_kept[: examples.rest_rows].sum()),
        copied=copied,
        removed=dict(counts),
    )


def told_files(examples: RunExamples, teachers: Sequence[Teacher]) -> list[str]:
    """Lines on the files among the teachers: what they answer, and what is left out for them."""
    lines = [line for teacher in teachers if teacher.file is not None for line in teacher.file.told]
    count = examples.removed.get(REMOVED, 0)
    return lines + ([f"left out: {counted_rows(count, REMOVED)}"] if count else [])
