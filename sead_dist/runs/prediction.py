"""Load a finished model, and score it on a task's splits.

MODEL is a run directory, a model folder or a hub id. Its classes are aligned with the task's by
name (invariant 4).

Shapes: B examples, C classes (task order).
"""

import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.config.registered import load_kept
from sead_dist.config.schema import DataConfig
from sead_dist.config.sections import Labels
from sead_dist.config.yaml_text import encloses, parse_yaml, parts, read_run_config, to_flow
from sead_dist.data.examples import ExampleSet
from sead_dist.data.kinds import align_name
from sead_dist.data.metrics import confusion
from sead_dist.data.order import Split
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.data.tokens import describe_cuts
from sead_dist.errors import RunError, UserError
from sead_dist.models.inputs import ModelInputs, own_length, settle, student_inputs
from sead_dist.models.pretrained import (
    check_vocabulary,
    load_model_config,
    load_tokenizer,
    locate,
    reject_several,
)
from sead_dist.models.sequence_classifier import (
    DTYPES,
    align_classes,
    by_example,
    check_problem_type,
    is_generic,
    label_names,
    load_classifier,
)
from sead_dist.reporting.model_card import place_on_card
from sead_dist.runs.claim import KEPT_DATA
from sead_dist.runs.without_gold import load_to_score
from sead_dist.runtime.console import table
from sead_dist.runtime.distributed import World, from_main, in_world
from sead_dist.runtime.files import check_writable
from sead_dist.runtime.run_log import tell, write_json_for_person
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.training.evaluation import EvalResult, Forward, evaluate

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answerer:
    """A model in eval mode.

    forward: gives its logits in the task's class order, float32. folder: the folder of its files.
    order_C: for each class of the task, the column of the model's own logits.
    """

    model: PreTrainedModel
    inputs: ModelInputs
    forward: Forward
    folder: Path
    order_C: list[int]


def run_config(name: str) -> Mapping[str, Any]:
    """The configuration of the run directory `name`; empty where it is not a run directory."""
    return read_run_config(Path(name)) if (Path(name) / "config.yaml").is_file() else {}


def task_of(name: str, given: str | None) -> TaskSpec:
    """The task `given`, else the task of the run directory. Raises UserError for neither."""
    load_kept(Path(name))
    if given is None and not Path(name).exists():
        raise UserError(
            f"{name} does not exist; give a run directory or a model's folder, or for a model of "
            "the hub --task NAME or FILE (in Python: task=...)"
        )
    own = Path(name) / "task.yaml"
    asked = given or (str(own) if own.is_file() else run_config(name).get("task"))
    if asked is None:
        if Path(name).is_dir():
            reject_several(name)
        run = Path(name).absolute().parent
        if Path(name).name == "model" and (run / "config.yaml").is_file():
            raise UserError(
                f"{name} is the model of a run; give the run directory: {Path(name).parent}"
            )
        raise UserError(
            f"{name} is not a run directory that names its task; give --task NAME or FILE (in "
            "Python: task=...)"
        )
    return load_task(asked)


def load_answerer(
    name: str, task: TaskSpec, labels: Labels, device: torch.device, examples: ExampleSet
) -> Answerer:
    """Load the model `name` for `task`.

    labels: the model's class names in its order, or "task_order". examples: some of the examples to
    predict. A run's model computes in the run's precision, any other model in fp32. Raises
    UserError for a model that cannot be loaded, or whose classes are not the task's.
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
        return in_task_order(logits, choices, order_C)

    return Answerer(model, inputs, forward, checkpoint.folder, order_C)


def in_task_order(logits: torch.Tensor, choices: int, order_C: list[int]) -> torch.Tensor:
    """logits_BC in the task's class order, from the model's own logits of text rows.

    For a task of choices, the classes are the choices, in the order of the row.
    """
    logits_BC = by_example(logits, choices)
    return logits_BC if choices > 1 else logits_BC[:, order_C]


def read_class_order(text: str | None) -> Labels:
    """What `--labels` gives: `a,b,c` or `task_order`. A name with a comma stands in quotation
    marks, as in YAML."""
    if text is None:
        return None
    if text == "task_order":
        return "task_order"
    inside = text.strip()
    inside = inside[1:-1] if encloses(inside, "[", "--labels") else inside
    # a quotation mark that is not closed is a letter
    return [
        str(parse_yaml(part, "--labels")) if re.fullmatch(r"""(?s)(["']).*\1""", part) else part
        for part in parts(inside)
    ]


def labels_option(labels: Labels) -> str:
    """A class order as an option of the command line."""
    names = [labels] if isinstance(labels, str) else labels or []
    return f"--labels {shlex.quote(','.join(to_flow([name])[1:-1] for name in names))}"


def class_order(name: str, config: PretrainedConfig, task: TaskSpec, labels: Labels) -> list[int]:
    """order_C: for each class of the task, the column of the model's own logits.

    Logs a warning where `labels` differ from the order of the model's own class names. Raises
    UserError where neither gives the order.
    """
    fix = f"{labels_option(list(task.labels))} or --labels task_order"
    own, given = label_names(config), labels_option(labels)
    order_C = align_classes(task, name, own, labels, fix, given)
    found = [align_name(task, each) for each in own]
    says_it = labels is not None and not is_generic(own) and set(found) == set(order_C)
    if says_it and [found.index(index) for index in range(len(own))] != order_C:
        _log.warning(
            "%s is used, although %s names its classes %s",
            given,
            name,
            ", ".join(own),
        )
    return order_C


def data_of(name: str, task_name: str | None, data: str | None) -> DataConfig:
    """The place of the rows to score.

    It is the folder `data` where that is given, else the place of a run's own data where no other
    task is given, else the hub.
    """
    own = run_config(name).get("data") if data is None and task_name is None else None
    own = own or {"path": data}
    if (Path(name) / KEPT_DATA).is_dir():  # the run directory may have been moved, with its data
        own = {key: moved(value, Path(name)) for key, value in own.items()}
    return DataConfig(
        path=own.get("path"),
        train=own.get("train"),
        validation=own.get("validation"),
        revision=own.get("revision"),
        max_train_examples=None,
        validation_fraction=own.get("validation_fraction", 0.1),  # runs of old versions lack it
        skip_malformed=bool(own.get("skip_malformed")),
    )


def moved(value: Any, run: Path) -> Any:
    """A path in the run's data folder, as a path in the run directory's present place."""
    if not isinstance(value, str) or Path(value).exists():
        return value
    if Path(value).name == KEPT_DATA:
        return str(run / KEPT_DATA)
    return str(run / KEPT_DATA / Path(value).name) if KEPT_DATA in Path(value).parts else value


def evaluate_model(
    name: str,
    task_name: str | None,
    data: str | None,
    labels: Labels,
    split: str | None,
    json_file: str | None,
) -> None:
    """Log the scores of a model card, for `split` or for every official split.

    json_file: the file to write the same scores to, under the keys of a run's eval_results.json.
    Raises UserError for files or a model that do not fit the task.
    """
    with in_world() as world:
        quiet_libraries(world)
        if json_file is not None:
            from_main(world, partial(check_writable, "--json", Path(json_file)))
        task = task_of(name, task_name)
        source = data_of(name, task_name, data)
        world.set_activity("reading the rows")
        with data_option():
            sets = [load_to_score(name, task, source, key) for key in wanted_splits(task, split)]
        found = results_of(name, task, sets, labels, world)
        if world.is_main:
            show_results(name, task, sets, found)
        if json_file is not None:
            from_main(world, lambda: write_scores(as_one(found), Path(json_file)))


@contextmanager
def data_option() -> Iterator[None]:
    """Within the block, errors about the rows name the option --data, not keys of a run's data."""
    try:
        yield
    except UserError as error:
        line = str(error).partition("; or give the file: data.")[0]
        raise UserError(re.sub(r"(?<![\w/.-])data\.path(?![\w/])", "--data", line)) from error


def show_results(
    name: str, task: TaskSpec, sets: Sequence[ExampleSet], found: Sequence[EvalResult]
) -> None:
    """Log the scores of each split, and the scores of each class for a task with classes."""
    cards = cards_of(found)
    for examples, result in zip(sets, found, strict=True):
        tell(f"\n{name} on {task.name} {result.split}\n\n{as_table(cards[result.split])}")
        if task.task_kind.has_classes and examples.has_gold:
            by_class = confusion(task.labels, examples.labels_B, result.logits_BC)
            tell("\n".join(f"\n{text}" for text in by_class.tables(drawn=False)))


def wanted_splits(task: TaskSpec, split: str | None) -> list[str]:
    """The given split, else every official split to evaluate on."""
    return [split] if split is not None else [key for key in task.splits if key != "train"]


def results_of(
    name: str,
    task: TaskSpec,
    sets: Sequence[ExampleSet],
    labels: Labels,
    world: World,
) -> list[EvalResult]:
    """The result of the model `name` on each of these splits.

    Raises UserError for a model that does not fit the task.
    """
    world.set_activity("loading the model")
    answerer = load_answerer(name, task, labels, world.device, sets[0])
    found: list[EvalResult] = []
    for examples in sets:
        ready = answerer.inputs.split(examples)
        tell_cuts(ready, answerer.inputs.max_length, world)
        world.set_activity(f"scoring {examples.split}")
        found.append(evaluate(task, answerer.model, answerer.forward, ready, world, step=0))
    return found


def cards_of(found: Sequence[EvalResult]) -> dict[str, dict[str, float]]:
    """The scores by the split's name.

    The keys of the first split have no split name in them, as in a run's eval_results.json.
    """
    return {
        result.split: result.card("eval" if result is found[0] else f"eval_{result.split}")
        for result in found
    }


def as_one(found: Sequence[EvalResult]) -> dict[str, float]:
    """The scores of all splits under the keys of a run's eval_results.json."""
    return {key: value for card in cards_of(found).values() for key, value in card.items()}


def tell_cuts(split: Split, max_length: int, world: World) -> None:
    """Log how many text rows lost tokens, aside: standard output may hold rows or scores."""
    line = describe_cuts({split.examples.split: split.tokens.cut_of()}, max_length)
    if line is not None and world.is_main:
        tell(line, aside=True)


def write_scores(results: Mapping[str, float], path: Path) -> None:
    """Write scores as JSON. Raises RunError where the file cannot be written."""
    try:
        write_json_for_person(path, results)
    except OSError as error:
        raise RunError(f"--json {path} cannot be written: {error.strerror}") from error


def as_table(card: Mapping[str, float]) -> str:
    """The scores as a Markdown table: metrics first, then time, loss and size."""
    keys = sorted(card, key=place_on_card)
    return table(keys, [[card[key] for key in keys]])
