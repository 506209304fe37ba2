"""`sead-dist reproduce NAME` trains a published checkpoint of SEAD again, with its teachers. It
then shows the scores obtained beside the published ones.

All checkpoints share one template (configs/reproduce.yaml). Each one is a row of `CHECKPOINTS`.
OUTPUT/teachers is made as by `finetune`, OUTPUT/student as by `distill`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sead_dist.config.load import config_folder, load_config, names_shape, read_layers, resolve
from sead_dist.config.names import known_names
from sead_dist.config.schema import RunConfig, TeacherConfig
from sead_dist.data.splits import load_official
from sead_dist.data.tasks import load_task
from sead_dist.errors import UserError
from sead_dist.models.pretrained import locate
from sead_dist.reporting.hub import check_push
from sead_dist.reporting.run_files import read_run
from sead_dist.runs.checks import reject_unused_text, teacher_layers
from sead_dist.runs.distillation import distill, finetune
from sead_dist.runtime.console import print_table, table
from sead_dist.runtime.distributed import World, from_main
from sead_dist.runtime.files import written_aside
from sead_dist.runtime.redact import redact
from sead_dist.runtime.run_log import is_finished, write_json
from sead_dist.sweep.published import NOTE, WIDTHS, Figure, Width, sead_figures


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One published checkpoint: its task, its student's start, and the epochs of training."""

    name: str
    task: str
    width: Width
    student: str
    epochs: int

    def figures(self) -> list[Figure]:
        return sead_figures(self.task, self.width)


# small training sets get more epochs
EPOCHS = {"sst2": 3, "mrpc": 10, "qqp": 3, "mnli": 3, "qnli": 3, "rte": 10, "stsb": 10, "wnli": 10}
CHECKPOINTS = {
    f"{task}-h{width}": PublishedCheckpoint(
        f"{task}-h{width}", task, width, f"microsoft/xtremedistil-l6-h{width}-uncased", epochs
    )
    for task, epochs in EPOCHS.items()
    for width in WIDTHS
}


def show_checkpoints() -> None:
    """Print the checkpoints that can be reproduced, with the published figures."""
    rows: list[list[object]] = []
    for one in CHECKPOINTS.values():
        parts = [
            f"{f.split.removeprefix('validation').strip('_')} {f.metric} {f.score:.4f}".strip()
            for f in one.figures()
        ]
        rows.append([one.name, one.student, ", ".join(parts)])
    print_table(f"Published figures ({NOTE})", ["checkpoint", "student", "GLUE dev"], rows)


def reproduce(name: str, words: Sequence[str], teachers: int, world: World) -> None:
    """Fine-tune the missing teachers, distil, then print and write the scores. Finished runs are
    not repeated.

    teachers: how many teachers each encoder gives, with seeds seed, seed + 1, ... Raises UserError
    before any work for an unknown name, for wrong overrides, and for files that cannot be reached.
    """
    if name not in CHECKPOINTS:
        raise UserError(f"unknown checkpoint {name!r}{known_names(name, CHECKPOINTS)}")
    checkpoint = CHECKPOINTS[name]
    given = configure(checkpoint, words, teachers)
    output = Path(given.output_dir)
    from_main(world, lambda: check_reach(name, given))
    runs = [Path(entry.path) for entry in given.teachers]
    if not runs:
        layers = teacher_layers(read_layers(base_words(checkpoint, words)))
        alone = resolve([*layers, {"method": "finetune"}])
        update = {
            "output_dir": str(output / "teachers"),
            "encoders": given.encoders,
            "push_to_hub": False,
        }
        runs = finetune(alone.model_copy(update=update), world, show_table=False)
        if not from_main(world, lambda: all(map(is_finished, runs))):
            return  # a stop was requested
    student = given.model_copy(
        update={
            "output_dir": str(output / "student"),
            "encoders": [],
            "teachers": given.teachers or [TeacherConfig(path=str(run)) for run in runs],
        }
    )
    distill(student, world, show_table=False)
    if from_main(world, lambda: is_finished(output / "student")) and world.is_main:
        write_results(checkpoint, given, output)


def base_words(checkpoint: PublishedCheckpoint, words: Sequence[str]) -> list[str]:
    return [
        str(config_folder() / "reproduce.yaml"),
        f"task={checkpoint.task}",
        f"student={checkpoint.student}",
        f"num_train_epochs={checkpoint.epochs}",
        f"output_dir=reproduce/{checkpoint.name}",
        *words,
    ]


def configure(checkpoint: PublishedCheckpoint, words: Sequence[str], teachers: int) -> RunConfig:
    """The configuration of the student's run, with each encoder repeated `teachers` times. Raises
    UserError."""
    if teachers < 1:
        raise UserError(f"--teachers {teachers} is below 1; give 1 or more")
    config = load_config(base_words(checkpoint, words))
    if config.task != checkpoint.task:
        raise UserError(
            f"task={config.task}, but {checkpoint.name} is a checkpoint for {checkpoint.task}; "
            "leave task out, or use finetune and distill"
        )
    if not config.uses_teachers:
        reject_unused_text(config.model_copy(update={"encoders": []}))
    encoders = [entry for entry in config.encoders for _ in range(teachers)]
    return config.model_copy(update={"encoders": encoders})


def check_reach(name: str, config: RunConfig) -> None:
    """Raises UserError where data, teachers, encoders or the student's start are neither on this
    machine nor on the hub. The error names each of them and how to give it."""
    if config.push_to_hub:
        check_push(config.hub_model_id)
    missing: list[str] = []
    task = load_task(config.task)
    try:
        load_official(task, config.data, list(task.splits)[1])
    except UserError:
        if any((config.data.path, config.data.train, config.data.validation)):
            raise
        missing.append(f"data {' '.join(filter(None, task.hub or ()))} (or give data.path=DIR)")
    taught = {entry.path: ("teacher", "teachers=[DIR]") for entry in config.teachers}
    starts = taught or {entry.path: ("encoder", "encoders=[DIR]") for entry in config.encoders}
    if config.student.path is not None:
        starts[config.student.path] = ("student", "student=DIR")
    for path, (what, fix) in starts.items():
        if names_shape(path):
            continue
        try:
            locate(path)
        except UserError:
            if Path(path).is_dir():
                raise
            missing.append(f"{what} {path} (or give {fix})")
    if missing:
        raise UserError(
            f"{name} needs data or models that cannot be reached here: {', '.join(missing)}"
        )


def write_results(checkpoint: PublishedCheckpoint, config: RunConfig, output: Path) -> None:
    """Print published and obtained scores side by side, and write them to reproduce.json and
    reproduce.md."""
    files = read_run(output / "student")
    figures: list[dict[str, Any]] = []
    for figure in checkpoint.figures():
        scores = files.scores["splits"][figure.split]
        obtained = scores["student"][figure.metric]
        figures.append(
            {
                "split": figure.split,
                "metric": figure.metric,
                "published": figure.score,
                "obtained": obtained,
                "difference": obtained - figure.score,
                "ensemble": scores["ensemble"][figure.metric],
                "teachers": [teacher["metrics"][figure.metric] for teacher in scores["teachers"]],
            }
        )
    record = {
        "checkpoint": checkpoint.name,
        "published_is": NOTE,
        "selected_on": files.scores["selected_on"],
        "student": redact(config.student.path or config.student.shape),
        "figures": figures,
    }
    write_json(output / "reproduce.json", record)
    columns = ["split", "metric", f"published ({NOTE})", f"obtained{files.mark}", "difference"]
    columns += ["ensemble", "teachers, mean"]
    rows: list[list[object]] = [
        [
            *(one[key] for key in ("split", "metric", "published", "obtained")),
            f"{one['difference']:+.4f}",
            one["ensemble"],
            statistics.mean(one["teachers"]),
        ]
        for one in figures
    ]
    text = (
        f"# {checkpoint.name}\n\n{table(columns, rows)}\n\nObtained: one run; its checkpoint was "
        f"chosen on {'dev' if files.mark else 'rows held out of train'}. Settings, teachers and "
        "cost: student/README.md.\n"
    )
    with written_aside(output / "reproduce.md") as aside:
        aside.write_text(text, "utf-8")
    print_table(checkpoint.name, columns, rows)
    print(f"written to {output / 'reproduce.md'}")
