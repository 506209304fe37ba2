"""Official task metrics, under Hugging Face's names, computed by scikit-learn and SciPy; and
tables of gold against predicted labels.

The two libraries take a second to import, so each is imported by the metric that needs it.

Shapes: B examples, C classes. Sources: GLUE (Wang et al. 2018), SuperGLUE (Wang et al. 2019),
ReCoRD's token F1 as SQuAD defines it (Rajpurkar et al. 2016).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from sead_dist.runtime.console import table

# above this many classes the worst pairs are shown instead of the whole matrix
MOST_SHOWN = 30
PAIRS = 10


class Answer(NamedTuple):
    """One candidate of a ReCoRD query, and the answers that are right for the query."""

    candidate: str
    gold: tuple[str, ...]


class MetricInputs(Protocol):
    """The part of an example set that metrics read. Most tasks have no `groups_B` or `answers`."""

    @property
    def labels_B(self) -> np.ndarray: ...
    @property
    def groups_B(self) -> np.ndarray | None: ...
    @property
    def answers(self) -> Sequence[Answer] | None: ...


def _correlation(name: str, labels_B: np.ndarray, scores_B: np.ndarray) -> float:
    from scipy import stats

    # A constant has no correlation with anything: 0 rather than NaN, which no JSON reader takes.
    if len(labels_B) < 2 or np.ptp(labels_B) == 0 or np.ptp(scores_B) == 0:
        return 0.0
    return float(getattr(stats, name)(labels_B, scores_B).statistic)


def _accuracy(labels_B: np.ndarray, predictions_B: np.ndarray) -> float:
    return float(np.mean(labels_B == predictions_B))


def _f1(labels_B: np.ndarray, predictions_B: np.ndarray, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels_B, predictions_B, average=average, zero_division=0.0))


def _matthews(labels_B: np.ndarray, predictions_B: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels_B, predictions_B))


def _exact_groups(labels_B: np.ndarray, predictions_B: np.ndarray, groups_B: np.ndarray) -> float:
    _, group_B = np.unique(groups_B, return_inverse=True)
    return float(np.mean(np.bincount(group_B, weights=labels_B != predictions_B) == 0))


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(candidate: str, gold: str) -> float:
    ours, theirs = normalise_answer(candidate).split(), normalise_answer(gold).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _exact_answer(candidate: str, gold: str) -> float:
    return float(normalise_answer(candidate) == normalise_answer(gold))


REGRESSION: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": lambda y, p: _correlation("pearsonr", y, p),
    "spearmanr": lambda y, p: _correlation("spearmanr", y, p),
}
CLASSIFICATION: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,  # of class 1; two classes only
    "f1_macro": lambda y, p: _f1(y, p, "macro"),
    "matthews_correlation": _matthews,
}
GROUPED: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "f1_a": lambda y, p, g: _f1(y, p),
    "exact_match": _exact_groups,
    "accuracy": lambda y, p, g: _accuracy(y, p),
}
ANSWERS: dict[str, Callable[[str, str], float]] = {"exact_match": _exact_answer, "f1": _token_f1}


def class_metrics(reader: str) -> list[str]:
    """The names of the metrics that a task with classes can have. reader: `TaskSpec.reader`."""
    grouped: dict[str, list[str]] = {"multirc": list(GROUPED), "record": list(ANSWERS)}
    return grouped.get(reader) or list(CLASSIFICATION)


def _answer_scores(name: str, answers: Sequence[Answer]) -> np.ndarray:
    """scores_B: the score of each candidate against the right answer that it is most like."""
    score = ANSWERS[name]
    return np.array([max((score(c, g) for g in gold), default=0.0) for c, gold in answers])


def _best_rows(logits_BC: np.ndarray, groups_B: np.ndarray) -> np.ndarray:
    """The row of each group that scores highest for class 1 (the first of equals)."""
    order_B = np.lexsort((logits_BC[:, 0] - logits_BC[:, 1], groups_B))
    return order_B[np.unique(groups_B[order_B], return_index=True)[1]]


def _check(logits_BC: np.ndarray, labels_B: np.ndarray, known_B: np.ndarray) -> None:
    """Raises ValueError where the shapes differ, there is no row, or a row has no label."""
    if len(labels_B) == 0 or logits_BC.ndim != 2 or len(logits_BC) != len(labels_B):
        raise ValueError(f"logits of shape {logits_BC.shape} for {len(labels_B)} labels")
    if not known_B.all():
        raise ValueError("a metric needs a label in every row")


def of_scores(
    names: Sequence[str], logits_BC: np.ndarray, inputs: MetricInputs
) -> dict[str, float]:
    """Metrics `names` of scores, logits_BC [B, 1]. Raises ValueError where the shapes differ, there
    is no row, or a row has no label."""
    labels_B = inputs.labels_B
    _check(logits_BC, labels_B, ~np.isnan(labels_B))
    scores_B = logits_BC[:, 0].astype(np.float64)
    return {name: REGRESSION[name](labels_B, scores_B) for name in names}


def of_classes(
    names: Sequence[str], logits_BC: np.ndarray, inputs: MetricInputs
) -> dict[str, float]:
    """Metrics `names` of the classes of the largest logits. Raises ValueError where the shapes
    differ, there is no row, or a row has no label."""
    labels_B, groups_B, answers = inputs.labels_B, inputs.groups_B, inputs.answers
    _check(logits_BC, labels_B, labels_B >= 0)
    if answers is not None and groups_B is not None:
        rows = _best_rows(logits_BC, groups_B)
        chosen = [answers[row] for row in rows]
        return {name: float(_answer_scores(name, chosen).mean()) for name in names}
    predictions_B = logits_BC.argmax(axis=1)
    if groups_B is not None:
        return {name: GROUPED[name](labels_B, predictions_B, groups_B) for name in names}
    return {name: CLASSIFICATION[name](labels_B, predictions_B) for name in names}


def constant(name: str, num_classes: int, inputs: MetricInputs) -> float:
    """The best score under metric `name` that a constant answer can reach.

    It is 0 for MCC. In ReCoRD an answer is the best candidate of a group, and a constant gives all
    candidates the same score. So there it is the mean score of a candidate drawn at random.
    """
    if name == "matthews_correlation":
        return 0.0
    if inputs.answers is not None and inputs.groups_B is not None:
        scores_B = _answer_scores(name, inputs.answers)
        _, group_B = np.unique(inputs.groups_B, return_inverse=True)
        return float(np.mean(np.bincount(group_B, weights=scores_B) / np.bincount(group_B)))
    rows = len(inputs.labels_B)
    return max(
        of_classes([name], np.tile(one_hot_C, (rows, 1)), inputs)[name]
        for one_hot_C in np.eye(num_classes)
    )


@dataclass(frozen=True)
class Confusion:
    """counts_CC[gold, predicted]: the number of rows, of those with a gold label. names: those of
    the C classes."""

    names: tuple[str, ...]
    counts_CC: np.ndarray

    @property
    def never_predicted(self) -> list[str]:
        """Classes that occur as gold labels and never as predictions."""
        gold_C, predicted_C = self.counts_CC.sum(axis=1), self.counts_CC.sum(axis=0)
        return [self.names[c] for c in np.flatnonzero((gold_C > 0) & (predicted_C == 0))]

    def class_table(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows): for each class its rows, predictions, precision, recall and F1. These
        are 0 where the class has no predictions or no rows, as with scikit-learn's
        zero_division=0."""
        right_C = np.diag(self.counts_CC).astype(float)
        gold_C, predicted_C = self.counts_CC.sum(axis=1), self.counts_CC.sum(axis=0)
        precision_C = right_C / np.maximum(predicted_C, 1)
        recall_C = right_C / np.maximum(gold_C, 1)
        f1_C = 2 * right_C / np.maximum(gold_C + predicted_C, 1)
        rows: list[list[object]] = [
            [name, int(gold), int(predicted), float(precision), float(recall), float(f1)]
            for name, gold, predicted, precision, recall, f1 in zip(
                self.names, gold_C, predicted_C, precision_C, recall_C, f1_C, strict=True
            )
        ]
        return ["class", "rows", "predicted", "precision", "recall", "F1"], rows

    def matrix(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows): a row for each gold label, a column for each predicted one."""
        rows: list[list[object]] = [
            [name, *map(int, counts_C)]
            for name, counts_C in zip(self.names, self.counts_CC, strict=True)
        ]
        return ["gold label / predicted", *self.names], rows

    def worst_pairs(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows): the pairs of gold and other predicted class that occur most often."""
        off_CC = self.counts_CC - np.diag(np.diag(self.counts_CC))
        order = np.argsort(-off_CC, axis=None, kind="stable")[:PAIRS]
        pairs = [np.unravel_index(place, off_CC.shape) for place in order]
        rows: list[list[object]] = [
            [self.names[gold], self.names[predicted], int(off_CC[gold, predicted])]
            for gold, predicted in pairs
            if off_CC[gold, predicted] > 0
        ]
        return ["gold label", "predicted", "rows"], rows

    def tables(self, drawn: bool) -> list[str]:
        """Tables in Markdown: the classes one by one, then the matrix, or the worst pairs where
        there are more than MOST_SHOWN classes. drawn: a picture shows the matrix, so no table does.
        """
        found = [table(*self.class_table())]
        if len(self.names) > MOST_SHOWN:
            found.append(table(*self.worst_pairs()))
        elif not drawn:
            found.append(table(*self.matrix()))
        return found


def confusion(names: Sequence[str], labels_B: np.ndarray, logits_BC: np.ndarray) -> Confusion:
    """The counts of gold classes against those of the largest logits. Rows whose label is below 0
    have no gold label and are left out."""
    classes = len(names)
    known_B = labels_B >= 0
    cell_B = labels_B[known_B] * classes + logits_BC[known_B].argmax(axis=1)
    counts_CC = np.bincount(cell_B, minlength=classes * classes).reshape(classes, classes)
    return Confusion(tuple(names), counts_CC)
