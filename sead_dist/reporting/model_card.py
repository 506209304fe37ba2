"""The model card of a run, made of its files: a README.md with the metadata for the hub.

Nothing of this machine reaches the card: names, paths and configuration pass through `redact`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from sead_dist.config.load import DEFAULT_METHOD
from sead_dist.config.yaml_text import to_yaml
from sead_dist.data.metrics import Confusion
from sead_dist.errors import UserError
from sead_dist.reporting.run_files import RunFiles, onnx_rows
from sead_dist.runtime.console import counted, table
from sead_dist.runtime.redact import redact

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from sead_dist.data.tasks import TaskSpec

HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:@[\w./-]+)?")
HUB_METRICS = {"pearson": "pearsonr", "f1_macro": "f1", "f1_a": "f1"}  # ours: the hub's
ENDS = ("runtime", "samples_per_second", "steps_per_second", "loss", "samples")
COST = {
    "steps": "optimiser steps",
    "train_rows": "training rows",
    "unlabelled_rows": "unlabelled rows of text among them",
    "copy_rows": "changed copies of rows among them",
    "examples_per_second": "examples per second",
    "teacher_forwards": "teacher forwards (unique teacher-example pairs)",
    "store_hits": "teacher predictions read from the store",
    "teacher_wait_s": "time spent waiting for teachers (s)",
    "padding_waste": "share of tokens that were padding",
    "peak_memory_bytes": "peak memory of each rank (MiB)",
    "world_size": "ranks",
    "placement": "placement of the teachers",
}


def card_text(
    files: RunFiles,
    plots: Sequence[str],
    errors: Mapping[str, float],
    found: Confusion | None = None,
) -> str:
    """Compose the model card.

    Args:
        files: the run.
        plots: file names of the pictures in plots/.
        errors: expected calibration error by "student" and "ensemble"; empty for regression.
        found: gold labels against the student's predictions on the first evaluation split, or None.
    """
    spec = _task_spec(files)
    worded = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    split = files.evaluation_splits[0]
    text = fill_template(
        "card.md.j2",
        metadata=_metadata(files, spec),
        name=model_name(files),
        by=method_name(files),
        task=_task(files),
        student=_student(files),
        teachers=files.teacher_manifest,
        selected_on_dev=bool(files.mark),
        results=_result_tables(files),
        evaluations=_evaluation_tables(files),
        classes=found.tables(drawn=True) if found is not None else [],
        calibration=f"Expected calibration error on {split}{files.mark}, 10 bins: {worded}."
        if errors
        else "",
        method=_method(files),
        teacher_table=_teacher_table(files),
        unvalidated=files.by_teachers("selection"),
        learnable=_learnable(files),
        cost=_cost(files.run_summary),
        onnx=files.onnx,
        onnx_table=table(*onnx_rows(files.onnx)) if files.onnx else "",
        pair=spec is not None and spec.is_pair,
        limits=_limits(files, spec),
        hyperparameters=_hyperparameters(files),
        versions=list(_versions(files.environment)),
        plots=plots,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def fill_template(file: str, /, **values: object) -> str:
    """A template of reporting/templates, filled. In HTML the values are escaped."""
    from jinja2 import Environment, StrictUndefined

    text = resources.files("sead_dist.reporting.templates").joinpath(file).read_text("utf-8")
    jinja = Environment(
        autoescape=file.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return jinja.from_string(text).render(**values)


def _task(files: RunFiles) -> str:
    """The task's name, from scores.json: the configuration may name a file with another name."""
    named = files.scores.get("task") or PurePosixPath(str(files.config["task"])).stem
    return str(redact(named))


def _task_spec(files: RunFiles) -> "TaskSpec | None":
    """The task of this run: a built-in one, or that of the file that the run keeps. None where the
    file needs a plugin that is not loaded."""
    from sead_dist.data.tasks import TASKS, load_task

    if files.task_file is None:
        return TASKS.get(_task(files))
    with suppress(UserError):
        return load_task(str(files.task_file))
    return None


def _student(files: RunFiles) -> str:
    """What the student started from: a checkpoint, or the name of a shape."""
    student = redact(files.config.get("student"))
    if isinstance(student, Mapping):
        student = student.get("path") or str(student.get("shape")).removesuffix(".yaml")
    return str(student or "random weights")


def _base_model(files: RunFiles) -> str | None:
    """The hub id that the student started from.

    It is `base_model` of run_summary.json where that is given. Else a student's path of the form
    owner/name is taken for a hub id.
    """
    if "base_model" in files.run_summary:
        known = files.run_summary["base_model"]
        return None if known is None else str(redact(known))
    student = files.config.get("student")
    path = student.get("path") if isinstance(student, Mapping) else student
    match = HUB_ID.fullmatch(path) if isinstance(path, str) else None
    return match["id"] if match else None


def model_name(files: RunFiles) -> str:
    """What the card calls the model."""
    student = _student(files).split("@")[0].rsplit("/", 1)[-1].replace(" ", "-")
    return f"{method_name(files)}-{student}-{_task(files)}"


def method_name(files: RunFiles) -> str:
    """The method that the run named, else its ensemble. It is "finetune" where the run had no
    teachers, and "single" where the default method had one teacher."""
    config = redact(files.config)
    if not files.teacher_manifest:
        return "finetune"
    method = config.get("method")
    if method == DEFAULT_METHOD and len(files.teacher_manifest) == 1:
        return "single"
    return PurePosixPath(str(method)).stem if method else str(config.get("ensemble"))


def _metadata(files: RunFiles, spec: "TaskSpec | None") -> str:
    from huggingface_hub import ModelCardData

    hub = spec.hub if spec else None
    results = list(_model_index(files, hub))
    task = _task(files)
    tags = ["knowledge-distillation", method_name(files)] if files.teacher_manifest else []
    card = files.config.get("card") or {}
    data = ModelCardData(
        language=card.get("language"),
        license=card.get("license"),
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=[*tags, task],
        datasets=[hub[0]] if hub else None,
        metrics=sorted({result.metric_type for result in results}),
        base_model=_base_model(files),
        model_name=model_name(files),
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _model_index(files: RunFiles, hub: tuple[str, str | None] | None) -> Iterable["EvalResult"]:
    from huggingface_hub import EvalResult

    for split in files.evaluation_splits:
        if files.by_teachers(split):
            continue  # the hub's readers would take it for a score
        for name, value in files.scores["splits"][split]["student"].items():
            if value is None or not math.isfinite(value):
                continue  # the hub reads JSON, which has no NaN
            yield EvalResult(
                task_type="text-classification",
                task_name="Text Classification",
                dataset_type=hub[0] if hub else _task(files),
                dataset_name=_task(files),
                dataset_config=hub[1] if hub else None,
                dataset_split=split,
                metric_type=HUB_METRICS.get(name, name),
                metric_name=f"{name}{files.mark}",
                metric_value=value,
            )


def _result_tables(files: RunFiles) -> Iterable[tuple[str, str]]:
    splits = files.evaluation_splits
    if "selection" in files.scores["splits"] and "selection" not in splits:
        splits = [*splits, "selection"]
    for split in splits:
        rows = files.split_rows(split)
        names = list(rows[0][2])
        cells = [(name, *(metrics.get(n) for n in names)) for _, name, metrics in rows]
        role = ""
        if split == "selection":
            where = "on dev" if files.mark else "held out of train"
            kept = files.run_summary.get("chosen", {}).get("final_checkpoint", "best")
            role = (
                f" ({where}; the checkpoint was chosen on it)" if kept == "best" else f" ({where})"
            )
        if files.by_teachers(split):
            role += ": agreement with the teachers, because there are no gold labels"
        yield f"{split}{role}", table(["model", *(f"{n}{files.mark}" for n in names)], cells)


def _evaluation_tables(files: RunFiles) -> Iterable[tuple[str, str]]:
    """One table in the seed card's form per evaluation split.

    The keys of the first split are `eval_accuracy`, those of a further one `eval_SPLIT_accuracy`.
    """
    results, splits = files.eval_results, files.evaluation_splits
    keys = {split: [k for k in results if k.startswith(f"eval_{split}_")] for split in splits}
    further = {key for named in keys.values() for key in named}
    keys[splits[0]] = keys[splits[0]] or [k for k in results if k not in further and k != "epoch"]
    for split, named in keys.items():
        if named:
            named.sort(key=place_on_card)
            header = [
                k if place_on_card(k) and not k.endswith("_loss") else k + files.mark for k in named
            ]
            yield split, table(header, [[results[key] for key in named]])


def place_on_card(key: str) -> int:
    """The order of a score's keys on a card: 0 for a metric, then time, loss and size."""
    return next((n for n, end in enumerate(ENDS, 1) if key.endswith(f"_{end}")), 0)


def _method(files: RunFiles) -> Iterable[tuple[str, object]]:
    config = redact(files.config)
    ensemble = config.get("ensemble") or {}
    method = ensemble.get("method") if isinstance(ensemble, Mapping) else ensemble
    for name, value in (
        ("ensemble", method),
        ("temperature", config.get("temperature")),
        ("alpha (weight of the soft targets beside the labels)", config.get("alpha")),
    ):
        if value is not None:
            yield name, value


def _teacher_table(files: RunFiles) -> str:
    validations = {validation["name"]: validation for validation in files.validations}
    drifted = any(validation.get("drift") for validation in files.validations)
    rows = []
    for teacher in files.teacher_manifest:
        validation = validations.get(teacher["name"], {})
        source, revision = redact(str(teacher.get("path", ""))), teacher.get("revision")
        row = [
            redact(teacher["name"]),
            f"{source}@{str(revision)[:12]}" if revision else source,
            teacher.get("parameters"),
            f"`{str(teacher.get('weights_sha256'))[:16]}`",
            validation.get("score"),
            validation.get("constant_score"),
            redact(teacher.get("placement")),
        ]
        rows.append(row + _drift_cells(teacher, validation.get("drift")) if drifted else row)
    scored = f"validation, {files.validations[0]['metric']}" if files.validations else "validation"
    columns = ["teacher", "from", "parameters", "weights", scored, "majority baseline", "placement"]
    if drifted:
        columns += ["computed in", "largest logit difference to fp32", "predictions changed"]
    return table(columns, rows)


def _drift_cells(teacher: Mapping[str, Any], drift: Mapping[str, Any] | None) -> list[object]:
    numbers = teacher.get("dtype")
    if teacher.get("weights"):
        numbers = f"{numbers}, {teacher['weights']} weights"
    if not drift:
        return [numbers, None, None]
    changed = None if drift["changed"] is None else f"{drift['changed']} of {drift['rows']}"
    return [numbers, f"{drift['largest']:.4g}", changed]


def _cost(summary: Mapping[str, Any]) -> str:
    rows = []
    for key, words in COST.items():
        value = redact(summary.get(key))
        if key == "peak_memory_bytes" and value is not None:
            value = [value] if isinstance(value, (int, float)) else value
            value = ", ".join(f"{(size or 0) / 2**20:.0f}" for size in value)
        if value is not None:
            rows.append((words, value))
    return table(("what", "value"), rows)


def _limits(files: RunFiles, spec: "TaskSpec | None") -> Iterable[str]:
    from sead_dist.data.significance import sampling_deviation  # SciPy takes long

    yield f"It was trained and scored on {_task(files)} only. Other texts were not tried."
    yield "The scores are those of one run with one seed."
    rows = files.eval_results.get("eval_samples")
    accuracy = files.eval_results.get("eval_accuracy")
    # the examples of one row of MultiRC or ReCoRD are right or wrong together
    independent = spec is None or spec.reader not in ("multirc", "record")
    if rows and accuracy is not None and 0 < accuracy < 1 and independent:
        points = 100 * sampling_deviation(accuracy, rows)
        yield f"On {rows} rows, one standard deviation of sampling is {points:.1f} points."
    if spec is not None and spec.task_kind.card_note is not None:
        yield spec.task_kind.card_note
    yield from (str(redact(line)) for line in files.scores.get("remarks") or ())
    for validation in files.validations:
        name = redact(validation["name"])
        if not validation.get("passed", True):
            yield f"Teacher {name} was no better than the majority baseline."
        if validation["score"] is None:
            rows = counted(validation["rows"], "selection row")
            yield f"Teacher {name} was not validated: it has predictions of {rows}."
        if validation.get("better_order"):
            order = ", ".join(validation["better_order"])
            yield f"Teacher {name} would score better with its classes in the order {order}."
        if cut := validation.get("truncated_rows"):
            rows = counted(cut, "selection row")
            yield f"Teacher {name} cuts {rows} at its maximum length."
    found = max(
        (validation.get("dev_texts_in_training") or 0 for validation in files.validations),
        default=0,
    )
    if found:
        texts = counted(found, "dev text")
        yield f"The training rows or the unlabelled text also contain {texts}."


def _learnable(files: RunFiles) -> str:
    """Whether the ensemble is better than the baseline, and the share of the gap that is kept."""
    found = files.learnable
    if not found:
        return ""
    rows: list[tuple[object, ...]] = [("majority baseline", found["majority"])]
    if found["finetuned"] is not None:
        rows.append(("fine-tuned student", found["finetuned"]))
    rows.append((f"best teacher ({redact(found['best_name'])})", found["best_teacher"]))
    rows.append(("ensemble", found["ensemble"]))
    low, high = found["interval"]
    over = "the majority baseline" if found["finetuned"] is None else "the fine-tuned student"
    text = table([f"{found['metric']} on {found['rows']} selection rows", "score"], rows)
    text += (
        f"\n\nIs there anything to learn: **{found['verdict']}**. The ensemble's gap over "
        f"{over} is {found['gap']:+.4f} ({low:+.4f} to {high:+.4f}, 95%, over rows alone)."
    )
    # a run of an earlier version has none
    if second := found.get("second"):
        low, high = second["interval"]
        weights = [f"{redact(name)} {of:.3f}" for name, of in second["weights"].items()]
        text += (
            f" On {second['rows']} rows the ensemble scores {second['equal']:.4f} with equal "
            f"weights and {second['fitted']:.4f} with fitted weights (95% interval of the "
            f"difference: {low:+.4f} to {high:+.4f}). For this score each fifth of the rows has "
            f"weights fitted to the other four. Weights fitted to all rows: {', '.join(weights)}."
        )
    for split, of in (found.get("splits") or {}).items():
        if "share" in of and split != "selection":
            text += (
                f" On {split} the student keeps {of['share']:.0%} of the gap between fine-tuned "
                f"student ({of['finetuned']:.4f}) and ensemble ({of['ensemble']:.4f})."
            )
    return text


def _hyperparameters(files: RunFiles) -> str:
    """The configuration, with what the run took for keys that were left to it."""
    keys = {**files.config, **files.run_summary.get("chosen", {})}
    return to_yaml(redact(keys)).strip()


def _versions(environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if "python" in environment:
        yield "python", environment["python"]
    yield from (environment.get("versions") or {}).items()
