"""What a run will ask of endpoints, told before it asks: requests cost money."""

from collections.abc import Callable, Iterable

import numpy as np

from sead_dist.data.order import Split
from sead_dist.errors import UserError
from sead_dist.teachers.endpoint import Endpoint
from sead_dist.teachers.source import StoredSource


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
