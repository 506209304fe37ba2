"""Gold labels against predicted ones, class by class.

Shapes: B examples, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sead_dist.runtime.console import table

# above this many classes the worst pairs are told instead of the whole matrix
MOST_SHOWN = 30
PAIRS = 10


@dataclass(frozen=True)
class Confusion:
    """counts_CC[gold, predicted] of the rows with a gold label; names: of the classes."""

    names: tuple[str, ...]
    counts_CC: np.ndarray

    @property
    def never_predicted(self) -> list[str]:
        """Classes that some gold label names and no prediction."""
        gold_C, predicted_C = self.counts_CC.sum(axis=1), self.counts_CC.sum(axis=0)
        return [self.names[c] for c in np.flatnonzero((gold_C > 0) & (predicted_C == 0))]

    def class_table(self) -> tuple[list[str], list[list[object]]]:
        """(columns, rows): of each class its rows, predictions, precision, recall and F1 (0 where
        nothing was predicted or is there, as scikit-learn's zero_division=0)."""
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
        """Markdown: the classes one by one, then the matrix, or the worst pairs where the classes
        are many. drawn: whether a picture shows the matrix."""
        found = [table(*self.class_table())]
        if len(self.names) > MOST_SHOWN:
            found.append(table(*self.worst_pairs()))
        elif not drawn:
            found.append(table(*self.matrix()))
        return found


def confusion(names: Sequence[str], labels_B: np.ndarray, logits_BC: np.ndarray) -> Confusion:
    """Of class indices (below 0: unlabelled, passed over) and the classes of the largest logits."""
    classes = len(names)
    known_B = labels_B >= 0
    cell_B = labels_B[known_B] * classes + logits_BC[known_B].argmax(axis=1)
    counts_CC = np.bincount(cell_B, minlength=classes * classes).reshape(classes, classes)
    return Confusion(tuple(names), counts_CC)
