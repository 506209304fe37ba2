"""The training loop: one step at a time, from the batches to the optimiser.

Shapes: B rows of a micro-batch, C classes, N teachers.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from sead_dist.config.automatic import scoring_steps
from sead_dist.config.schema import RunConfig
from sead_dist.data.order import Batch, BatchStream, padding_waste
from sead_dist.errors import RunError
from sead_dist.models.hidden_states import LayerOutputs, TeacherLogits
from sead_dist.objectives.ensemble import Ensemble
from sead_dist.objectives.losses import DistillationLoss, known
from sead_dist.runtime.distributed import (
    StopFlag,
    World,
    from_main,
    gather_objects,
)
from sead_dist.runtime.heartbeat import Heartbeat, StopRequestedError
from sead_dist.runtime.run_log import RunLog
from sead_dist.teachers.base import TaughtStep, TeacherSource, stream
from sead_dist.teachers.feature_teacher import FeatureTeacher
from sead_dist.training.checkpoint import Checkpointer, SaveClock, TrainState
from sead_dist.training.engine import Engine
from sead_dist.training.evaluation import EvalResult

LOG_EVERY = 10


def until_stopped(taught_steps: Iterator[TaughtStep]) -> Iterator[TaughtStep]:
    """The steps with predictions, until a stop is requested while teachers compute."""
    with suppress(StopRequestedError):
        yield from taught_steps


@dataclass(frozen=True)
class Trainer:
    """The parts of a run, and its loop.

    select: scores the student on the selection split (None: there is none). patience_steps: the
    number of steps between two checks for an early end (None: an epoch).
    """

    config: RunConfig
    world: World
    engine: Engine
    batches: BatchStream
    source: TeacherSource | None
    teacher_names: list[str]
    ensemble: Ensemble | None
    loss: DistillationLoss
    checkpointer: Checkpointer
    log: RunLog
    select: Callable[[int], EvalResult] | None
    metric: str
    stop: StopFlag
    heartbeat: Heartbeat
    feature_teacher: FeatureTeacher | None = None
    patience_steps: int | None = None

    def run(self, state: TrainState) -> TrainState:
        """Train from `state` to the end. Returns the state at which it stopped, which a requested
        stop makes earlier than the end; a checkpoint is saved then."""
        if self.is_over(state):
            return state
        depth = 1 if self.world.device.type == "cuda" else 0
        total = self.batches.total_steps
        taught_steps = stream(
            self.batches,
            self.source,
            state.step,
            self.config.window_rows,
            depth,
            self.needed,
            self.feature_teacher,
        )
        tally = Tally(len(self.teacher_names))
        clock, pace = SaveClock(), Pace(state.step, total, self.batches.steps_per_epoch)
        shown: dict[str, object] = {}
        self.engine.model.train()
        with self.log.progress("training", total, state.step) as bar:
            for taught in until_stopped(taught_steps):
                self.heartbeat.count_progress(f"training, step {state.step + 1} of {total}")
                began = time.perf_counter()
                self.learn(taught, tally)
                learning_rate = self.engine.learning_rate
                self.engine.wake(state.step)
                self.update(state.step + 1)
                self.heartbeat.count_progress(f"training, after step {state.step + 1} of {total}")
                spent_s = time.perf_counter() - began
                pace.add(taught)
                step = taught.step.number + 1
                state = replace(state, step=step, cursor=taught.step.cursor_after).add(
                    rows=taught.step.valid_rows,
                    train_s=spent_s + taught.waited_s,
                    wait_s=taught.waited_s,
                    feature_rows=taught.feature_rows,
                )
                tally.seconds += spent_s + taught.waited_s
                tally.waited_s += taught.waited_s
                tally.rows += taught.step.valid_rows
                due = self.saves_by_time and self.world.is_main and clock.due()
                stopping, due = self.stop.agreed_with(self.world, due)
                evaluating = self.evaluates_after(step)
                saving = self.saves_after(step) or stopping or due
                if step % LOG_EVERY == 0 or evaluating or saving or step == total:
                    line, state = self.report(tally, state, learning_rate)
                    shown |= {"loss": line["loss"], "per_s": line["examples_per_second"]}
                    bar.update(**shown)
                    tally = Tally(len(self.teacher_names))
                if evaluating:
                    self.heartbeat.count_progress(f"scoring the student of step {step}")
                    state, shown[f"selection_{self.metric}"] = self.score(state)
                    bar.update(**shown)
                    # without a saved state the run would lose a new best student
                    saving = saving or (self.saves_by_time and state.best_step == step)
                over = self.is_over(state)
                # an early end is saved like the last step
                saving = saving or (over and self.config.save_steps != 0)
                if saving:
                    self.heartbeat.count_progress(f"saving step {step}")
                    clock.save(partial(self.checkpointer.save, self.engine, state))
                self.log.step_done(step, total)
                bar.advance(1, pace.left_s(step))
                if stopping or over:
                    break
        if not self.is_over(state) and not self.checkpointer.holds(state.step):
            self.checkpointer.save(self.engine, state)
        return state

    def learn(self, taught: TaughtStep, tally: "Tally") -> None:
        """Do forward and backward of this rank's micro-batches."""
        batches = taught.step.batches
        for place, (batch, teachers) in enumerate(taught.micro_batches()):
            self.engine.seed_micro_batch(batch.step, batch.micro)
            with self.engine.accumulate(last=place == len(batches) - 1):
                student_BC, layer_outputs = self.forward(batch, taught.feature_teacher is not None)
                device = student_BC.device
                labels_B, valid_B = batch.labels_B.to(device), batch.valid_B.to(device)
                soft = None
                if teachers is not None and self.ensemble is not None:
                    said = TeacherLogits(
                        teachers.logits_NBC.to(device), teachers.present_NB.to(device)
                    )
                    routes_B = None if batch.routes_B is None else batch.routes_B.to(device)
                    soft = self.ensemble.soft_targets(
                        said, labels_B, routes_B, batch.step, batch.micro
                    )
                    tally.agreement_2N += self.ensemble.agreement(student_BC, said, valid_B).cpu()
                shown = None if teachers is None else teachers.layer_outputs
                terms = self.loss.terms(
                    student_BC, labels_B, valid_B, soft, batch.step, taught.step.valid_rows,
                    layer_outputs, shown, batch.inputs["attention_mask"],
                )  # fmt: skip
                self.engine.backward(terms.total)
            self.heartbeat.count_progress(
                f"training, step {batch.step + 1}, micro-batch {batch.micro + 1}"
            )
            tally.labelled += int((known(batch.labels_B) & batch.valid_B).sum())
            parts = torch.stack([terms.total.detach(), terms.soft, terms.hard, terms.feature])
            # each row has the same weight in the log, whatever its batch
            tally.losses += parts.cpu() * taught.step.valid_rows
        tally.steps += 1
        waste, tokens = padding_waste(batches)
        tally.padding += torch.tensor([waste, tokens], dtype=torch.float64)

    def forward(self, batch: Batch, reads: bool) -> tuple[torch.Tensor, LayerOutputs | None]:
        """The student's logits_BC, and its hidden states and attention if they are compared."""
        with self.loss.reading(reads) as layer_outputs:
            choices = self.batches.split.tokens.choices
            return self.engine.forward(batch.inputs, choices), layer_outputs

    def needed(self, steps: range, entries_R: np.ndarray) -> np.ndarray | None:
        """The needed_NR: which teachers these steps need for which examples (None: all for all)."""
        if self.ensemble is None:
            return None
        return self.ensemble.needed(self.batches, steps, entries_R)

    def update(self, step: int) -> None:
        """Take the optimiser's step. Raises RunError for a gradient that is not finite, so that it
        never reaches a checkpoint."""
        norm = self.engine.step()
        # with fp16 such gradients occur, and their steps are skipped
        if self.config.precision != "fp16" and not math.isfinite(norm):
            raise RunError(
                f"the gradient's norm is {norm} at step {step}; the last checkpoint is intact; "
                "start again in another output_dir, with a lower learning_rate or with "
                "precision=fp32"
            )
        self.engine.average_weights(step)

    def report(
        self, tally: "Tally", state: TrainState, learning_rate: float
    ) -> tuple[dict[str, float], TrainState]:
        """Sum the ranks' tallies and log them. Raises RunError for a loss that is not finite."""
        parts = gather_objects(self.world, tally)
        losses = torch.stack([part.losses for part in parts]).sum(0) / tally.rows
        total, soft, hard, feature = losses.tolist()
        if not np.isfinite(total):
            raise RunError(
                f"the loss is {total} at step {state.step}; the last checkpoint is intact; start "
                "again in another output_dir, with a lower learning_rate or with precision=fp32"
            )
        same, asked = torch.stack([part.agreement_2N for part in parts]).sum(0).tolist()
        padding, tokens = torch.stack([part.padding for part in parts]).sum(0).tolist()
        waited_s = max(p.waited_s for p in parts)
        shown = {
            "epoch": round(state.step / self.batches.steps_per_epoch, 4),
            "loss": total,
            "rows": tally.rows,
            "learning_rate": learning_rate,
            "examples_per_second": round(tally.rows / max(tally.seconds, 1e-9), 3),
            "teacher_wait_s": round(waited_s, 4),
        }
        # the mean over labelled rows, which may be few beside the unlabelled text
        with_label = sum(part.labelled for part in parts)
        hard_mean = hard * tally.rows / with_label if with_label else None
        taught = bool(self.teacher_names)
        rates = {n: s / a for n, s, a in zip(self.teacher_names, same, asked, strict=True) if a}
        self.log.metrics(
            "train",
            step=state.step,
            **shown,
            loss_soft=soft if taught else None,
            loss_hard=hard_mean,
            loss_feature=None if self.loss.feature is None else feature,
            agreement=rates,
        )
        if self.config.report_to is not None:
            parts_of_loss = {"loss_soft": soft, "loss_hard": hard_mean or 0.0}
            if self.loss.feature is not None:
                parts_of_loss["loss_feature"] = feature
            self.engine.track({**shown, **parts_of_loss}, state.step)
        return shown, state.add(padding=padding, tokens=tokens)

    def is_over(self, state: TrainState) -> bool:
        """Whether all steps are taken, or the selection loss has not fallen at the last
        `early_stopping_patience` checks."""
        patience = self.config.early_stopping_patience
        return state.step >= self.batches.total_steps or (
            patience is not None and state.losses_without_fall >= patience
        )

    def may_end_after(self, step: int) -> bool:
        """Whether an early end is checked for after this step. `eval_steps` does not matter here,
        since a resume may change it."""
        if self.config.early_stopping_patience is None:
            return False
        return step % (self.patience_steps or self.batches.steps_per_epoch) == 0

    def evaluates_after(self, step: int) -> bool:
        if self.select is None:
            return False
        if self.may_end_after(step):
            return True
        total = self.batches.total_steps
        every = scoring_steps(self.config, self.batches.steps_per_epoch, total)
        return step % every == 0 or step == total

    def saves_after(self, step: int) -> bool:
        every = self.config.save_steps
        if step == self.batches.total_steps:
            return every != 0
        return every is not None and every > 0 and step % every == 0

    @property
    def saves_by_time(self) -> bool:
        return self.config.save_steps is None

    def score(self, state: TrainState) -> tuple[TrainState, float]:
        """Score the selection split, and save the student if it is the one to keep so far. Returns
        the state and the score."""
        assert self.select is not None
        result = self.select(state.step)
        score = result.metrics[self.metric]
        self.log.metrics(
            "eval", step=state.step, split="selection", loss=result.loss, metrics=result.metrics
        )
        if self.config.report_to is not None:
            scores = {f"selection_{name}": value for name, value in result.metrics.items()}
            self.engine.track({**scores, "selection_loss": result.loss}, state.step)
        if not self.loss.teaches_head(state.step):
            return state, score  # the score of a head that is not trained yet
        if self.may_end_after(state.step):
            state = self.with_selection_loss(result.loss, state)
        return self.keep(score, result.loss, state), score

    def with_selection_loss(self, loss: float, state: TrainState) -> TrainState:
        """The state with this selection loss, at a check for an early end. Rank 0 checks whether it
        fell, as in `agreed_better`."""
        lowest = state.lowest_loss
        if from_main(self.world, lambda: lowest is None or loss < lowest):
            return replace(state, lowest_loss=loss, lowest_step=state.step, losses_without_fall=0)
        return replace(state, losses_without_fall=state.losses_without_fall + 1)

    def keep(self, score: float, loss: float, state: TrainState) -> TrainState:
        """Save the student as it is now, if `final_checkpoint` selects it."""
        kept = self.config.final_checkpoint
        if kept in ("last", "average"):
            if not self.is_over(state):
                return state
        elif not self.agreed_better(score, loss, state):
            return state
        self.checkpointer.save_best(self.engine, state.step, averaged=kept == "average")
        if kept == "average":
            # the averaged student is scored at the end, with the official splits
            return replace(state, best_step=state.step)
        return replace(state, best_step=state.step, best_metric=score, best_loss=loss)

    def agreed_better(self, score: float, loss: float, state: TrainState) -> bool:
        """Whether the student is the best so far, by rank 0's score. On different processors the
        last digit of a loss may differ, and all ranks save the best student together (invariant
        8)."""
        return from_main(self.world, lambda: is_better(score, loss, state))


def is_better(score: float, loss: float, state: TrainState) -> bool:
    """Whether a student is better than the best so far: by its score, and for equal scores by its
    loss. Scores are often equal on a small selection split."""
    if state.best_metric is None or score > state.best_metric:
        return True
    return score == state.best_metric and (state.best_loss is None or loss < state.best_loss)


class Tally:
    """What this rank did since the last line of the log.

    losses: total, soft, hard, feature, each summed over rows.
    """

    def __init__(self, teachers: int) -> None:
        self.losses = torch.zeros(4)
        self.agreement_2N = torch.zeros(2, teachers)
        self.padding = torch.zeros(2, dtype=torch.float64)
        self.labelled = 0
        self.steps = 0
        self.rows = 0
        self.seconds = 0.0
        self.waited_s = 0.0


class Pace:
    """The time for the rest of the steps, at the speed of this process.

    A step takes the mean of those so far, scores and checkpoints included. Waits for teachers are
    counted apart: the first epoch waits for predictions, and later epochs read most of them from
    the store.
    """

    def __init__(self, start: int, total: int, epoch_steps: int) -> None:
        self._start, self._began = start, time.monotonic()
        # the first epoch's steps, and all others
        border = max(start, min(epoch_steps, total))
        self._ranges = [range(start, border), range(border, total)]
        # of each, the seconds of waiting, and for how many of its steps
        self._waited = [(0.0, 0), (0.0, 0)]

    def add(self, taught: TaughtStep) -> None:
        """Count the wait for a window. A window lies in one epoch."""
        if taught.window is not None:
            later = taught.window.start not in self._ranges[0]
            seconds, steps = self._waited[later]
            self._waited[later] = seconds + taught.waited_s, steps + len(taught.window)

    def left_s(self, step: int) -> float:
        """The seconds that are left after `step` steps."""
        waited_s = sum(seconds for seconds, _ in self._waited)
        worked_s = time.monotonic() - self._began - waited_s
        left_s = worked_s / max(step - self._start, 1) * (self._ranges[1].stop - step)
        for of, (seconds, steps) in zip(self._ranges, self._waited, strict=True):
            left_s += seconds / max(steps, 1) * (len(of) - steps)
        return left_s
