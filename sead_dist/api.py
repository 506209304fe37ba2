"""The Python interface: what the commands do, as functions that return values.

A mistake is an exception of one line: UserError before any long work, RunError during it. A call
leaves the process as it was (`runtime/surroundings.py`). What the commands print goes to the logger
`sead_dist`. The same calls work under a launcher. Its variables say which rank this process is.

Shapes: N teachers, B rows, C classes (1: a score).
"""

import atexit
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from sead_dist.config.load import read_layers, resolve
from sead_dist.config.registered import ROUTED, kept_plugins
from sead_dist.config.schema import RunConfig
from sead_dist.config.yaml_text import read_run_config
from sead_dist.data.kinds import KINDS
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import RunError, UserError, expect, run_error
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.objectives.ensemble import combine
from sead_dist.objectives.losses import SOFT_LOSSES, SoftTargets, known, total_loss
from sead_dist.objectives.weightings import WEIGHTINGS
from sead_dist.runs import distillation, predicted_rows, prediction
from sead_dist.runs.checks import finished_run, reject_untaught
from sead_dist.runs.claim import holds_run
from sead_dist.runs.given import (
    NAMES,
    Data,
    Task,
    as_layer,
    as_rows,
    checked_task,
    class_order,
    given_run,
    given_sets,
    is_folder,
    is_path,
)
from sead_dist.runs.without_gold import load_to_score
from sead_dist.runtime.distributed import (
    StopFlag,
    World,
    end_if_rank_lost,
    from_main,
    join_world,
    leave_world,
)
from sead_dist.runtime.run_log import is_finished, read_json
from sead_dist.runtime.surroundings import as_before, quiet_libraries
from sead_dist.training.engine import own_accelerate


@dataclass(frozen=True, init=False)
class Run:
    """A run directory, and what a finished run left in it. Functions that take a model also take
    a Run."""

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        expect("path", path, NAMES, "the folder of a run")
        object.__setattr__(self, "path", Path(path))

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return is_finished(self.path)

    @property
    def config(self) -> RunConfig:
        """The run's whole configuration. Old names of keys are read as the present ones. Raises
        UserError where there is none, or where it does not fit this version."""
        kept = kept_plugins(self.path)
        keys = read_run_config(self.path)
        try:
            return resolve([keys, {"plugins": kept} if kept else {}])
        except UserError as error:
            raise UserError(
                f"{self.path / 'config.yaml'} is not a configuration of this version: {error}; "
                "read it as YAML, or use the version that wrote it (environment.json names it)"
            ) from error

    @property
    def model_dir(self) -> Path:
        """The student, as a Transformers checkpoint. Raises UserError where there is none yet."""
        return finished_run(self.path) / "model"

    @property
    def scores(self) -> dict[str, Any]:
        """By split (`selection`, `validation`, ...): the metrics of `student`, of `ensemble` (None
        without teachers) and of each of `teachers`. Raises UserError before the run's end."""
        splits: dict[str, Any] = read_json(finished_run(self.path) / "scores.json")["splits"]
        return splits

    def predictions(self, split: str) -> Any:
        """A pandas DataFrame of a split's rows: id, label (class index or score), student_logits,
        ensemble_probabilities; row in the file (from 1), gold_label, predicted_label and
        probability_LABEL (or predicted_score), texts. Raises UserError for a split without
        predictions."""
        folder = finished_run(self.path) / "predictions"
        path = folder / f"{split}.parquet"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in folder.glob("*.parquet")))
            raise UserError(f"{self.path} has no predictions of {split!r}; give one of {there}")
        return pq.read_table(path).to_pandas()


def load_config(*words: str | os.PathLike[str], **keys: Any) -> RunConfig:
    """The configuration made of YAML files, shipped names (`sst2`), KEY=VALUE overrides and keys.
    Later ones count over earlier ones. Raises UserError naming key, value and what is allowed."""
    for place, word in enumerate(words, 1):
        what = "a YAML file, a shipped name (sst2), or KEY=VALUE"
        expect(f"argument {place} of load_config", word, NAMES, what)
    return resolve([*read_layers([os.fspath(word) for word in words]), as_layer(keys)])


def distill(
    task: Task,
    *,
    data: Data = None,
    teachers: Any = None,
    student: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    **keys: Any,
) -> Run:
    """Distil the teachers into the student as `sead-dist distill` does: start or resume the run.

    data: None is the hub's. Data in memory are kept in the run directory. One table or file alone
    is divided (`data.validation_fraction`), except for a task of the hub. student: a checkpoint, a
    shape (`L6-H256-A8`) or a mapping. keys: as in configs/base.yaml; of a section a mapping, or
    dotted: `**{"selection.fraction": 0.2}`. unlabeled: also a file, a table, rows or texts.

    Raises UserError before any long work, RunError during it (also where SIGTERM or SIGUSR2
    stopped the run, which is saved), KeyboardInterrupt where Ctrl-C stopped it.
    """
    given = {"teachers": teachers, "student": student, "output_dir": output_dir}
    with call() as world, ExitStack() as stack:
        asked = given_run(task, data, {**{k: v for k, v in given.items() if v is not None}, **keys})
        if not asked.config.encoders:
            reject_untaught(asked.config)
        from_main(world, lambda: stack.enter_context(asked.keeping(holds_run)))
        stop = StopFlag(second=signal.default_int_handler)
        folder = distillation.distill(asked.config, world, stop=stop, console=False)
        return ended([Run(folder)], stop, world)[0]


def finetune(
    task: Task,
    *,
    data: Data = None,
    encoders: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    **keys: Any,
) -> list[Run]:
    """Fine-tune a teacher from each of `encoders` (OUTPUT/teacher-0, ...), as `sead-dist finetune`.
    Arguments and errors are those of `distill`."""
    given = {"encoders": encoders, "output_dir": output_dir}
    with call() as world, ExitStack() as stack:
        asked = given_run(task, data, {**{k: v for k, v in given.items() if v is not None}, **keys})
        check = distillation.check_folder
        from_main(world, lambda: stack.enter_context(asked.keeping(check)))
        stop = StopFlag(second=signal.default_int_handler)
        folders = distillation.finetune(asked.config, world, stop=stop, console=False)
        return ended([Run(folder) for folder in folders], stop, world)


def ended(runs: list[Run], stop: StopFlag, world: World) -> list[Run]:
    """The runs, where they are finished. Raises KeyboardInterrupt or RunError where a stop was
    requested, also while the last report was written: the script may go on with other work."""
    left = from_main(world, lambda: next((run for run in runs if not run.finished), None))
    if left is None and not stop.agreed(world):
        return runs
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if left is None:
        line = f"a stop was requested at the end of {runs[-1].path}; the run is finished; "
        raise RunError(line + "repeat the call to get it")
    line = f"{left.path} was stopped and is saved; "
    raise RunError(line + "repeat the call that started it to continue")


def evaluate(
    model: str | os.PathLike[str],
    *,
    task: str | os.PathLike[str] | TaskSpec | None = None,
    data: Data = None,
    split: str | None = None,
    labels: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """The scores of a model (a run, a folder, a hub id) on a task's splits, under the keys of a
    run's eval_results.json (`eval_accuracy`, ...), as `sead-dist evaluate`.

    task: None is the run's own. data: None is the run's own, or the hub's; data of one split
    belong to `split`, else to the task's first one to evaluate on. labels: the model's class order,
    or "task_order". Raises UserError for data or a model that do not fit the task.
    """
    name = model_name(model)
    expect("split", split, str | None, "the name of a split")
    with call() as world:
        spec = spec_of(name, task)
        path = None if data is None or not is_path(data) else os.fspath(data)
        if data is None or (path is not None and is_folder(path)):
            # a run's own data are those of its own task
            source = prediction.data_of(name, None if task is None else spec.name, path)
            wanted = prediction.wanted_splits(spec, split)
            sets = [load_to_score(name, spec, source, key) for key in wanted]
        else:
            sets = given_sets(spec, data, split)
        found = prediction.results_of(name, spec, sets, class_order(labels), world)
    return prediction.as_one(found)


def predict(
    model: str | os.PathLike[str],
    texts_or_rows: Any,
    *,
    task: str | os.PathLike[str] | TaskSpec | None = None,
    labels: str | Sequence[str] | None = None,
    batch_size: int = 32,
    skip_malformed: bool = False,
) -> list[dict[str, Any] | None]:
    """A model's prediction of each text or row: `predicted_label` and `probability_LABEL` of every
    label, or `predicted_score`.

    batch_size: rows of a forward. skip_malformed: a row that cannot be read (its text is None)
    has the result None and is logged (`sead_dist`). Without it such a row raises UserError.

    texts_or_rows: a list or Series of texts (of tuples of them where the task reads several
    columns), a list of rows (mappings), a DataFrame, a Dataset or a file; labels are not needed.
    Nested rows (official MultiRC, ReCoRD) have a result for each of their examples. Other arguments
    and errors: as for `evaluate`.
    """
    name = model_name(model)
    if isinstance(texts_or_rows, str):
        raise UserError("texts_or_rows is one text; give a list of texts, or pathlib.Path(FILE)")
    expect("skip_malformed", skip_malformed, bool, "True or False")
    expect("batch_size", batch_size, int, "how many rows a forward has, from 1")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}; give how many rows a forward has, from 1")
    settings = predicted_rows.Settings(class_order(labels), batch_size, skip_malformed)
    with call() as world:
        spec = spec_of(name, task)
        rows = as_rows(spec, texts_or_rows, "texts_or_rows", skip_malformed)
        examples = settings.examples(spec, rows, "texts_or_rows")
        settings.tell_skipped(world)
        columns = predicted_rows.answer_examples(name, spec, examples, settings, world)
    return predicted_rows.answers_by_row(columns, len(rows), examples)


def soft_targets(
    logits_NBC: torch.Tensor,
    *,
    ensemble: str = "mean_probabilities",
    temperature: float = 1.0,
    weights_N: torch.Tensor | None = None,
    labels_B: torch.Tensor | None = None,
    routes_B: torch.Tensor | None = None,
) -> SoftTargets:
    """The soft targets of teachers' logits in one class order (C = 1: scores): `targets_BC`,
    `logits_BC` and `weights_NB`.

    weights_N: of the teachers, for `fixed`, `score`, `fitted` and `single`. labels_B: gold labels
    (-1: none) or scores (NaN: none), for `confidence` and `answers`. routes_B: the number of each
    row's teacher, for `routed`. `random` works only in a run. Raises UserError for what does not
    fit.
    """
    expect("logits_NBC", logits_NBC, torch.Tensor, "a tensor of shape [N, B, C]")
    expect("ensemble", ensemble, str, "the name of an ensemble")
    expect("temperature", temperature, Real, "a number above 0")
    if logits_NBC.dim() != 3:
        raise UserError(f"logits_NBC has shape {tuple(logits_NBC.shape)}; expected [N, B, C]")
    N, B, C = logits_NBC.shape
    allowed = [name for name, of in WEIGHTINGS.items() if not of.goes_by_place]
    if ensemble not in allowed:
        raise UserError(
            f"ensemble={ensemble!r} cannot be used here; give one of {', '.join(allowed)}"
        )
    if not temperature > 0:
        raise UserError(f"temperature={temperature}; expected a number above 0")
    weighting = WEIGHTINGS[ensemble]
    if C == 1 and weighting.needs_classes:
        raise UserError(f"ensemble={ensemble} needs classes, and C is 1; use mean_logits")
    for name, value, asked, size in (
        ("weights_N", weights_N, weighting.has_frozen_weights, N),
        ("routes_B", routes_B, ensemble == ROUTED, B),
        ("labels_B", labels_B, False, B),
    ):
        if value is None and asked:
            raise UserError(f"ensemble={ensemble} needs {name}; give a tensor of {size}")
        expect(name, value, torch.Tensor | None, f"a tensor of {size}")
        if value is not None and tuple(value.shape) != (size,):
            raise UserError(f"{name} has shape {tuple(value.shape)}; expected [{size}]")
    weights_N = torch.ones(N) if weights_N is None else weights_N.float()
    teachers = TeacherLogits(logits_NBC, torch.ones_like(logits_NBC[..., 0], dtype=torch.bool))
    return combine(weighting, teachers, labels_B, weights_N, temperature, C == 1, routes_B)


def distillation_loss(
    student_BC: torch.Tensor,
    soft: SoftTargets | None,
    labels_B: torch.Tensor | None = None,
    *,
    loss: str = "auto",
    alpha: float = 0.9,
) -> torch.Tensor:
    """The mean over B rows of a run's loss, a scalar to differentiate. Labelled rows: alpha * soft
    + (1 - alpha) * hard. Rows without a label: soft. Where `soft` is None: hard alone.

    labels_B: class indices (-1: none) or scores (NaN: none); None: no row has one. loss: as the
    key of a run. Raises UserError for what does not fit.
    """
    expect("student_BC", student_BC, torch.Tensor, "a tensor of shape [B, C]")
    expect("soft", soft, SoftTargets | None, "what soft_targets returns, or None")
    expect("labels_B", labels_B, torch.Tensor | None, "a tensor of [B], or None")
    expect("loss", loss, str, "the name of a loss")
    expect("alpha", alpha, Real, "a number from 0 to 1")
    if student_BC.dim() != 2:
        raise UserError(f"student_BC has shape {tuple(student_BC.shape)}; expected [B, C]")
    if loss not in ("auto", *SOFT_LOSSES):
        raise UserError(f"loss={loss!r} is not a loss; allowed: auto, {', '.join(SOFT_LOSSES)}")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha}; expected a number from 0 to 1")
    B, C = student_BC.shape
    if soft is not None and soft.logits_BC.shape != student_BC.shape:
        there = tuple(soft.logits_BC.shape)
        raise UserError(f"student_BC has shape {(B, C)}, and the soft targets {there}")
    if soft is None and labels_B is None:
        raise UserError("there is nothing to learn from; give soft targets, labels_B or both")
    if C == 1 and loss != "auto" and SOFT_LOSSES[loss].needs_classes:
        raise UserError(f"loss={loss} needs classes, and C is 1; use mse, or auto")
    if labels_B is None:
        labels_B = torch.full((B,), torch.nan if C == 1 else -1, device=student_BC.device)
    if tuple(labels_B.shape) != (B,):
        raise UserError(f"labels_B has shape {tuple(labels_B.shape)}; expected [{B}]")
    labels_B = labels_B.float() if C == 1 else labels_B
    if soft is None and not bool(known(labels_B).any()):
        raise UserError("no row has a label, and there are no soft targets; give either")
    valid_B = torch.ones(B, dtype=torch.bool, device=student_BC.device)
    kind = KINDS["regression" if C == 1 else "classification"]
    name = kind.soft_losses[0] if loss == "auto" else loss
    logits_BC = student_BC.float()
    return total_loss(logits_BC, labels_B, valid_B, soft, name, alpha, B, kind.hard_loss).total


@contextmanager
def call() -> Iterator[World]:
    """Every call works inside this. It joins the launcher's world and leaves the process as it was.
    Errors of the machine become RunErrors.

    Ranks that have met stay together until the process ends: they cannot meet a second time.
    """
    with as_before(), own_accelerate():
        ours = not dist.is_initialized()
        world = join_world()
        if ours and world.size > 1:
            atexit.register(leave_world, world)
        try:
            quiet_libraries(world)
            yield world
        except (UserError, RunError):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError):
                end_if_rank_lost(world, error)
            if (line := run_error(error)) is None:
                raise
            raise line from error
        finally:
            if world.heartbeat is not None:  # no sign of life is due between two calls
                world.heartbeat.finish()


def model_name(model: str | os.PathLike[str]) -> str:
    """The given model's name or path, as text. Raises UserError for what is neither."""
    expect("model", model, NAMES, "a run, the folder of a model, or its id on the hub")
    return os.fspath(model)


def spec_of(model: str, task: str | os.PathLike[str] | TaskSpec | None) -> TaskSpec:
    """The task that was given; where none was, the model's own. Raises UserError."""
    if isinstance(task, TaskSpec):
        return checked_task(task)
    expect("task", task, NAMES | None, "a shipped name (sst2), a YAML file, or a TaskSpec")
    return prediction.task_of(model, None if task is None else os.fspath(task))
