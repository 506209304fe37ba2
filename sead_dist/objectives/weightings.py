"""How much each teacher counts: one object for each value of `ensemble`, registered by its name.

Shapes: N teachers, B rows, C classes, R requested examples.

Weights depend on the row alone, on its place in the run, or are frozen before step 1 (invariant 8).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sead_dist.config.registered import take_name
from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import has_label
from sead_dist.data.order import BatchStream, micro_batch_seed
from sead_dist.errors import UserError, expect
from sead_dist.objectives.teacher_weights import (
    answers,
    confidence,
    entropy,
    fit_probabilities,
    fit_scores,
)


@dataclass(frozen=True)
class Known:
    """What a run has of the teachers before step 1.

    given: the `weight` of each entry. chosen: the index of the teacher that the key `teacher`
    names. sizes: parameters of each, without word embeddings. names: of the teachers. The rest is
    of the selection split. scores: None: not validated. logits_NBC: NaN: no prediction. labels_B:
    NaN or below 0: no label.
    """

    given: Sequence[float]
    chosen: int | None = None
    sizes: Sequence[int] = ()
    scores: Sequence[float | None] = ()
    names: Sequence[str] = ()
    logits_NBC: np.ndarray | None = None
    labels_B: np.ndarray | None = None


@dataclass(frozen=True)
class WantedSteps:
    """Steps of a run, and the examples in them that may need predictions. entries_R: the entries
    of these examples, ascending."""

    batches: BatchStream
    seed: int
    steps: range
    entries_R: np.ndarray


class Weighting:
    """Teachers that count alike. Other weightings override what differs.

    of_logits: the ensemble is a mean of logits (so one teacher's logits stay as they are), else of
    probabilities. Scores are averaged in both cases. fewest_rows: labelled rows of the selection
    split that all teachers must answer. by_scores: weights follow from the scores on that split.
    alike_without_gold: weights follow from gold labels; without any, teachers count alike.
    one_teacher: the other teachers are never needed. by_weight: teachers whose entry has weight 0
    are never needed. needs_all: teachers with weight 0 are needed too, and count where no other one
    answers. picks_teacher: a row has one teacher, even one that was trained on this row.
    """

    of_logits = False
    needs_classes = False
    needs_labels = False
    fewest_rows = 0
    by_scores = False
    alike_without_gold = False
    one_teacher = False
    by_weight = False
    needs_all = False
    picks_teacher = False

    @property
    def has_frozen_weights(self) -> bool:
        """Whether teachers may get unequal weights before step 1."""
        return type(self).frozen is not Weighting.frozen

    @property
    def goes_by_place(self) -> bool:
        """Whether weights follow from the place in the run. Outside a run there are no such
        weights."""
        return type(self).at is not Weighting.at

    def problem(self, config: RunConfig) -> str | None:
        """One line on what the run's keys lack; None where they lack nothing."""
        return None

    def too_few(self, name: str, rows: int) -> str:
        """The error where files answer only some rows, and `rows` is below `fewest_rows`."""
        return (
            f"ensemble={name} needs {self.fewest_rows} labelled rows of the selection split with a "
            f"prediction of every teacher, and there are {rows}; give files with predictions of "
            "more rows, or use ensemble=mean_probabilities"
        )

    def needs_selection(self, config: RunConfig) -> bool:
        """Whether the weights follow from the teachers' answers on the selection split."""
        return False

    def frozen(self, known: Known) -> torch.Tensor:
        """weights_N before step 1, not negative; they need not sum to 1. Raises UserError."""
        return torch.ones(len(known.given))

    def at(self, weights_N: torch.Tensor, seed: int, step: int, micro: int) -> torch.Tensor:
        """weights_N of a micro-batch: a pure function of its place."""
        return weights_N

    def of_rows(
        self,
        weights_N: torch.Tensor,
        logits_NBC: torch.Tensor,
        labels_B: torch.Tensor | None,
        routes_B: torch.Tensor | None,
    ) -> torch.Tensor:
        """weights_NB. labels_B: None where gold labels may not be used."""
        return weights_N.to(logits_NBC.device)[:, None].expand(logits_NBC.shape[:2])

    def needed(self, weights_N: torch.Tensor, of: WantedSteps) -> np.ndarray | None:
        """needed_NR: which teachers these steps need for which examples; None: all teachers for all
        examples."""
        needed_NR = np.zeros((len(weights_N), len(of.entries_R)), bool)
        needed_NR[(weights_N.numpy() > 0) | self.needs_all] = True
        return None if needed_NR.all() else needed_NR

    def shares(self, known: Known, epochs: int, routes_B: np.ndarray | None) -> list[float]:
        """An estimate of the share of the training rows for which each teacher is needed."""
        return [1.0] * len(known.given)

    def scored_as(self, has_classes: bool) -> "Weighting":
        """The weighting that combines the teachers' answers to a new text."""
        return self


RowWeights = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class ByRow(Weighting):
    """Weights of each row: weights(logits_NBC, labels_B) -> weights_NB, of positive sum over N.

    labels_B: class indices (below 0: none) or scores (NaN: none). It is None where gold labels may
    not be used, or `needs_labels` is False.
    """

    needs_all = True

    def __init__(
        self,
        weights: RowWeights,
        *,
        of_logits: bool = False,
        needs_classes: bool = False,
        needs_labels: bool = False,
    ) -> None:
        self.weights = weights
        self.of_logits, self.needs_classes = of_logits, needs_classes
        self.needs_labels = self.alike_without_gold = needs_labels

    def of_rows(
        self,
        weights_N: torch.Tensor,
        logits_NBC: torch.Tensor,
        labels_B: torch.Tensor | None,
        routes_B: torch.Tensor | None,
    ) -> torch.Tensor:
        weights_NB = self.weights(logits_NBC, labels_B if self.needs_labels else None)
        if weights_NB.shape != logits_NBC.shape[:2]:
            raise UserError(
                f"the ensemble's weights have the shape {tuple(weights_NB.shape)}; expected "
                f"[teachers, rows], {tuple(logits_NBC.shape[:2])}; correct its plugin"
            )
        return weights_NB


class MeanLogits(Weighting):
    """All teachers alike, by the mean of their logits."""

    of_logits = True


class MeanProbabilities(Weighting):
    """All teachers alike, by the mean of their probabilities, or of their scores."""


class Single(Weighting):
    """All weight for the teacher that the key `teacher` names, else for the first teacher with the
    best score."""

    of_logits = True
    one_teacher = True
    picks_teacher = True

    def needs_selection(self, config: RunConfig) -> bool:
        return config.teacher is None

    def frozen(self, known: Known) -> torch.Tensor:
        chosen = known.chosen
        if chosen is None:
            scores = [-math.inf if score is None else score for score in known.scores]
            if len(scores) > 1 and max(scores) == -math.inf:
                raise UserError(
                    "ensemble=single uses the best teacher on the selection split, and no teacher "
                    f"could be validated on it; name one, such as teacher={known.names[0]}"
                )
            chosen = scores.index(max(scores))
        return torch.eye(len(known.given))[chosen]

    def shares(self, known: Known, epochs: int, routes_B: np.ndarray | None) -> list[float]:
        count = len(known.given)
        # the teacher is chosen only after validation: here the largest stands for it
        largest = max(range(count), key=lambda n: known.sizes[n], default=0)
        chosen = largest if known.chosen is None else known.chosen
        return [float(n == chosen) for n in range(count)]


class Fixed(Weighting):
    """By the `weight` of each teacher's entry."""

    by_weight = True

    def frozen(self, known: Known) -> torch.Tensor:
        return torch.tensor(list(known.given), dtype=torch.float32)

    def shares(self, known: Known, epochs: int, routes_B: np.ndarray | None) -> list[float]:
        return [float(weight > 0) for weight in known.given]


class Score(Weighting):
    """By the score on the selection split, 0 for a score below 0. Teachers count alike where that
    split has no gold labels."""

    by_scores = True
    alike_without_gold = True

    def needs_selection(self, config: RunConfig) -> bool:
        return True

    def frozen(self, known: Known) -> torch.Tensor:
        if known.labels_B is not None and not has_label(known.labels_B).any():
            return super().frozen(known)
        for name, score in zip(known.names, known.scores, strict=False):
            if score is None:
                raise UserError(
                    f"ensemble=score needs each teacher's score, and {name} has predictions of too "
                    "few selection rows; use ensemble=mean_probabilities or ensemble=fixed"
                )
        return torch.tensor([max(score or 0.0, 0.0) for score in known.scores]).float()


class Fitted(Weighting):
    """Fitted to the gold labels of the selection split: to the highest likelihood of the mean of
    probabilities, or to the least squared error of the mean of scores."""

    # fewer were not tried (docs/decisions/0043-losses-and-ensembles.md)
    fewest_rows = 200
    # a pool worker on another machine may fit 0 where the student fits a weight close to 0
    needs_all = True

    def needs_selection(self, config: RunConfig) -> bool:
        return True

    def frozen(self, known: Known) -> torch.Tensor:
        logits_NBC, labels_B = known.logits_NBC, known.labels_B
        assert logits_NBC is not None
        assert labels_B is not None
        complete_B = ~np.isnan(logits_NBC).any(axis=(0, 2))
        rows_B = np.flatnonzero(has_label(labels_B) & complete_B)
        if not complete_B.all() and len(rows_B) < self.fewest_rows:
            raise UserError(self.too_few("fitted", len(rows_B)))
        # Known has arrays alone; the type of the labels is the `label_type` of the kind
        if labels_B.dtype.kind == "f":
            weights_N = fit_scores(logits_NBC[:, rows_B, 0], labels_B[rows_B])
        else:
            weights_N = fit_probabilities(logits_NBC[:, rows_B], labels_B[rows_B])
        return torch.from_numpy(weights_N).float()


class Random(Weighting):
    """One teacher for each micro-batch, drawn by its place in the run."""

    of_logits = True
    picks_teacher = True

    def at(self, weights_N: torch.Tensor, seed: int, step: int, micro: int) -> torch.Tensor:
        chosen = chosen_teacher(seed, step, micro, len(weights_N))
        return torch.nn.functional.one_hot(torch.tensor(chosen), len(weights_N)).float()

    def needed(self, weights_N: torch.Tensor, of: WantedSteps) -> np.ndarray | None:
        needed_NR = np.zeros((len(weights_N), len(of.entries_R)), bool)
        for step in of.steps:
            for micro, rows_B in enumerate(of.batches.micro_batches(step)):
                entries_B = of.batches.split.entry_B[rows_B]
                chosen = chosen_teacher(of.seed, step, micro, len(weights_N))
                needed_NR[chosen, np.searchsorted(of.entries_R, entries_B)] = True
        return needed_NR

    def shares(self, known: Known, epochs: int, routes_B: np.ndarray | None) -> list[float]:
        count = len(known.given)
        return [1 - (1 - 1 / count) ** epochs] * count

    def scored_as(self, has_classes: bool) -> Weighting:
        # no micro-batch chooses a teacher for a new text, so it gets the mean of all
        return WEIGHTINGS["mean_probabilities"] if has_classes else self


class Routed(Weighting):
    """All weight for the one teacher that the row's data names."""

    of_logits = True
    picks_teacher = True

    def problem(self, config: RunConfig) -> str | None:
        if config.teacher_column is not None:
            return None
        return (
            "ensemble=routed needs teacher_column=COLUMN, the column of the data that names each "
            "example's teacher"
        )

    def of_rows(
        self,
        weights_N: torch.Tensor,
        logits_NBC: torch.Tensor,
        labels_B: torch.Tensor | None,
        routes_B: torch.Tensor | None,
    ) -> torch.Tensor:
        assert routes_B is not None
        return torch.nn.functional.one_hot(routes_B, len(logits_NBC)).T.float()

    def needed(self, weights_N: torch.Tensor, of: WantedSteps) -> np.ndarray | None:
        routes_B = of.batches.split.examples.routes_B
        assert routes_B is not None
        needed_NR = np.zeros((len(weights_N), len(of.entries_R)), bool)
        for step in of.steps:
            rows_B = of.batches.rows(step)
            at_B = np.searchsorted(of.entries_R, of.batches.split.entry_B[rows_B])
            needed_NR[routes_B[rows_B], at_B] = True
        return needed_NR

    def shares(self, known: Known, epochs: int, routes_B: np.ndarray | None) -> list[float]:
        if routes_B is None:
            return super().shares(known, epochs, routes_B)
        return [float((routes_B == n).mean()) for n in range(len(known.given))]


def chosen_teacher(seed: int, step: int, micro: int, teachers: int) -> int:
    """The one teacher that `random` uses for a micro-batch: a pure function of its place."""
    generator = torch.Generator().manual_seed(micro_batch_seed(seed + 1, step, micro))
    return int(torch.randint(teachers, (1,), generator=generator))


WEIGHTINGS: dict[str, Weighting] = {
    "single": Single(),
    "mean_logits": MeanLogits(),
    "mean_probabilities": MeanProbabilities(),
    "fixed": Fixed(),
    "score": Score(),
    "fitted": Fitted(),
    "confidence": ByRow(confidence, needs_classes=True, needs_labels=True),
    "entropy": ByRow(entropy, needs_classes=True),
    "answers": ByRow(answers, needs_labels=True),
    "random": Random(),
    "routed": Routed(),
}


def register_ensemble(
    name: str,
    weighting: Weighting | RowWeights,
    *,
    of_logits: bool = False,
    needs_classes: bool = False,
    needs_labels: bool = False,
) -> None:
    """Let `ensemble` name this weighting of teachers.

    weighting: weights(logits_NBC, labels_B) -> weights_NB, not negative and not all 0 in a row; or
    a `Weighting`, whose attributes give what it needs. labels_B: class indices (below 0: none) or
    scores (NaN: none), None unless needs_labels, and for a new text. of_logits: logits are
    averaged, not probabilities. needs_classes: a task whose labels are scores cannot use it. Raises
    UserError where the name is taken.
    """
    flags = {"of_logits": of_logits, "needs_classes": needs_classes, "needs_labels": needs_labels}
    for flag, given in flags.items():
        expect(flag, given, bool, "True or False")
    kinds = Weighting if isinstance(weighting, type) else (Weighting, Callable)
    take_name("ensemble", name, weighting, kinds, "a function, or a Weighting (not its class)")
    if not isinstance(weighting, Weighting):
        weighting = ByRow(
            weighting, of_logits=of_logits, needs_classes=needs_classes, needs_labels=needs_labels
        )
    WEIGHTINGS[name] = weighting
