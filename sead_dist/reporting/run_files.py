"""The files of a run directory that a report is made of, read once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # of Python 3.12, for pydantic

from sead_dist.config.names import FILES, renamed_record
from sead_dist.config.yaml_text import read_run_config
from sead_dist.errors import UserError
from sead_dist.runtime.redact import redact
from sead_dist.runtime.run_log import read_as

# the verdict where it is not known whether there is anything to learn
CANNOT_BE_TOLD = "cannot be told"


class TeacherScore(TypedDict):
    """Of one teacher on one split."""

    name: str
    metrics: dict[str, float | None]


@with_config(ConfigDict(extra="allow"))
class SplitScores(TypedDict):
    """What was scored on one split."""

    student: dict[str, float | None]
    ensemble: NotRequired[dict[str, float | None] | None]
    teachers: NotRequired[list[TeacherScore] | None]


@with_config(ConfigDict(extra="allow"))
class Scores(TypedDict):
    """The file scores.json."""

    metric: str
    splits: dict[str, SplitScores]


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run directory hold, read once; the fields have the files' names."""

    config: Mapping[str, Any]
    scores: Mapping[str, Any]
    eval_results: Mapping[str, Any]
    validations: Sequence[Mapping[str, Any]] = ()
    teacher_manifest: Sequence[Mapping[str, Any]] = ()
    run_summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    onnx: Mapping[str, Any] = field(default_factory=dict)  # onnx/export.json
    learnable: Mapping[str, Any] = field(default_factory=dict)
    task_file: Path | None = None  # task.yaml, of a person's own task

    @property
    def metric(self) -> str:
        return str(self.scores["metric"])

    def metric_of(self, split: str) -> str:
        """The first metric of a split: where it has no gold labels, agreement with the teachers."""
        return str(self.scores["splits"].get(split, {}).get("metric", self.metric))

    def by_teachers(self, split: str) -> bool:
        """Whether scores on a split measure agreement with the teachers."""
        return "metric" in self.scores["splits"].get(split, {})

    @property
    def evaluation_splits(self) -> list[str]:
        """The official splits; the selection split alone where there is no other."""
        splits = list(self.scores["splits"])
        return [split for split in splits if split != "selection"] or splits

    @property
    def mark(self) -> str:
        """The words after every figure of a run that chose its checkpoint on dev."""
        return " (selected on dev)" if self.scores.get("selected_on") == "dev" else ""

    def split_rows(self, split: str) -> list[tuple[str, str, Mapping[str, float]]]:
        """The (role, name, metrics) of student, ensemble and teachers, where it has scores."""
        scores = self.scores["splits"][split]
        rows = [("student", "student", scores["student"])]
        if scores.get("ensemble"):
            rows.append(("ensemble", "ensemble", scores["ensemble"]))
        for teacher in scores.get("teachers") or ():
            if teacher["metrics"]:  # a file may have no predictions of a split
                rows.append(("teacher", redact(teacher["name"]), teacher["metrics"]))
        return rows


def read_run(run: Path) -> RunFiles:
    """Read the files of a run directory that a report needs.

    Raises:
        UserError: config.yaml, scores.json or eval_results.json is missing, or a file is broken.
    """
    if not (run / "config.yaml").exists():
        raise UserError(f"{run / 'config.yaml'} is missing; give a run directory")
    config = read_run_config(run)
    if not config:
        raise UserError(f"{run / 'config.yaml'} holds no keys; restore it, or start a new run")

    def optional(name: str, kind: Any, default: Any) -> Any:
        names = [name, *(old for old, new in FILES.items() if new == name)]
        path = next((run / one for one in names if (run / one).exists()), None)
        return default if path is None else read_as(kind | None, path) or default

    keys = dict[str, Any]
    return RunFiles(
        config=config,
        scores=read_as(Scores, run / "scores.json"),
        eval_results=read_as(keys, run / "eval_results.json"),
        validations=optional("teacher_validation.json", list[keys], []),
        teacher_manifest=optional("teacher_manifest.json", list[keys], []),
        run_summary=renamed_record(optional("run_summary.json", keys, {})),
        environment=optional("environment.json", keys, {}),
        onnx=optional("onnx/export.json", keys, {}),
        learnable=optional("learnable.json", keys, {}),
        task_file=run / "task.yaml" if (run / "task.yaml").is_file() else None,
    )


def verdict_words(verdict: str, finetuned: float | None) -> str:
    """The verdict of learnable.json as a person reads it, with the reason where it is open.

    finetuned: the score of the fine-tuned student; None without one.
    """
    if verdict != CANNOT_BE_TOLD:
        return verdict
    reason = "without a fine-tuned student" if finetuned is None else "from so few rows"
    return f"{verdict} {reason}"


def onnx_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """(columns, rows) of the table of an export, from its export.json. There is a row for each
    model and split. A model's size and times stand in its first row only."""
    metric, sizes = record["metric"], list(record["latency_tokens"])
    rows: list[list[object]] = []
    for model in record["models"]:
        times = [f"{model['latency_ms'][size]:.1f}" for size in sizes]
        mib: str | None = f"{model['bytes'] / 2**20:.1f}"
        for split, metrics in model["metrics"].items():
            off = (model["largest_difference"] or {}).get(split)
            off = None if off is None else f"{off:.1e}"
            agreed = (model["agreement"] or {}).get(split)
            rows.append([model["name"], split, metrics[metric], off, agreed, mib, *times])
            mib, times = "", [""] * len(sizes)
    columns = ["", "split", metric, "largest logit difference", "same prediction", "MiB"]
    tokens = record["latency_tokens"]
    return [*columns, *(f"ms, {size} x {tokens[size]} tokens" for size in sizes)], rows
