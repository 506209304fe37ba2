"""Distillation, and fine-tuning of teachers. Both build a run's setup, then run it.

Fine-tuning is distillation without teachers.
"""

import io
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sead_dist.config.automatic import patience_steps
from sead_dist.config.load import FIRST_ENCODERS, has_teachers
from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import metric_names, subset
from sead_dist.data.splits import check_tokens, load_examples
from sead_dist.data.tasks import load_task
from sead_dist.data.tokens import adds_tokens
from sead_dist.errors import RunError, UserError, reason, rejection
from sead_dist.models.pretrained import load_tokenizer
from sead_dist.models.start import student_tokenizer
from sead_dist.models.student import check_start
from sead_dist.objectives.ensemble import Ensemble
from sead_dist.reporting.hub import reject_push
from sead_dist.reporting.report import write_predictions, write_report
from sead_dist.runs.baseline import baseline_line, needs_own_baseline, own_baseline
from sead_dist.runs.checks import nothing_to_do, reject_unused_text, teacher_runs
from sead_dist.runs.chosen_keys import early_end_line
from sead_dist.runs.prepared_teachers import Validated, prepare_teachers, validated
from sead_dist.runs.results import closing_table, conclude, for_people
from sead_dist.runs.setup import RunSetup, build
from sead_dist.runs.without_gold import rescored, with_ensemble_labels
from sead_dist.runtime.console import print_table
from sead_dist.runtime.distributed import StopFlag, World, barrier, end_if_rank_lost, from_main
from sead_dist.runtime.files import TRIAL
from sead_dist.runtime.heartbeat import StopRequestedError
from sead_dist.runtime.run_log import is_finished, noted, tell, write_json
from sead_dist.teachers.validation import request_all
from sead_dist.training.evaluation import EvalResult, evaluate
from sead_dist.training.trainer import Trainer

STOPPED_EARLY = (
    "stopped while teachers computed; what they have computed is kept; "
    "give the same command again to continue"
)
# rows of the trial report that is written before the first step
TRIAL_ROWS = 2


def distill(
    config: RunConfig,
    world: World,
    show_table: bool = True,
    stop: StopFlag | None = None,
    console: bool = True,
) -> Path:
    """Start or resume the distillation that `config` describes. Returns its run directory.

    A finished run is not repeated. show_table: whether the closing table is shown. stop: a flag of
    the caller; the run sets it where a stop is requested. console: whether lines and progress bars
    are shown on the console. Where it is False, lines go to the logger `sead_dist`, and there is no
    closing table. Raises UserError before any long work, RunError during it.
    """
    run = Path(config.output_dir)
    if world.heartbeat is not None:
        world.heartbeat.limits = config.heartbeat
    world.set_activity("looking for a finished run")
    done = from_main(world, lambda: nothing_to_do(config))
    if done is not None:
        if world.is_main:
            tell(done)
        return run
    stop = stop or StopFlag()
    while not train_student(config, world, show_table, stop, console):
        # The configuration is checked, and the folder is claimed. The setup is freed while the
        # baseline is made.
        own = distill(own_baseline(config), world, False, stop, console)
        if not from_main(world, partial(is_finished, own)):
            break  # a stop was requested
    return run


def train_student(
    config: RunConfig, world: World, show_table: bool, stop: StopFlag, console: bool
) -> bool:
    """Build the run, then train to its end or until a stop is requested.

    Returns False, with nothing trained, where a fine-tuned student must be made first.
    """
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        try:
            setup = build(config, world, stack, stop, console)
        except StopRequestedError as stopped:
            if world.is_main:
                tell(str(stopped) or STOPPED_EARLY)
            return True
        except RuntimeError as error:
            # a collective fails when another rank ends; the error names that rank
            end_if_rank_lost(world, error)
            raise
        found: Validated | None = None
        try:
            # a run with a checkpoint is resumed without a new baseline
            if from_main(
                world,
                lambda: (
                    setup.checkpointer.is_empty()
                    and needs_own_baseline(config, setup.examples, setup.batches.total_steps)
                ),
            ):
                # a teacher that fails its validation ends the run before any long work
                found = validated(setup)
                if any(validation.score is not None for validation in found[0]):
                    tell(baseline_line(config, setup.examples))
                    return False
            run_to_end(setup, show_table and console, found)
        except StopRequestedError:
            tell(STOPPED_EARLY)
            return True
        except RuntimeError as error:
            setup.heartbeat.end_if_rank_lost(error)
            raise
    barrier(world)
    return True


def run_to_end(setup: RunSetup, show_table: bool, found: Validated | None) -> None:
    """Validate the teachers, train, and write the report.

    On a signal the run saves a checkpoint and stops. found: the teachers' validations, where they
    are known.
    """
    # each start of the run logs this line, a resumed one too
    setup.log.metrics("start", total_steps=setup.batches.total_steps, world_size=setup.world.size)
    setup.world.set_activity("trying the report")
    from_main(setup.world, lambda: try_report(setup))
    state = setup.checkpointer.resume(setup.engine, setup.log, setup.batches.total_steps)
    ensemble = prepare_teachers(setup, found)
    count_past_predictions(setup, ensemble, state.step)
    if setup.config.preemption_notice_s is not None:
        tell(
            save_time_line(
                setup.checkpointer.measure(setup.engine), setup.config.preemption_notice_s
            )
        )
    trainer = make_trainer(setup, ensemble)
    state = trainer.run(state)
    if not trainer.is_over(state):
        tell(
            f"stopped at step {state.step} of {setup.batches.total_steps}, saved; "
            "give the same command again to continue"
        )
        return
    if setup.config.early_stopping_patience is not None:
        tell(early_end_line(state, setup.batches.total_steps, setup.epoch_steps))
    conclude(setup, state, ensemble, show_table)


def save_time_line(save_s: float, grace_s: float) -> str:
    """A line on the time of a save, compared with the notice that the scheduler gives."""
    line = (
        f"a save takes {save_s:.1f} s; a stop has a notice of {grace_s:g} s (preemption_notice_s)"
    )
    if 2 * save_s > grace_s:
        line += (
            "; WARNING: that may be too short for a step and a save: set a longer notice in the "
            "scheduler, or lower save_steps so that fewer steps are repeated"
        )
    return line


def finetune(
    config: RunConfig,
    world: World,
    show_table: bool = True,
    stop: StopFlag | None = None,
    console: bool = True,
) -> list[Path]:
    """Fine-tune one teacher from each of `encoders`. Returns their run directories.

    The folders are OUTPUT/teacher-0, teacher-1, ..., the seeds seed, seed + 1, ... Finished
    teachers are not repeated. show_table, stop, console: as for `distill`. Raises UserError before
    any long work, RunError during it.
    """
    if not config.encoders:
        raise UserError("encoders is empty; give what the teachers start from: encoders=[ID, DIR]")
    if config.teachers:
        raise UserError(
            "teachers is a key of distill; finetune trains teachers; give encoders=[ID, DIR]"
        )
    reject_unused_text(config)
    reject_push(config, "finetune")
    teachers = teacher_runs(config)
    if (Path(config.output_dir) / "run.json").is_file():
        raise UserError(
            f"output_dir={config.output_dir} holds a run; give another folder for the teachers"
        )
    from_main(world, lambda: check_folder(Path(config.output_dir)))
    paths = [encoder.path for encoder in config.encoders]
    for one in teachers:
        check_start(one.student, one.trust_remote_code)
    check_texts(teachers)
    from_main(world, lambda: keep_encoders(Path(config.output_dir), paths))
    runs: list[Path] = []
    for index, (one, encoder) in enumerate(zip(teachers, config.encoders, strict=True)):
        if world.is_main:
            tell(f"teacher {index + 1} of {len(teachers)}, from {encoder.path}")
        runs.append(distill(one, world, show_table, stop, console))
        if not from_main(world, lambda: is_finished(runs[-1])):
            break  # a stop was requested
    return runs


def check_texts(teachers: Sequence[RunConfig]) -> None:
    """Raises UserError for a text that the tokeniser of some teacher turns into no token.

    This is checked for all teachers before the first is trained. Data are read only where a
    tokeniser adds no special tokens.
    """
    tokenizers = {}
    for one in teachers:
        source = student_tokenizer(one.student, None)
        tokenizers[source.name] = load_tokenizer(source, one.trust_remote_code)
    if not all(adds_tokens(tokenizer) for tokenizer in tokenizers.values()):
        task = load_task(teachers[0].task)
        with noted():
            examples = load_examples(teachers[0], task)
        check_tokens(examples, tokenizers)


def keep_encoders(folder: Path, paths: Sequence[str]) -> None:
    """Record the encoders of the first start.

    A later start reads them here, so a pattern of folder names keeps its meaning.
    """
    if not has_teachers(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"output_dir={folder} cannot be made: {error.strerror}; give another folder"
            raise rejection(what, error) from None
        write_json(folder / FIRST_ENCODERS, list(paths))


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder is a file, or holds other files than teachers."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder} is a file; give a folder")
    others = [path.name for path in folder.glob("[!.]*") if not path.name.startswith("teacher-")]
    if others:
        raise UserError(
            f"output_dir={folder} holds other files ({sorted(others)[0]!r}); give a new folder"
        )


def count_past_predictions(setup: RunSetup, ensemble: Ensemble | None, done: int) -> None:
    """Count the predictions of the steps that a resumed run finished before. done: these steps."""
    if setup.source is None or ensemble is None:
        return
    batches = setup.batches
    for steps in batches.windows(0, setup.config.window_rows):
        steps = range(steps.start, min(steps.stop, done))
        if len(steps):
            entries_R = batches.entries(steps)
            needed_NR = ensemble.needed(batches, steps, entries_R)
            setup.source.touch(setup.splits.train, entries_R, needed_NR)


def make_trainer(setup: RunSetup, ensemble: Ensemble | None) -> Trainer:
    """The trainer of a run.

    Where the selection split has no gold labels, it is scored by the ensemble's predictions.
    """
    task, selection = setup.task, setup.splits.selection
    examples = selection.examples
    if ensemble is not None and setup.source is not None and not examples.has_gold:
        asked = (setup.config.prefetch_rows, "the selection split")
        examples, _ = with_ensemble_labels(
            task, examples, ensemble, request_all(setup.source, selection, *asked)
        )

    def select(step: int) -> EvalResult:
        result = evaluate(task, setup.engine.model, setup.forward, selection, setup.world, step)
        return rescored(task, result, examples) if examples.by_teachers else result

    return Trainer(
        config=setup.config,
        world=setup.world,
        engine=setup.engine,
        batches=setup.batches,
        source=setup.source,
        teacher_names=[teacher.name for teacher in setup.teachers],
        ensemble=ensemble,
        loss=setup.loss,
        checkpointer=setup.checkpointer,
        log=setup.log,
        select=select,
        metric=metric_names(task, examples)[0],
        stop=setup.stop,
        heartbeat=setup.heartbeat,
        feature_teacher=setup.feature_teacher,
        patience_steps=patience_steps(setup.epoch_steps),
    )


def try_report(setup: RunSetup) -> None:
    """Write a trial report of two rows into a temporary folder.

    It has the run's own names of task, splits and teachers. So a name that the report cannot hold
    is found before the training. Rank 0 calls this. Raises UserError, or RunError for failures of
    the environment.
    """
    run = Path(setup.config.output_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=TRIAL, dir=run) as folder:
            write_trial_report(setup, run, Path(folder))
    except (UserError, RunError):
        raise
    except Exception as error:
        raise rejection(
            f"the report of this run, tried on {TRIAL_ROWS} rows before training, cannot be "
            f"written: {reason(error)}; give other names to the task, its splits or the teachers",
            error,
        ) from error


def write_trial_report(setup: RunSetup, run: Path, folder: Path) -> None:
    """Write a report of made-up scores into `folder`. Raises what the report itself raises."""
    for name in ("config.yaml", "environment.json", "teacher_manifest.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    metrics = dict.fromkeys(setup.task.metrics, 0.5)
    splits = {"selection": setup.splits.selection, **setup.splits.official}
    scores: dict[str, Any] = {}
    results: dict[str, float] = {}
    for name, split in splits.items():
        examples = subset(split.examples, np.arange(min(TRIAL_ROWS, len(split))))
        logits_BC = np.zeros((len(examples), setup.task.num_labels), np.float32)
        write_predictions(
            folder / "predictions" / f"{name}.parquet", examples.ids_B2, examples.labels_B,
            logits_BC,
            np.full_like(logits_BC, 1 / setup.task.num_labels) if setup.teachers else None,
            for_people(setup, examples, logits_BC),
        )  # fmt: skip
        result = EvalResult(setup.task.name, name, 1, TRIAL_ROWS, metrics, 1.0, 1.0, logits_BC)
        results.update(result.card(f"eval_{name}"))
        scores[name] = {
            "student": metrics,
            "ensemble": metrics if setup.teachers else None,
            "teachers": [{"name": one.name, "metrics": metrics} for one in setup.teachers],
        }
    record = {
        "task": setup.task.name,
        "metric": setup.task.metrics[0],
        "splits": scores,
        "labels": list(setup.task.labels),
    }
    write_json(folder / "scores.json", record)
    write_json(folder / "eval_results.json", results)
    write_report(folder, trial=True)
    print_table(*closing_table(setup, scores), file=io.StringIO())
