"""The demo: fine-tuning and distillation on the built-in task, offline.

It trains three teachers of different shapes. It trains a small student with and without them, with
three seeds each. Every figure is measured in the run. The settings keep the time short.
"""

import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sead_dist.cli.grammar import write_grammar_task
from sead_dist.config.load import read_layers, resolve
from sead_dist.config.schema import RunConfig
from sead_dist.config.yaml_text import read_yaml, to_yaml
from sead_dist.errors import UserError
from sead_dist.runs.distillation import distill, finetune
from sead_dist.runs.given import as_layer
from sead_dist.runtime.console import print_table
from sead_dist.runtime.distributed import World, from_main
from sead_dist.runtime.files import written_aside
from sead_dist.runtime.run_log import read_json

# Layers, width, heads, feed-forward width. Shapes, rows, noise and steps were chosen by the dev
# accuracy of the seeds 100 to 104 (docs/results/demo.md). With the former settings the student
# alone was as good as its teachers, and had nothing to learn from them.
TEACHER_SHAPES = ((2, 128, 4, 256), (2, 128, 2, 256), (2, 96, 3, 192))
TRAIN_ROWS = 700
# the share of wrong labels in the training rows
LABEL_NOISE = 0.05
STUDENT_SHAPE = (2, 64, 2, 128)
SEEDS = 3
# the first file of the demo's folder; it shows that the demo made the folder
MARK = ".sead-dist-demo"
TEACHER_WORDS = (
    "max_steps=600",
    "global_batch_size=32",
    "micro_batch_size=16",
    "learning_rate=1e-3",
    "warmup_steps=0.3",
    # the average of the last weights is kept, so no score is needed before the end
    "eval_steps=600",
)
STUDENT_WORDS = (
    "max_steps=600",
    "global_batch_size=32",
    "micro_batch_size=16",
    "learning_rate=2e-3",
    "warmup_steps=0.3",
    "eval_steps=600",
)
# the task has enough unlabelled text, so no copies are made
SOFT_WORDS = ("method=sead", "placement=partitioned", "augment.copies=null", "baseline=null")


def write_shape(path: Path, shape: tuple[int, int, int, int], dropout: float) -> None:
    layers, width, heads, inner = shape
    fields = {
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    path.write_text(to_yaml(fields), encoding="utf-8")


def write_inputs(output: Path, seed: int) -> None:
    """Write the task's files and the shapes' YAML files, unless they exist.

    Raises UserError for a folder that holds other files, and for one that lacks the unlabelled
    text.
    """
    if (output / "shapes" / "student.yaml").is_file():
        take_former_text(output)
        return
    foreign = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if foreign and not (output / MARK).is_file():
        raise UserError(f"--output-dir {output} holds other files; give a new or an empty folder")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()
    write_grammar_task(
        output / "task", seed, TRAIN_ROWS, validation_rows=1000, label_noise=LABEL_NOISE
    )
    (output / "shapes").mkdir(exist_ok=True)
    for index, shape in enumerate(TEACHER_SHAPES):
        write_shape(output / "shapes" / f"teacher-{index}.yaml", shape, dropout=0.05)
    write_shape(output / "shapes" / "student.yaml", STUDENT_SHAPE, dropout=0.0)


def take_former_text(output: Path) -> None:
    """Copy the unlabelled text of an older version's folder to its present name.

    Raises UserError where there is no unlabelled text.
    """
    text, former = output / "task" / "unlabeled.tsv", output / "task" / "transfer.tsv"
    if text.is_file():
        return
    if not former.is_file():
        raise UserError(
            f"--output-dir {output} lacks a file of the demo, {text.relative_to(output)}; give a "
            "new or an empty folder"
        )
    with written_aside(text) as aside:
        shutil.copyfile(former, aside)


def configure(output: Path, words: Sequence[str], keys: Mapping[str, Any]) -> RunConfig:
    """The configuration of these words and keys. Paths and seeds are keys, since a path may hold
    what has a meaning in a word."""
    task = output / "task"
    of_demo = {
        "task": task / "task.yaml",
        "data.path": task,
        "student.tokenizer": task / "tokenizer",
        "store": output / "store",
        "max_length": 64,
        "save_steps": 0,
    }
    return resolve([*read_layers(words), as_layer({**of_demo, **keys})])


def run_demo(output: Path, seed: int, world: World) -> None:
    """Fine-tune, distil, and print the closing table. A second call continues after a stop."""
    from_main(world, lambda: write_inputs(output, seed))
    shapes = output / "shapes"
    encoders = [shapes / f"teacher-{index}.yaml" for index in range(len(TEACHER_SHAPES))]
    heading(world, "1 of 3: fine-tune three teachers on the labelled rows")
    teachers = finetune(
        configure(
            output,
            TEACHER_WORDS,
            {"encoders": encoders, "output_dir": output / "teachers", "seed": seed * 100},
        ),
        world,
        show_table=False,
    )
    start = {"student.shape": shapes / "student.yaml"}
    alone, taught = [], []
    heading(world, "2 of 3: train the student without teachers, three seeds")
    for number in range(SEEDS):
        own = {"output_dir": output / f"alone-{number}", "seed": seed * 100 + 50 + number}
        config = configure(output, STUDENT_WORDS, {**start, **own})
        alone.append(distill(config, world, show_table=False))
    heading(world, "3 of 3: distil the teachers into the same student, three seeds")
    soft = {"teachers": teachers, "unlabeled.path": output / "task" / "unlabeled.tsv"}
    for number in range(SEEDS):
        own = {"output_dir": output / f"distilled-{number}", "seed": seed * 100 + 50 + number}
        config = configure(output, (*STUDENT_WORDS, *SOFT_WORDS), {**start, **soft, **own})
        taught.append(distill(config, world, show_table=False))
    if world.is_main:
        show(shapes, teachers, alone, taught)


def heading(world: World, line: str) -> None:
    if world.is_main:
        print(f"\n{line}", flush=True)


def dev_scores(run: Path) -> dict[str, float]:
    """Accuracy on the dev split of the run's student, and of its ensemble if it has one."""
    split = read_json(run / "scores.json")["splits"]["validation"]
    scores = {"student": float(split["student"]["accuracy"])}
    if split["ensemble"]:
        scores["ensemble"] = float(split["ensemble"]["accuracy"])
    return scores


def shape_name(file: Path) -> str:
    """The layers and width of a shape's file, which an older version may have written."""
    fields = read_yaml(file)
    return f"L{fields['num_hidden_layers']}-H{fields['hidden_size']}"


def show(shapes: Path, teachers: list[Path], alone: list[Path], taught: list[Path]) -> None:
    """Print the closing table, from the scores that the runs wrote."""
    rows: list[list[object]] = []
    for index, run in enumerate(teachers):
        name = f"teacher-{index} ({shape_name(shapes / f'teacher-{index}.yaml')})"
        rows.append([name, f"{dev_scores(run)['student']:.3f}", "", str(run / "model")])
    rows.append(["ensemble of the three", f"{dev_scores(taught[0])['ensemble']:.3f}", "", ""])
    student = shape_name(shapes / "student.yaml")
    for name, runs in (("without teachers", alone), ("distilled", taught)):
        scores = [dev_scores(run)["student"] for run in runs]
        rows.append(
            [
                f"student ({student}) {name}",
                f"{statistics.mean(scores):.3f}",
                f"{statistics.stdev(scores):.3f}",
                str(runs[0] / "model"),
            ]
        )
    columns = ["dev accuracy", "mean", f"spread of {SEEDS} seeds", "model, card and plots"]
    print_table("Built-in task", columns, rows)
