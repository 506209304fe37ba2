"""The tasks: what a row holds, which labels there are, how a prediction is scored.

One row per task; label order is the hub's. Shapes: B examples, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sead_dist.data.kinds import align_name, file_values, normalise_label, number_name
from sead_dist.data.metrics import Answer, MetricInputs
from sead_dist.data.tasks import TaskSpec, nearest, read_task_file
from sead_dist.errors import UserError

__all__ = [
    "TASKS",
    "Answer",
    "MetricInputs",
    "TaskSpec",
    "align_name",
    "compute_metrics",
    "constant_score",
    "file_values",
    "load_task",
    "normalise_label",
    "number_name",
]

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
    """The best constant prediction under `task.metrics[0]` (0 for correlations and MCC)."""
    return task.task_kind.baseline(task.metrics[0], task.num_labels, examples)


def load_task(name_or_yaml: str | Path) -> TaskSpec:
    """The named task, or a person's own from a YAML file; UserError for anything else."""
    name = str(name_or_yaml)
    if name.endswith((".yaml", ".yml")):
        return read_task_file(Path(name))
    if name in TASKS:
        return TASKS[name]
    raise UserError(f"unknown task {name!r}{nearest(name, TASKS)}; or the path of a .yaml file")
