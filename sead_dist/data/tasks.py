"""The tasks: what a row holds, which labels there are, and how a prediction is scored. A person's
own task is read from a YAML file of the same fields.

One row per task; label order is the hub's. Shapes: B examples, C classes.
"""

import re
import string
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sead_dist.config.mistakes import as_yaml, expected_value, fits, place_of
from sead_dist.config.names import known_names
from sead_dist.config.sections import one_of
from sead_dist.config.yaml_text import read_yaml
from sead_dist.data.kinds import KINDS, TaskKind
from sead_dist.data.metrics import MetricInputs
from sead_dist.errors import UserError, expect

_SPLITS = {"train": ("train",), "validation": ("validation", "dev", "val")}


def columns_of(template: str) -> list[str]:
    """The columns that a template names in braces."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _lone_brace(raw: dict[str, Any]) -> str | None:
    """What is wrong with the braces of a template, as the end of an error message, or None."""
    for key in ("text_a", "text_b", "choices"):
        given = raw.get(key)
        for text in given if isinstance(given, list | tuple) else [given]:
            try:
                list(string.Formatter().parse(text if isinstance(text, str) else ""))
            except ValueError as error:
                return (
                    f"{key} has {text!r}, in which a brace stands alone ({error}); write {{COLUMN}}"
                )
    return None


@dataclass(frozen=True)
class TaskSpec:
    """One task. Templates name columns in braces: "{premise}". Only `name` and `text_a` are
    required in a YAML file, and `labels` or `score_range`."""

    # the text below each field is its description, which `sead-dist keys` prints
    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)

    name: str
    """what files and tables call the task"""
    kind: Annotated[str, one_of("kind of task")]
    """classification | regression | choice, or a plugin's; left out: regression where there is a
    score_range, else classification"""
    text_a: str
    """the first text, a template that names columns in braces: "{premise}\""""
    text_b: str | None = None
    """the second text of a pair, a template; null: there is one text"""
    choices: tuple[str, ...] = ()
    """kind choice: the second text of each choice, templates in the order of the labels"""
    labels: tuple[str, ...] = ()
    """the classes' names, in their order; [] for a regression"""
    aliases: dict[str, str] = field(default_factory=dict)
    """other names of labels, in files and in models: {NAME: LABEL}"""
    value_aliases: dict[str, str] = field(default_factory=dict)
    """the same, in files alone"""
    label_column: str = "label"
    """the column that holds the label"""
    score_range: tuple[float, float] | None = None
    """regression: the lowest and the highest score, [0, 5]"""
    metrics: tuple[str, ...] = ("accuracy",)
    """the scores; checkpoints are chosen by the first one; left out: the usual ones of the kind"""
    hub: tuple[str, str | None] | None = None
    """the data set on the hub and its configuration: [nyu-mll/glue, sst2]"""
    splits: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(_SPLITS))
    """each split and the names that its files may have; train first, then the one that is scored"""
    columns: tuple[str, ...] = ()
    """the columns of files without a header, in their order"""
    renames: dict[str, str] = field(default_factory=dict)
    """other names of columns, in some files: {NAME: COLUMN}"""
    reader: Literal["plain", "copa", "wsc", "multirc", "record"] = "plain"
    """how a row is laid out; all but plain are of SuperGLUE tasks"""
    fields: tuple[str, ...] = ()
    """the columns that are read as text; []: those that the templates name"""
    sentences: tuple[str, ...] = ()
    """rows that share a text of one of these columns are held out together; []: those of fields"""
    # not in the repr, which is part of the data's fingerprint: it changes no row
    symmetric: bool = field(default=False, repr=False)
    """true | false; true: a row with its two texts swapped has the same label"""

    def __post_init__(self) -> None:
        for key, text in (("text_a", self.text_a), ("text_b", self.text_b or "")):
            expect(key, text, str, 'a template that names columns in braces: "{sentence}"')
        expect("choices", self.choices, (list, tuple), "a list of templates")
        for key, columns in (("fields", self.fields), ("sentences", self.sentences)):
            expect(key, columns, (list, tuple), "a list of columns")
        for text in self.choices:
            expect("one of choices", text, str, 'a template that names columns in braces: "{one}"')
        if problem := _lone_brace(vars(self)):
            raise UserError(f"task {self.name!r}: {problem}")
        object.__setattr__(self, "fields", self.fields or self.templates)
        object.__setattr__(self, "sentences", self.sentences or self.fields)

    @property
    def templates(self) -> tuple[str, ...]:
        """The columns that the templates name."""
        texts = [self.text_a, self.text_b or "", *self.choices]
        return tuple(dict.fromkeys(name for text in texts for name in columns_of(text)))

    @property
    def task_kind(self) -> TaskKind:
        """What `kind` names."""
        return KINDS[self.kind]

    @property
    def num_labels(self) -> int:
        """C: the classes, or 1 for regression."""
        return len(self.labels) or 1

    @property
    def is_pair(self) -> bool:
        """Whether every text row has a second text."""
        return self.text_b is not None or bool(self.choices)


_GLUE, _SUPER = "nyu-mll/glue", "aps/super_glue"
_ENTAIL = ("entailment", "not_entailment")
_ENTAIL_ALIASES = {"non_entailment": "not_entailment", "no_entailment": "not_entailment"}
_NLI_ALIASES = {"entail": "entailment", "contradict": "contradiction"}
_BOOL = ("false", "true")
_BOOL_ALIASES = {"no": "false", "yes": "true"}
_PAIR = {"text_a": "{sentence1}", "text_b": "{sentence2}"}
_PAIR_COLUMNS = ("index", "sentence1", "sentence2", "label")

# fmt: off
_ROWS: tuple[dict[str, Any], ...] = (
    {"name": "cola", "text_a": "{sentence}", "labels": ("unacceptable", "acceptable"),
     "columns": ("source", "label", "mark", "sentence"), "metrics": ("matthews_correlation",),
     "hub": (_GLUE, "cola")},
    {"name": "sst2", "text_a": "{sentence}", "labels": ("negative", "positive"),
     "aliases": {"neg": "negative", "pos": "positive"}, "columns": ("sentence", "label"),
     "hub": (_GLUE, "sst2")},
    {"name": "mrpc", **_PAIR, "symmetric": True, "labels": ("not_equivalent", "equivalent"),
     "aliases": {"not_paraphrase": "not_equivalent", "paraphrase": "equivalent"},
     "columns": ("label", "id1", "id2", "sentence1", "sentence2"),
     "renames": {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
     "metrics": ("accuracy", "f1"), "hub": (_GLUE, "mrpc")},
    {"name": "stsb", **_PAIR, "symmetric": True, "kind": "regression", "score_range": (0.0, 5.0),
     "columns": ("index", "genre", "filename", "year", "old_index", "source1", "source2",
                 "sentence1", "sentence2", "label"),
     "renames": {"score": "label"}, "metrics": ("pearson", "spearmanr"), "hub": (_GLUE, "stsb")},
    {"name": "qqp", "text_a": "{question1}", "text_b": "{question2}", "symmetric": True,
     "labels": ("not_duplicate", "duplicate"),
     "aliases": {"not_paraphrase": "not_duplicate", "paraphrase": "duplicate"},
     "columns": ("id", "qid1", "qid2", "question1", "question2", "label"),
     "renames": {"is_duplicate": "label"}, "metrics": ("accuracy", "f1"), "hub": (_GLUE, "qqp")},
    {"name": "mnli", "text_a": "{premise}", "text_b": "{hypothesis}",
     "labels": ("entailment", "neutral", "contradiction"), "aliases": _NLI_ALIASES,
     "renames": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
     "hub": (_GLUE, "mnli"),
     "splits": {"train": ("train",),
                "validation_matched": ("validation_matched", "dev_matched", "val_matched"),
                "validation_mismatched": ("validation_mismatched", "dev_mismatched",
                                          "val_mismatched")}},
    {"name": "qnli", "text_a": "{question}", "text_b": "{sentence}", "labels": _ENTAIL,
     "aliases": _ENTAIL_ALIASES, "columns": ("index", "question", "sentence", "label"),
     "hub": (_GLUE, "qnli")},
    {"name": "rte", **_PAIR, "labels": _ENTAIL, "aliases": _ENTAIL_ALIASES,
     "columns": _PAIR_COLUMNS, "hub": (_GLUE, "rte")},
    {"name": "wnli", **_PAIR, "labels": ("not_entailment", "entailment"),
     "aliases": _ENTAIL_ALIASES, "columns": _PAIR_COLUMNS, "hub": (_GLUE, "wnli")},
    {"name": "boolq", "text_a": "{question}", "text_b": "{passage}", "labels": _BOOL,
     "aliases": _BOOL_ALIASES, "hub": (_SUPER, "boolq")},
    {"name": "cb", "text_a": "{premise}", "text_b": "{hypothesis}",
     "labels": ("entailment", "contradiction", "neutral"), "aliases": _NLI_ALIASES,
     "metrics": ("accuracy", "f1_macro"), "hub": (_SUPER, "cb")},
    {"name": "copa", "kind": "choice", "reader": "copa", "text_a": "{premise} {question}",
     "choices": ("{choice1}", "{choice2}"), "labels": ("choice1", "choice2"),
     "sentences": ("premise", "choice1", "choice2"), "hub": (_SUPER, "copa")},
    {"name": "wic", "text_a": "{word}: {sentence1}", "text_b": "{sentence2}", "labels": _BOOL,
     "aliases": _BOOL_ALIASES, "sentences": ("sentence1", "sentence2"), "hub": (_SUPER, "wic")},
    {"name": "wsc", "reader": "wsc", "text_a": "{marked}", "fields": ("text", "marked"),
     "labels": _BOOL, "aliases": _BOOL_ALIASES, "sentences": ("text",),
     "hub": (_SUPER, "wsc.fixed")},
    {"name": "multirc", "reader": "multirc", "text_a": "{paragraph}",
     "text_b": "{question} {answer}", "labels": _BOOL, "aliases": _BOOL_ALIASES,
     "sentences": ("paragraph",), "metrics": ("f1_a", "exact_match"), "hub": (_SUPER, "multirc")},
    {"name": "record", "reader": "record", "text_a": "{passage}", "text_b": "{query}",
     "labels": _BOOL, "aliases": _BOOL_ALIASES, "sentences": ("passage",),
     "metrics": ("exact_match", "f1"), "hub": (_SUPER, "record")},
    {"name": "superglue_rte", "text_a": "{premise}", "text_b": "{hypothesis}", "labels": _ENTAIL,
     "aliases": _ENTAIL_ALIASES, "hub": (_SUPER, "rte")},
)
# fmt: on
TASKS: dict[str, TaskSpec] = {
    row["name"]: TaskSpec(**{"kind": "classification", **row}) for row in _ROWS
}


def compute_metrics(
    task: TaskSpec, logits_BC: np.ndarray, examples: MetricInputs
) -> dict[str, float]:
    """The official metrics of `logits_BC` [B, C]; ValueError where a row has no label."""
    return task.task_kind.compute(task.metrics, logits_BC, examples)


def constant_score(task: TaskSpec, examples: MetricInputs) -> float:
    """The majority baseline: what the best constant answer scores under `task.metrics[0]` (0 for
    correlations and MCC)."""
    return task.task_kind.constant(task.metrics[0], task.num_labels, examples)


def load_task(name_or_yaml: str | Path) -> TaskSpec:
    """The named task, or a person's own from a YAML file; UserError for anything else."""
    name = str(name_or_yaml)
    if name.endswith((".yaml", ".yml")):
        return read_task_file(Path(name))
    if name in TASKS:
        return TASKS[name]
    if Path(f"{name}.yaml").is_file():
        raise UserError(f"unknown task {name!r}; did you mean the file {name}.yaml?")
    raise UserError(f"unknown task {name!r}{known_names(name, TASKS)}; or give a .yaml file")


def read_task_file(path: Path) -> TaskSpec:
    """The task that a YAML file describes; UserError names the file, the key and the fix."""
    raw = read_yaml(path, f"task file {path}")
    if not isinstance(raw, dict):
        raise UserError(f"task file {path} holds {raw!r}; expected keys and values")
    return task_from(raw, f"task file {path}")


def task_from(raw: dict[str, Any], where: str) -> TaskSpec:
    """The task that these keys describe; UserError begins with `where` and names key and fix."""
    known = [f.name for f in fields(TaskSpec)]
    for key, value in raw.items():
        if key not in known:
            longer = [one for one in known if one.startswith(f"{key}_")]  # label: label_column
            hint = known_names(longer[0] if longer else str(key), known)
            raise UserError(f"{where}: unknown key {key!r}{hint}")
        if isinstance(value, set | frozenset):
            raise UserError(f"{where}: {key} is {value}, which has no order; give a list")
    if problem := _lone_brace(raw):
        raise UserError(f"{where}: {problem}")
    raw = _defaults(raw)
    for f in fields(TaskSpec):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in raw:
            raise UserError(f"{where}: key {f.name!r} is missing; add it")
    try:
        task = _validated(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_mistake(error, raw)}") from error
    if problem := find_problem(task):
        raise UserError(f"{where}: {problem}")
    return task


@cache
def _checker() -> TypeAdapter[TaskSpec]:
    # made once: it takes longer than a check
    return TypeAdapter(TaskSpec)


def _validated(raw: dict[str, Any]) -> TaskSpec:
    return _checker().validate_python(raw)


def _mistake(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first value of another type than its key takes, as the end of an error message."""
    first = error.errors()[0]
    place = place_of(first)
    key = ".".join(map(str, place))
    what = f"{key} is {as_yaml(first['input'])}: " if key else ""

    def check(keys: dict[str, Any]) -> None:
        for problem in _problems(_validated(keys)):
            if re.search(rf"\b{place[0]}\b", problem):
                raise UserError(problem)

    said = expected_value(first, lambda value: fits(check, raw, place, value))
    see = f"; see `sead-dist keys {key}`" if said == "expected a list" else ""
    return f"{what}{said}{see}"


def _defaults(raw: dict[str, Any]) -> dict[str, Any]:
    regression = raw.get("score_range") is not None
    raw = {"kind": "regression" if regression else "classification", **raw}
    if kind := KINDS.get(str(raw["kind"])):
        raw.setdefault("metrics", list(kind.default_metrics))
    if isinstance(raw.get("value_aliases"), dict):  # YAML reads a bare 4 as a number
        raw["value_aliases"] = {str(value): label for value, label in raw["value_aliases"].items()}
    return raw


FILE_NAME = "use at most 100 letters, digits, _, - and ., not dots alone (it names files)"


def names_file(name: str) -> bool:
    """Whether files can be called by this name, in the run's own folder."""
    return (
        re.fullmatch(r"[\w.-]+", name) is not None
        and name.strip(".") != ""
        and len(name.encode()) <= 100
    )


def find_problem(task: TaskSpec) -> str | None:
    """What in `task` contradicts the rest, as the end of an error message, or None."""
    return next(_problems(task), None)


def _problems(task: TaskSpec) -> Iterator[str]:
    """What is wrong with each part of `task`, in the order of the checks."""
    parts = (_unlisted_column, _name_problem, _template_problem, _scoring_problem)
    for find in (*parts, task.task_kind.find_problem):
        if problem := find(task):
            yield problem


def _unlisted_column(task: TaskSpec) -> str | None:
    for key, columns in (
        ("text_a, text_b or choices", task.templates),
        ("sentences", task.sentences),
    ):
        if missing := set(columns) - set(task.fields):
            return f"{key} names {sorted(missing)}, which fields does not list; add them there"
    return None


def _name_problem(task: TaskSpec) -> str | None:
    """What is wrong with the names that files are called by."""
    if not names_file(task.name):
        return f"name is {task.name!r}; {FILE_NAME}"
    for split in task.splits:
        if not names_file(split) or split == "selection":
            return f"splits has {split!r}; {FILE_NAME}, and not selection, which is held out"
    return None


def _template_problem(task: TaskSpec) -> str | None:
    """What is wrong with the templates of the texts."""
    for text in (task.text_a, task.text_b or "", *task.choices):
        for _, name, spec, conversion in string.Formatter().parse(text):
            if name is not None and (not name or spec or conversion):
                return f"the template {text!r} has braces with more or less than a column's name"
    if task.symmetric and task.text_b is None:
        return "symmetric is for tasks with two texts, and text_b is missing; leave symmetric out"
    if not task.templates:
        return f"text_a is {task.text_a!r}; it must name a column in braces, such as {{text}}"
    return None


def _scoring_problem(task: TaskSpec) -> str | None:
    """What is wrong with the splits and the metrics on them."""
    if "train" not in task.splits or len(task.splits) < 2:
        return f"splits has {list(task.splits)}; it needs train and a split to evaluate on"
    allowed = task.task_kind.metric_names(task.reader)
    if not task.metrics or set(task.metrics) - set(allowed):
        return f"metrics is {list(task.metrics)}; allowed here: {', '.join(allowed)}"
    return None
