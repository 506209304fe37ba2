"""The end of a run: the final model, its scores, predictions, summary and report.

Shapes: N teachers, B rows, C classes.
"""

import math
import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sead_dist.config.automatic import learning_rate
from sead_dist.data.examples import ExampleSet, metric_names, name_of, score, subset
from sead_dist.data.order import Split
from sead_dist.data.tasks import TaskSpec, compute_metrics
from sead_dist.errors import UserError
from sead_dist.models.resaved import check_saved, eval_logits, one_row
from sead_dist.models.sequence_classifier import save_model
from sead_dist.objectives.ensemble import Ensemble
from sead_dist.objectives.feature_losses import without_projections
from sead_dist.reporting.hub import push_at_end
from sead_dist.reporting.report import write_predictions, write_report
from sead_dist.runs.baseline import FILE, baseline_folder, kept_shares, share_lines
from sead_dist.runs.claim import drop_training_state
from sead_dist.runs.remarks import ensemble_gap, make_remarks, never_predicted
from sead_dist.runs.setup import RunSetup
from sead_dist.runs.without_gold import rescored, with_ensemble_labels
from sead_dist.runtime.distributed import from_main, gather_objects
from sead_dist.runtime.memory import peak
from sead_dist.runtime.run_log import read_as, tell, tell_table, write_json
from sead_dist.teachers.teacher import write_trained_rows
from sead_dist.teachers.validation import answered, request_all
from sead_dist.training.checkpoint import TrainState
from sead_dist.training.engine import width_of
from sead_dist.training.evaluation import EvalResult, evaluate


def score_split(
    setup: RunSetup, split: Split, ensemble: Ensemble | None, step: int, best: int | None = None
) -> tuple[EvalResult, dict[str, Any], np.ndarray | None]:
    """(the student's result on a split, all scores, the ensemble's probabilities_BC).

    A teacher is scored on the rows that it predicts ({} for none). The ensemble is scored on the
    rows that all teachers with a weight predict (None for none). Probabilities are None unless
    these are all rows. Without gold labels the scores measure agreement with the ensemble, and
    probabilities are NaN in rows without a prediction. best: the teacher that the ensemble is
    compared with.
    """
    result = evaluate(setup.task, setup.engine.model, setup.forward, split, setup.world, step)
    never: dict[str, list[str]] = {}
    scores: dict[str, Any] = {
        "student": result.metrics, "teachers": [], "ensemble": None, "never_predicted": never
    }  # fmt: skip
    if setup.source is None or ensemble is None:
        never["the student"] = never_predicted(setup.task, split.examples, result.logits_BC)
        return result, scores, None
    ahead, what = setup.config.prefetch_rows, split.examples.split
    logits_NBC = request_all(setup.source, split, ahead, what)
    by, targets_BC = with_ensemble_labels(setup.task, split.examples, ensemble, logits_NBC)
    if by.by_teachers:
        result = rescored(setup.task, result, by)
        scores |= {"student": result.metrics, "metric": metric_names(setup.task, by)[0]}
    never["the student"] = never_predicted(setup.task, by, result.logits_BC)
    routes = split.examples.routes_B
    routes_B = None if routes is None else torch.from_numpy(routes)
    all_NBC = torch.from_numpy(logits_NBC)
    answer = ensemble.answer(all_NBC, routes_B)
    for teacher, of_teacher_BC in zip(setup.teachers, logits_NBC, strict=True):
        logits_BC, examples = answered(of_teacher_BC, by)
        found = score(setup.task, logits_BC, examples) if len(examples) else {}
        scores["teachers"].append({"name": teacher.name, "metrics": found})
        if len(examples):
            never[f"teacher {teacher.name}"] = never_predicted(setup.task, examples, logits_BC)
        if len(examples) < len(split):
            scores["teachers"][-1]["rows"] = len(examples)
    if by.by_teachers:  # the labels are the ensemble's, so it has no score of its own
        return result, scores, targets_BC
    complete_B = ensemble.complete(all_NBC, routes_B).numpy()
    whole, rows = bool(complete_B.all()), int(complete_B.sum())
    examples = split.examples if whole else subset(split.examples, complete_B)
    ensemble_BC = answer.logits_BC.numpy()[complete_B]
    if rows:
        scores["ensemble"] = compute_metrics(setup.task, ensemble_BC, examples)
    if not whole:
        scores["ensemble_rows"] = rows
    if best is not None and setup.world.is_main and whole:
        name = setup.teachers[best].name
        scores["ensemble_gap"] = ensemble_gap(
            setup.task, split.examples, ensemble_BC, logits_NBC[best], name
        )
    return result, scores, answer.targets_BC.numpy() if whole else None


def peak_memory(device: torch.device) -> int:
    """The most bytes that this rank held: on its GPU, else in the process."""
    known = peak(device)
    if known is not None:
        return known
    # on Linux this may include the peak of the parent process
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summary(setup: RunSetup, state: TrainState) -> dict[str, Any]:
    """The content of RUN/run_summary.json. Every rank calls this."""
    totals = {
        "rows": 0.0,
        "train_s": 0.0,
        "wait_s": 0.0,
        "padding": 0.0,
        "tokens": 0.0,
        "feature_rows": 0.0,
    }
    totals.update(state.totals)
    forwards, hits = setup.source.counts() if setup.source is not None else (0, 0)
    start = setup.config.student.path
    is_hub_id = start is not None and not Path(start).exists()
    return {
        "finished": True,
        "steps": state.step,
        "best_step": state.best_step,
        "best_metric": state.best_metric,
        "lowest_loss": state.lowest_loss,
        "lowest_step": state.lowest_step,
        "chosen": chosen(setup),
        "examples_per_second": round(totals["rows"] / max(totals["train_s"], 1e-9), 3),
        "train_s": round(totals["train_s"], 3),
        "teacher_forwards": forwards + int(totals["feature_rows"]),
        "store_hits": hits,
        "feature_loss": feature_record(setup, int(totals["feature_rows"])),
        "numerics": setup.source.numerics_read() if setup.source is not None else [],
        "teachers_s": round(setup.source.spent_s if setup.source is not None else 0.0, 3),
        "teacher_wait_s": round(totals["wait_s"], 3),
        "padding_waste": round(totals["padding"] / max(totals["tokens"], 1.0), 4),
        "peak_memory_bytes": gather_objects(setup.world, peak_memory(setup.world.device)),
        "world_size": setup.world.size,
        "placement": placement_word(setup),
        "deepspeed": setup.engine.deepspeed,
        "train_rows": len(setup.splits.train),
        "unlabelled_rows": setup.examples.unlabelled_rows,
        "copy_rows": len(setup.examples.copied),
        "base_model": start if is_hub_id else None,
    }


def chosen(setup: RunSetup) -> dict[str, Any]:
    """The run's values of keys that may be null or auto."""
    config = setup.config
    return {
        "max_steps": config.max_steps,
        "learning_rate": learning_rate(config, width_of(setup.engine.module)),
        "final_checkpoint": config.final_checkpoint,
    }


def feature_record(setup: RunSetup, forwards: int) -> dict[str, Any] | None:
    """The feature teacher and its loss; None without one. forwards: that teacher's in training.
    Every epoch computes them again. Steps that a resumed run repeated are counted once."""
    feature_loss = setup.loss.feature
    if setup.feature_teacher is None or feature_loss is None:
        return None
    return {
        "method": feature_loss.method,
        "teacher": setup.feature_teacher.name,
        "variant": feature_loss.variant,
        "until_step": feature_loss.until,
        "forwards": forwards,
    }


def placement_word(setup: RunSetup) -> str | None:
    """The placement of the teachers in one word; None without teachers."""
    return None if setup.source is None else setup.source.placement.word


def save_student(setup: RunSetup, state: TrainState) -> None:
    """Write the final student to model/, and check that plain Transformers reads the same model.

    The engine holds this student afterwards. Raises what `check_saved` raises.
    """
    config, module = setup.config, setup.engine.module
    if state.best_step is not None:
        setup.engine.load_weights(setup.checkpointer.best_folder(state.best_step))
    weights = without_projections(setup.engine.weights())
    folder = Path(config.output_dir) / "model"
    from_main(setup.world, lambda: save_model(module, weights, setup.inputs.save, folder))
    row = one_row(setup.splits.train)
    # every rank calls this, since a student that DeepSpeed splits needs all ranks for a forward
    trained = eval_logits(setup.engine.model, lambda: setup.engine.forward(row, 1))
    from_main(
        setup.world,
        lambda: check_saved(
            folder, weights, trained, row, config.precision, config.trust_remote_code
        ),
    )


def score_splits(
    setup: RunSetup, state: TrainState, ensemble: Ensemble | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """(all scores by split, the student's scores on the official splits as in its model card).
    Every prediction is written to predictions/."""
    splits = {"selection": setup.splits.selection, **setup.splits.official}
    scores: dict[str, Any] = {}
    results: dict[str, float] = {}
    best: int | None = None
    for name, split in splits.items():
        result, scores[name], probabilities_BC = score_split(
            setup, split, ensemble, state.step, best
        )
        several = ensemble is not None and not ensemble.weighting.one_teacher
        if name == "selection" and several and split.examples.has_gold:
            best = best_of(setup.task, scores[name]["teachers"])
        if name != "selection":
            first = not results
            results.update(result.card("eval" if first else f"eval_{name}"))
        if setup.world.is_main:
            write_predictions(
                Path(setup.config.output_dir) / "predictions" / f"{name}.parquet",
                split.examples.ids_B2,
                split.examples.labels_B,
                result.logits_BC,
                probabilities_BC,
                for_people(setup, split.examples, result.logits_BC),
            )
    return scores, results


def write_left_out(setup: RunSetup, left_out: Split, step: int) -> None:
    """Write a teacher's predictions of the fold that it was not trained on.

    The rows that it was trained on are written to its model's folder.
    """
    result = evaluate(setup.task, setup.engine.model, setup.forward, left_out, setup.world, step)
    run = Path(setup.config.output_dir)

    def write() -> None:
        write_trained_rows(run / "model", setup.splits.train)
        write_predictions(
            run / "predictions" / "left_out.parquet",
            left_out.examples.ids_B2,
            left_out.examples.labels_B,
            result.logits_BC,
            None,
            for_people(setup, left_out.examples, result.logits_BC),
        )

    from_main(setup.world, write)
    metric = setup.task.metrics[0]
    tell(
        f"fold {setup.config.fold}, left out: {metric} {result.metrics[metric]:.4f} on "
        f"{len(left_out)} rows (predictions/left_out.parquet)"
    )


def best_of(task: TaskSpec, teachers: Sequence[dict[str, Any]]) -> int | None:
    """The index of the teacher with the highest score; None with fewer than two teachers."""
    found = [of["metrics"].get(task.metrics[0], -math.inf) for of in teachers]
    return found.index(max(found)) if len(found) > 1 else None


def for_people(
    setup: RunSetup, examples: ExampleSet, logits_BC: np.ndarray
) -> dict[str, Sequence[Any]]:
    """Columns of the predictions that are easy to read: the row (from 1) in its file, names of
    labels with their probabilities, and the texts."""
    task = setup.task
    columns: dict[str, Sequence[Any]] = {"row": (examples.rows_B + 1).tolist()}
    if task.task_kind.has_classes:
        names = dict(enumerate(task.labels))
        columns["gold_label"] = [names.get(int(label)) for label in examples.labels_B]
    columns |= task.task_kind.answers(task, logits_BC)
    if not setup.config.prediction_texts:
        return columns
    several = examples.choices > 1
    columns["text_a"] = examples.texts_a[:: examples.choices]
    for choice in range(examples.choices if examples.texts_b is not None else 0):
        name = f"text_b_{choice + 1}" if several else "text_b"
        columns[name] = (examples.texts_b or [])[choice :: examples.choices]
    return columns


def conclude(
    setup: RunSetup, state: TrainState, ensemble: Ensemble | None, show_table: bool
) -> None:
    """Load the final student, save it, score it once on the official splits, and write the report.

    Every rank calls this. Rank 0 writes. `finished` in run_summary.json marks a finished run.
    """
    world, config = setup.world, setup.config
    run = Path(config.output_dir)
    setup.heartbeat.count_progress("saving the student")
    save_student(setup, state)
    scores, results = score_splits(setup, state, ensemble)
    if setup.splits.left_out is not None:
        write_left_out(setup, setup.splits.left_out, state.step)
    closing = summary(setup, state)
    remarks = make_remarks(config, setup.task, setup.splits, scores, setup.teachers)
    if closing["best_metric"] is None:  # a student that was not scored in training is scored now
        found = scores["selection"]
        closing["best_metric"] = found["student"][found.get("metric", setup.task.metrics[0])]
    shares = shares_of(setup, scores)
    for line in share_lines(shares):
        tell(line)
    results["epoch"] = round(state.step / setup.batches.steps_per_epoch, 4)

    def write() -> None:
        write_json(run / "eval_results.json", results)
        write_scores(setup, scores, shares, remarks)
        # the report reads the summary, and the run is not finished before its report is written
        write_json(run / "run_summary.json", {**closing, "finished": False})
        write_report(run)
        write_json(run / "run_summary.json", closing)
        drop_training_state(config)

    setup.heartbeat.count_progress("writing the report")
    from_main(world, write)
    if show_table and world.is_main:
        tell_table(*closing_table(setup, scores))
    for line in remarks:
        tell(f"WARNING: {line}")
    tell(
        f"{closing['steps']} steps, {closing['examples_per_second']} examples/s, "
        f"{closing['teacher_forwards']} teacher forwards, {closing['store_hits']} read from the "
        f"store; model, card and plots: {run / 'model'}"
    )
    if config.push_to_hub:
        line = from_main(world, lambda: push_at_end(run, config))
        tell(line)


def shares_of(setup: RunSetup, scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By split, the scores and shares that `kept_shares` gives; empty without a baseline."""
    baseline = baseline_folder(setup.config)
    if setup.source is None or baseline is None:
        return {}
    try:
        held = (setup.examples.selection, *setup.examples.official.values())
        return kept_shares(baseline, scores, setup.task.metrics[0], held)
    except UserError as error:  # the baseline was damaged since the start; the run still ends
        tell(f"the share of the gap that the student keeps is not known: {error}")
        return {}


def write_scores(
    setup: RunSetup,
    scores: dict[str, Any],
    shares: dict[str, dict[str, float]],
    remarks: Sequence[str],
) -> None:
    """Write scores.json, and add the shares to learnable.json. Rank 0 calls this."""
    task, run = setup.task, Path(setup.config.output_dir)
    some_gold = any("metric" not in of for of in scores.values())
    record = {
        "task": task.name,
        "metric": task.metrics[0] if some_gold else name_of(task.metrics[0]),
        "splits": scores,
        "selected_on": setup.config.selection.split,
        "labels": list(task.labels),
        "remarks": remarks,
    }
    write_json(run / "scores.json", record)
    # the file is missing where the ensemble could not be compared with the baseline
    if shares and (run / FILE).is_file():
        found = read_as(dict[str, Any], run / FILE)
        write_json(run / FILE, {**found, "splits": shares})


def closing_table(
    setup: RunSetup, scores: dict[str, Any]
) -> tuple[str, list[str], list[list[object]]]:
    """(title, columns, rows) of the table that the console shows at the end."""
    metrics = setup.task.metrics
    agreeing = [split for split, of in scores.items() if "metric" in of]
    names = {split: list(of["student"]) for split, of in scores.items()}
    mark = " (selected on dev)" if setup.config.selection.split == "dev" else ""
    rows: list[list[object]] = []

    def figures(found: Iterable[dict[str, float] | None]) -> list[float | None]:
        pairs = zip(names.values(), found, strict=True)
        return [(of or {}).get(metric) for named, of in pairs for metric in named]

    splits = list(scores.values())
    for index, teacher in enumerate(setup.teachers):
        rows.append([teacher.name, *figures(of["teachers"][index]["metrics"] for of in splits)])
    if setup.teachers:
        rows.append(["ensemble", *figures(of["ensemble"] for of in splits)])
    rows.append(["student", *figures(of["student"] for of in splits)])
    told = len(metrics) > 1 or agreeing
    columns = [f"{name} {each}" if told else name for name, of in names.items() for each in of]
    what = ", ".join(metrics) if len(agreeing) < len(scores) else ""
    if agreeing:
        what += (", and " if what else "") + "agreement with the teachers"
    return f"{setup.task.name}: {what}{mark}", ["", *columns], rows
