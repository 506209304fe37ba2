"""A finished model put to use: scored on a task's splits, or asked to label the rows of a file.

MODEL is a run folder, a model folder or a hub id; its classes are aligned with the task's by name
(invariant 4).

Shapes: B examples, C classes (task order).
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.config.plugins import load_kept
from sead_dist.config.schema import DataConfig
from sead_dist.config.yaml_text import read_yaml
from sead_dist.data.confusion import confusion
from sead_dist.data.examples import ExampleSet, build_examples
from sead_dist.data.loading import Rows, read_rows
from sead_dist.data.order import Split
from sead_dist.data.splits import load_official
from sead_dist.data.task_files import TaskSpec, load_task
from sead_dist.data.tokens import describe_cuts
from sead_dist.errors import RunError, UserError
from sead_dist.models.inputs import ModelInputs, own_length, settle, student_inputs
from sead_dist.models.pretrained import (
    check_vocabulary,
    load_model_config,
    load_tokenizer,
    locate,
)
from sead_dist.models.sequence_classifier import (
    DTYPES,
    align_classes,
    check_problem_type,
    label_names,
    load_classifier,
)
from sead_dist.runs.kept_data import KEPT_DATA
from sead_dist.runs.setup import quiet_libraries
from sead_dist.runtime.console import table
from sead_dist.runtime.distributed import World, from_main, join_world, leave_world
from sead_dist.runtime.own_files import check_writable, is_stream, written_for_person
from sead_dist.runtime.run_log import write_json_for_person
from sead_dist.training.evaluation import EvalResult, Forward, evaluate, student_logits

WRITTEN = (".tsv", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Answerer:
    """A model in eval mode; `forward` gives its logits in the task's class order, float32."""

    model: PreTrainedModel
    inputs: ModelInputs
    forward: Forward


def run_config(name: str) -> Mapping[str, Any]:
    """The configuration of the run folder `name`; empty where it is no run folder."""
    path = Path(name) / "config.yaml"
    found = read_yaml(path) if path.is_file() else {}
    return found if isinstance(found, Mapping) else {}


def task_of(name: str, given: str | None) -> TaskSpec:
    """The task that was asked for, else the run folder's own. Raises UserError for neither."""
    load_kept(Path(name))
    own = Path(name) / "task.yaml"
    asked = given or (str(own) if own.is_file() else run_config(name).get("task"))
    if asked is None:
        raise UserError(
            f"{name} is no run folder that names its task; give --task NAME or FILE (in Python: "
            "task=...)"
        )
    return load_task(asked)


def load_answerer(
    name: str, task: TaskSpec, labels: str | None, device: torch.device, examples: ExampleSet
) -> Answerer:
    """The model `name` for `task`; labels: its class order, "a,b,c" or "task_order"; examples: some
    that it will be asked.

    A run's model computes in the run's precision, any other in fp32. Raises UserError for a model
    that cannot be loaded or whose classes are not the task's.
    """
    checkpoint = locate(name)
    config = load_model_config(checkpoint, trust_remote_code=False)
    order_C = class_order(name, config, task, labels)
    check_problem_type(task, name, config)
    tokenizer = load_tokenizer(checkpoint)
    check_vocabulary(checkpoint.name, tokenizer, config)
    model = load_classifier(checkpoint).to(device).eval()
    settle(tokenizer, model.config)
    length = own_length(tokenizer, config)
    inputs = student_inputs(model, tokenizer, length, name, examples)
    dtype = DTYPES[run_config(name).get("precision", "fp32")]

    def forward(inputs: dict[str, torch.Tensor], choices: int) -> torch.Tensor:
        on_device = {key: tensor.to(device) for key, tensor in inputs.items()}
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            logits: torch.Tensor = model(**on_device).logits
        logits = logits.float()
        if not bool(torch.isfinite(logits).all()):
            raise RunError(f"{name} gives NaN or infinite logits; check its weights")
        return logits.reshape(-1, choices) if choices > 1 else logits[:, order_C]

    return Answerer(model, inputs, forward)


def class_order(
    name: str, config: PretrainedConfig, task: TaskSpec, labels: str | None
) -> list[int]:
    """order_C: for each class of the task the column of the model's own logits. Raises UserError
    where the names do not say it."""
    said = (
        labels if labels in (None, "task_order") else [part.strip() for part in labels.split(",")]
    )
    mend = f"--labels {','.join(task.labels)} or --labels task_order"
    return align_classes(task, name, label_names(config), said, mend)


def data_of(name: str, task_name: str | None, data: str | None) -> DataConfig:
    """Where rows are looked for: the folder `data`; of a run on its own task, where the run found
    its rows; else the hub."""
    own = run_config(name).get("data") if data is None and task_name is None else None
    own = own or {"path": data}
    if (Path(name) / KEPT_DATA).is_dir():  # a run may have been moved, with what it was given
        own = {key: moved(value, Path(name)) for key, value in own.items()}
    return DataConfig(
        path=own.get("path"),
        train=own.get("train"),
        validation=own.get("validation"),
        revision=own.get("revision"),
        max_train_examples=None,
        validation_fraction=own.get("validation_fraction", 0.1),  # runs of before had two files
        skip_malformed=bool(own.get("skip_malformed")),
    )


def moved(value: Any, run: Path) -> Any:
    """A path among the data that a run keeps, as it is in the run folder of today."""
    if not isinstance(value, str) or Path(value).exists():
        return value
    if Path(value).name == KEPT_DATA:
        return str(run / KEPT_DATA)
    return str(run / KEPT_DATA / Path(value).name) if KEPT_DATA in Path(value).parts else value


def evaluate_model(
    name: str,
    task_name: str | None,
    data: str | None,
    labels: str | None,
    split: str | None,
    json_file: str | None,
) -> None:
    """Print the line of scores that model cards carry, for `split` or every official one.

    json_file: where to write the same, under the keys of a run's eval_results.json. Raises
    UserError for files or a model that do not fit the task.
    """
    world = join_world()
    quiet_libraries(world)
    if json_file is not None:
        from_main(world, partial(check_writable, "--json", Path(json_file)))
    task = task_of(name, task_name)
    source = data_of(name, task_name, data)
    sets = [load_official(task, source, key) for key in wanted_splits(task, split)]
    found = results_of(name, task, sets, labels, world, on_stderr)
    cards = cards_of(found)
    if world.is_main:
        for examples, result in zip(sets, found, strict=True):
            print(f"\n{name} on {task.name} {result.split}\n\n{as_table(cards[result.split])}")
            if task.task_kind.has_classes:
                by_class = confusion(task.labels, examples.labels_B, result.logits_BC)
                print("".join(f"\n{text}\n" for text in by_class.tables(drawn=False)), end="")
    if json_file is not None:
        results = {key: value for card in cards.values() for key, value in card.items()}
        from_main(world, lambda: write_scores(results, Path(json_file)))
    leave_world(world)


def wanted_splits(task: TaskSpec, split: str | None) -> list[str]:
    """The split that was asked for, else every official one to evaluate on."""
    return [split] if split is not None else [key for key in task.splits if key != "train"]


def score_sets(
    name: str,
    task: TaskSpec,
    sets: Sequence[ExampleSet],
    labels: str | None,
    world: World,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """The scores of the model `name` on each of these splits, by the split's name.

    The keys of the first one carry no name, as in a run's eval_results.json. say: hears of text
    rows that lost tokens. Raises UserError for a model that does not fit the task.
    """
    return cards_of(results_of(name, task, sets, labels, world, say))


def results_of(
    name: str,
    task: TaskSpec,
    sets: Sequence[ExampleSet],
    labels: str | None,
    world: World,
    say: Callable[[str], None],
) -> list[EvalResult]:
    """As `score_sets`: the result on each split."""
    answerer = load_answerer(name, task, labels, world.device, sets[0])
    found: list[EvalResult] = []
    for examples in sets:
        ready = answerer.inputs.split(examples)
        tell_cuts(ready, answerer.inputs.max_length, world, say)
        found.append(evaluate(task, answerer.model, answerer.forward, ready, world, step=0))
    return found


def cards_of(found: Sequence[EvalResult]) -> dict[str, dict[str, float]]:
    return {
        result.split: result.card("eval" if result is found[0] else f"eval_{result.split}")
        for result in found
    }


def on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def tell_cuts(split: Split, max_length: int, world: World, say: Callable[[str], None]) -> None:
    """Say how many text rows lost tokens."""
    line = describe_cuts({split.examples.split: split.tokens.cut_of()}, max_length)
    if line is not None and world.is_main:
        say(line)


def write_scores(results: Mapping[str, float], path: Path) -> None:
    try:
        write_json_for_person(path, results)
    except OSError as error:
        raise RunError(f"--json {path} cannot be written: {error.strerror}") from error


def as_table(card: Mapping[str, float]) -> str:
    """The card's line as Markdown: metrics first, then time, loss and size."""

    def place(key: str) -> int:
        ends = ("_runtime", "_samples_per_second", "_steps_per_second", "_loss", "_samples")
        return next((n for n, end in enumerate(ends, 1) if key.endswith(end)), 0)

    keys = sorted(card, key=place)
    return table(keys, [[card[key] for key in keys]])


def predict_file(
    name: str, file: Path, task_name: str | None, output: Path | None, labels: str | None
) -> None:
    """Write the rows of `file`, in their order, with what the model answers to each.

    Columns added: `predicted_label` and `probability_LABEL` for every label; for regression
    `predicted_score`. Where a row of the file holds several examples (official MultiRC, ReCoRD),
    one row is written for each: the number of its `row` (from 1) and its texts. The file needs no
    labels. output: new.tsv's is new.predicted.tsv where none is given. Raises UserError before any
    work, also where `output` exists.
    """
    if output is None:
        kind = file.suffix if file.suffix.lower() in WRITTEN else ".parquet"
        output = file.with_name(f"{file.stem}.predicted{kind}")
    check_output(output)
    world = join_world()
    quiet_libraries(world)
    task = task_of(name, task_name)
    rows = read_rows(file, task)
    examples = build_examples(task, rows, file.name, labelled=False)
    columns = input_columns(rows, examples)
    added = task.task_kind.answers(task, np.zeros((0, task.num_labels), np.float32))
    # nor what a prediction of another kind of task added before
    if clash := sorted({*added, "predicted_label", "predicted_score"} & set(columns)):
        raise UserError(f"{file} has a column {clash[0]!r} already; rename it")
    if output.suffix.lower() == ".tsv":
        check_no_tabs(columns, output)
    columns |= answer_examples(name, task, examples, labels, world, on_stderr)
    from_main(world, lambda: write_table(columns, output))
    leave_world(world)


def answer_examples(
    name: str,
    task: TaskSpec,
    examples: ExampleSet,
    labels: str | None,
    world: World,
    say: Callable[[str], None],
) -> dict[str, list[Any]]:
    """What the model `name` answers: the columns that a prediction adds, a value an example."""
    answerer = load_answerer(name, task, labels, world.device, examples)
    split = answerer.inputs.split(examples)
    tell_cuts(split, answerer.inputs.max_length, world, say)
    logits_BC = student_logits(answerer.model, answerer.forward, split, world)
    return task.task_kind.answers(task, logits_BC)


def check_output(output: Path) -> None:
    if output.suffix.lower() not in WRITTEN:
        raise UserError(
            f"--output {output}: unknown kind {output.suffix!r}; allowed: {', '.join(WRITTEN)}"
        )
    if output.exists() and not is_stream(output):
        raise UserError(f"--output {output} exists and is not written over; give a new name")
    check_writable("--output", output)


def input_columns(rows: Rows, examples: ExampleSet) -> dict[str, list[Any]]:
    """The file's own columns; of nested rows (several examples each) the row and the texts."""
    if np.array_equal(examples.rows_B, np.arange(len(rows))):
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}
    columns: dict[str, list[Any]] = {"row": (examples.rows_B + 1).tolist()}
    columns["text_a"] = examples.texts_a
    if examples.texts_b is not None:
        columns["text_b"] = examples.texts_b
    return columns


def check_no_tabs(columns: Mapping[str, Sequence[Any]], output: Path) -> None:
    """TSV is not quoted here, so it cannot hold every text."""
    for name, values in columns.items():
        for number, value in enumerate(values, 1):
            if any(mark in as_text(value) for mark in "\t\n\r"):
                raise UserError(
                    f"--output {output}: {name!r} of row {number} holds a tab or line break, which "
                    "TSV cannot; choose .csv, .jsonl or .parquet"
                )


def as_text(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def write_table(columns: Mapping[str, Sequence[Any]], output: Path) -> None:
    """Write the columns in the kind that the suffix names, aside and renamed; say so.

    Raises UserError for what Parquet cannot hold, RunError where the file cannot be written.
    """
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    try:
        with written_for_person(output) as aside:
            if output.suffix.lower() == ".parquet":
                pq.write_table(pa.table({k: pa.array(list(v)) for k, v in columns.items()}), aside)
            else:
                text = as_lines(rows, list(columns), output.suffix.lower())
                aside.write_text(text, encoding="utf-8", newline="")
    except pa.ArrowException as error:
        raise UserError(
            f"--output {output}: {str(error).splitlines()[0]}; choose .jsonl instead"
        ) from None
    except OSError as error:
        raise RunError(f"--output {output} cannot be written: {error.strerror}") from error
    print(f"{len(rows)} rows written to {output}")


def as_lines(rows: Rows, names: Sequence[str], kind: str) -> str:
    if kind == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
        return "".join(line + "\n" for line in lines)
    texts = [list(names), *([as_text(row[name]) for name in names] for row in rows)]
    if kind == ".tsv":
        return "".join("\t".join(fields) + "\n" for fields in texts)
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\n").writerows(texts)
    return written.getvalue()
