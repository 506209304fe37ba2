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
from sead_dist.data.task_files import TaskSpec, compute_metrics
from sead_dist.errors import UserError
from sead_dist.models.resaved import answer, check_saved, one_row
from sead_dist.models.sequence_classifier import save_model
from sead_dist.objectives.ensemble import Ensemble
from sead_dist.objectives.feature_losses import without_projections
from sead_dist.reporting.hub import push_at_end
from sead_dist.reporting.report import write_predictions, write_report
from sead_dist.runs.baseline import FILE, baseline_folder, kept_shares, told_shares
from sead_dist.runs.claim import drop_training_state
from sead_dist.runs.remarks import ensemble_gap, make_remarks, never_predicted
from sead_dist.runs.setup import Parts
from sead_dist.runs.without_gold import judged, rescored
from sead_dist.runtime.console import print_table
from sead_dist.runtime.distributed import from_main, gather_objects
from sead_dist.runtime.memory import peak
from sead_dist.runtime.run_log import read_as, write_json
from sead_dist.teachers.teacher import write_trained_rows
from sead_dist.teachers.validation import answered, ask_all
from sead_dist.training.checkpoint import TrainState
from sead_dist.training.engine import width_of
from sead_dist.training.evaluation import EvalResult, evaluate


def score_split(
    parts: Parts, split: Split, ensemble: Ensemble | None, step: int, best: int | None = None
) -> tuple[EvalResult, dict[str, Any], np.ndarray | None]:
    """The student's result on a split, everyone's metrics, and the ensemble's probabilities_BC. A
    teacher is scored on the rows that it answers ({}: none); the ensemble on those that all who
    count answer (None: none, and probabilities only where these are all rows). best: the teacher
    that the ensemble is compared with. Without gold labels the figures are agreement with the
    ensemble, and probabilities NaN in rows without an answer."""
    result = evaluate(parts.task, parts.engine.model, parts.forward, split, parts.world, step)
    never: dict[str, list[str]] = {}
    scores: dict[str, Any] = {
        "student": result.metrics, "teachers": [], "ensemble": None, "never_predicted": never
    }  # fmt: skip
    if parts.source is None or ensemble is None:
        never["the student"] = never_predicted(parts.task, split.examples, result.logits_BC)
        return result, scores, None
    ahead, what = parts.config.prefetch_rows, split.examples.split
    logits_NBC = ask_all(parts.source, split, ahead, what)
    by, targets_BC = judged(parts.task, split.examples, ensemble, logits_NBC)
    if by.by_teachers:
        result = rescored(parts.task, result, by)
        scores |= {"student": result.metrics, "metric": metric_names(parts.task, by)[0]}
    never["the student"] = never_predicted(parts.task, by, result.logits_BC)
    routes = split.examples.routes_B
    routes_B = None if routes is None else torch.from_numpy(routes)
    all_NBC = torch.from_numpy(logits_NBC)
    answer = ensemble.answer(all_NBC, routes_B)
    for teacher, of_teacher_BC in zip(parts.teachers, logits_NBC, strict=True):
        logits_BC, examples = answered(of_teacher_BC, by)
        found = score(parts.task, logits_BC, examples) if len(examples) else {}
        scores["teachers"].append({"name": teacher.name, "metrics": found})
        if len(examples):
            never[f"teacher {teacher.name}"] = never_predicted(parts.task, examples, logits_BC)
        if len(examples) < len(split):
            scores["teachers"][-1]["rows"] = len(examples)
    if by.by_teachers:  # of which the ensemble is the measure
        return result, scores, targets_BC
    complete_B = ensemble.complete(all_NBC, routes_B).numpy()
    whole, rows = bool(complete_B.all()), int(complete_B.sum())
    examples = split.examples if whole else subset(split.examples, complete_B)
    ensemble_BC = answer.logits_BC.numpy()[complete_B]
    if rows:
        scores["ensemble"] = compute_metrics(parts.task, ensemble_BC, examples)
    if not whole:
        scores["ensemble_rows"] = rows
    if best is not None and parts.world.is_main and whole:
        name = parts.teachers[best].name
        scores["ensemble_gap"] = ensemble_gap(
            parts.task, split.examples, ensemble_BC, logits_NBC[best], name
        )
    return result, scores, answer.targets_BC.numpy() if whole else None


def peak_memory(device: torch.device) -> int:
    """Most bytes this rank held: of its GPU, or of the process."""
    known = peak(device)
    if known is not None:
        return known
    # on Linux this may be what the process had that started this one
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summary(parts: Parts, state: TrainState) -> dict[str, Any]:
    """RUN/run_summary.json. Every rank calls this."""
    totals = {
        "rows": 0.0,
        "train_s": 0.0,
        "wait_s": 0.0,
        "padding": 0.0,
        "tokens": 0.0,
        "live_rows": 0.0,
    }
    totals.update(state.totals)
    forwards, hits = parts.source.counts() if parts.source is not None else (0, 0)
    start = parts.config.student.path
    is_hub_id = start is not None and not Path(start).exists()
    return {
        "finished": True,
        "steps": state.step,
        "best_step": state.best_step,
        "best_metric": state.best_metric,
        "lowest_loss": state.lowest_loss,
        "lowest_step": state.lowest_step,
        "chosen": chosen(parts),
        "examples_per_second": round(totals["rows"] / max(totals["train_s"], 1e-9), 3),
        "train_s": round(totals["train_s"], 3),
        "teacher_forwards": forwards + int(totals["live_rows"]),
        "store_hits": hits,
        "feature_loss": feature_record(parts, int(totals["live_rows"])),
        "numerics": parts.source.numerics_read() if parts.source is not None else [],
        "teachers_s": round(parts.source.spent_s if parts.source is not None else 0.0, 3),
        "teacher_wait_s": round(totals["wait_s"], 3),
        "padding_waste": round(totals["padding"] / max(totals["tokens"], 1.0), 4),
        "peak_memory_bytes": gather_objects(parts.world, peak_memory(parts.world.device)),
        "world_size": parts.world.size,
        "placement": placement_word(parts),
        "deepspeed": parts.engine.deepspeed,
        "train_rows": len(parts.splits.train),
        "transfer_rows": parts.examples.transfer_rows,
        "copy_rows": len(parts.examples.copied),
        "base_model": start if is_hub_id else None,
    }


def chosen(parts: Parts) -> dict[str, Any]:
    """What the run took for keys that were left to it."""
    config = parts.config
    return {
        "max_steps": config.max_steps,
        "learning_rate": learning_rate(config, width_of(parts.engine.module)),
        "final_checkpoint": config.final_checkpoint,
    }


def feature_record(parts: Parts, forwards: int) -> dict[str, Any] | None:
    """Whose layer outputs the student followed and how; `forwards` of it are live ones, which are
    made again in every epoch (those of steps that a killed run repeated are not counted)."""
    feature_loss = parts.loss.feature
    if parts.feature_teacher is None or feature_loss is None:
        return None
    return {
        "method": feature_loss.method,
        "teacher": parts.feature_teacher.name,
        "variant": feature_loss.variant,
        "until_step": feature_loss.until,
        "forwards": forwards,
    }


def placement_word(parts: Parts) -> str | None:
    return None if parts.source is None else parts.source.placement.word


def save_student(parts: Parts, state: TrainState) -> None:
    """Write the student that is kept, which is the engine's from now on, to model/, and check that
    plain Transformers reads the same model there."""
    config, module = parts.config, parts.engine.module
    if state.best_step is not None:
        parts.engine.load_weights(parts.checkpointer.best_folder(state.best_step))
    weights = without_projections(parts.engine.weights())
    folder = Path(config.output_dir) / "model"
    from_main(parts.world, lambda: save_model(module, weights, parts.inputs.save, folder))
    row = one_row(parts.splits.train)
    # every rank: a student that DeepSpeed splits answers on all of them at once
    trained = answer(parts.engine.model, lambda: parts.engine.forward(row, 1))
    from_main(
        parts.world,
        lambda: check_saved(
            folder, weights, trained, row, config.precision, config.trust_remote_code
        ),
    )


def score_splits(
    parts: Parts, state: TrainState, ensemble: Ensemble | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """(scores of student and teachers by split, the student's on the official ones as the card has
    them). Every prediction is written to predictions/."""
    splits = {"selection": parts.splits.selection, **parts.splits.official}
    scores: dict[str, Any] = {}
    results: dict[str, float] = {}
    best: int | None = None
    for name, split in splits.items():
        result, scores[name], probabilities_BC = score_split(
            parts, split, ensemble, state.step, best
        )
        several = ensemble is not None and not ensemble.weighting.one_teacher
        if name == "selection" and several and split.examples.has_gold:
            best = best_of(parts.task, scores[name]["teachers"])
        if name != "selection":
            first = not results
            results.update(result.card("eval" if first else f"eval_{name}"))
        if parts.world.is_main:
            write_predictions(
                Path(parts.config.output_dir) / "predictions" / f"{name}.parquet",
                split.examples.ids_B2,
                split.examples.labels_B,
                result.logits_BC,
                probabilities_BC,
                for_people(parts, split.examples, result.logits_BC),
            )
    return scores, results


def say_left_out(parts: Parts, left_out: Split, step: int) -> None:
    """Write what a teacher says of the fold that it was not trained on, and beside its model which
    rows it was trained on."""
    result = evaluate(parts.task, parts.engine.model, parts.forward, left_out, parts.world, step)
    run = Path(parts.config.output_dir)

    def write() -> None:
        write_trained_rows(run / "model", parts.splits.train)
        write_predictions(
            run / "predictions" / "left_out.parquet",
            left_out.examples.ids_B2,
            left_out.examples.labels_B,
            result.logits_BC,
            None,
            for_people(parts, left_out.examples, result.logits_BC),
        )

    from_main(parts.world, write)
    metric = parts.task.metrics[0]
    parts.log.say(
        f"fold {parts.config.fold}, left out: {metric} {result.metrics[metric]:.4f} on "
        f"{len(left_out)} rows (predictions/left_out.parquet)"
    )


def best_of(task: TaskSpec, teachers: Sequence[dict[str, Any]]) -> int | None:
    """The teacher with the highest score, by its place; None where there are not several. A file of
    predictions may have none."""
    found = [of["metrics"].get(task.metrics[0], -math.inf) for of in teachers]
    return found.index(max(found)) if len(found) > 1 else None


def for_people(
    parts: Parts, examples: ExampleSet, logits_BC: np.ndarray
) -> dict[str, Sequence[Any]]:
    """Columns of the predictions that a person reads: the row (from 1) in its file, names of labels
    with their probabilities, and the texts."""
    task = parts.task
    columns: dict[str, Sequence[Any]] = {"row": (examples.rows_B + 1).tolist()}
    if task.task_kind.has_classes:
        names = dict(enumerate(task.labels))
        columns["gold_label"] = [names.get(int(label)) for label in examples.labels_B]
    columns |= task.task_kind.answers(task, logits_BC)
    if not parts.config.prediction_texts:
        return columns
    several = examples.choices > 1
    columns["text_a"] = examples.texts_a[:: examples.choices]
    for choice in range(examples.choices if examples.texts_b is not None else 0):
        name = f"text_b_{choice + 1}" if several else "text_b"
        columns[name] = (examples.texts_b or [])[choice :: examples.choices]
    return columns


def conclude(parts: Parts, state: TrainState, ensemble: Ensemble | None, show_table: bool) -> None:
    """Bring back the student that is kept, save it, score it once on the official splits, report.

    Every rank calls this; rank 0 writes. The run is finished when run_summary.json says so.
    """
    world, config = parts.world, parts.config
    run = Path(config.output_dir)
    parts.heartbeat.move("saving the student")
    save_student(parts, state)
    scores, results = score_splits(parts, state, ensemble)
    if parts.splits.left_out is not None:
        say_left_out(parts, parts.splits.left_out, state.step)
    closing = summary(parts, state)
    remarks = make_remarks(config, parts.task, parts.splits, scores, parts.teachers)
    if closing["best_metric"] is None:  # an average is scored when it is the engine's
        found = scores["selection"]
        closing["best_metric"] = found["student"][found.get("metric", parts.task.metrics[0])]
    shares: dict[str, dict[str, float]] = {}
    baseline = baseline_folder(config)
    if parts.source is not None and baseline is not None:
        try:
            shares = kept_shares(baseline, scores, parts.task.metrics[0])
        except UserError as error:  # it was read at the start, and a run must come to its end
            parts.log.say(f"what the student keeps of the gap is not told: {error}")
    for line in told_shares(shares):
        parts.log.say(line)
    some_gold = any("metric" not in of for of in scores.values())
    results["epoch"] = round(state.step / parts.batches.steps_per_epoch, 4)

    def write() -> None:
        write_json(run / "eval_results.json", results)
        record = {
            "task": parts.task.name,
            "metric": parts.task.metrics[0] if some_gold else name_of(parts.task.metrics[0]),
            "splits": scores,
            "selected_on": config.selection.split,
            "labels": list(parts.task.labels),
            "remarks": remarks,
        }
        write_json(run / "scores.json", record)
        if (
            shares and (run / FILE).is_file()
        ):  # of teachers that could not be weighed up there is none
            found = read_as(dict[str, Any], run / FILE)
            write_json(run / FILE, {**found, "splits": shares})
        # the report quotes the summary, and the run is finished only with its report
        write_json(run / "run_summary.json", {**closing, "finished": False})
        write_report(run)
        write_json(run / "run_summary.json", closing)
        drop_training_state(config)

    parts.heartbeat.move("writing the report")
    from_main(world, write)
    if show_table and world.is_main:
        print_table(*closing_table(parts, scores))
    for line in remarks:
        parts.log.say(f"WARNING: {line}")
    parts.log.say(
        f"{closing['steps']} steps, {closing['examples_per_second']} examples/s, "
        f"{closing['teacher_forwards']} teacher forwards, {closing['store_hits']} read from the "
        f"store; model, card and plots: {run / 'model'}"
    )
    if config.push_to_hub:
        line = from_main(world, lambda: push_at_end(run, config))
        parts.log.say(line)


def closing_table(
    parts: Parts, scores: dict[str, Any]
) -> tuple[str, list[str], list[list[object]]]:
    """(title, columns, rows) of what the console shows at the end."""
    metrics = parts.task.metrics
    agreeing = [split for split, of in scores.items() if "metric" in of]
    names = {split: list(of["student"]) for split, of in scores.items()}
    mark = " (selected on dev)" if parts.config.selection.split == "dev" else ""
    rows: list[list[object]] = []

    def figures(found: Iterable[dict[str, float] | None]) -> list[float | None]:
        pairs = zip(names.values(), found, strict=True)
        return [(of or {}).get(metric) for named, of in pairs for metric in named]

    splits = list(scores.values())
    for index, teacher in enumerate(parts.teachers):
        rows.append([teacher.name, *figures(of["teachers"][index]["metrics"] for of in splits)])
    if parts.teachers:
        rows.append(["ensemble", *figures(of["ensemble"] for of in splits)])
    rows.append(["student", *figures(of["student"] for of in splits)])
    told = len(metrics) > 1 or agreeing
    columns = [f"{name} {each}" if told else name for name, of in names.items() for each in of]
    what = ", ".join(metrics) if len(agreeing) < len(scores) else ""
    if agreeing:
        what += (", and " if what else "") + "agreement with the teachers"
    return f"{parts.task.name}: {what}{mark}", ["", *columns], rows
