"""Every method on the built-in task: one loop, one student, and what each asks of its teachers."""

import re
from pathlib import Path

import pytest
import yaml
from small import ALONE, model_bytes, read, shape

from sead_dist.cli.grammar import write_grammar_task
from sead_dist.config.load import load_config, shipped_files
from sead_dist.errors import UserError
from sead_dist.runs.distillation import distill, finetune

# the built-in task's classes are about equal in number: a constant answer gets half of them right
MARGIN = 0.1
# labels alone, and averaged teachers; the others are slow
QUICK = ("finetune", "sead")


def run_words(task: Path, *more: str) -> list[str]:
    return [
        f"task={task / 'task.yaml'}",
        f"data.path={task}",
        f"student.tokenizer={task / 'tokenizer'}",
        f"store={task / 'store'}",
        "max_length=32",
        "global_batch_size=64",
        "micro_batch_size=32",
        "learning_rate=4e-3",
        "warmup_steps=0.2",
        "save_steps=0",
        *more,
    ]


@pytest.fixture(scope="module")
def world_of_methods(tmp_path_factory) -> Path:
    """A task whose rows name a teacher in the column `who`, and two teachers."""
    task = tmp_path_factory.mktemp("methods")
    write_grammar_task(task, seed=0, train_rows=900, validation_rows=300)
    for name in ("train", "validation"):
        lines = (task / f"{name}.tsv").read_text().splitlines()
        rows = [f"{line}\tteacher-{n % 2}" for n, line in enumerate(lines[1:])]
        (task / f"{name}.tsv").write_text("\n".join([f"{lines[0]}\twho", *rows]) + "\n")
    for name, width in (("teacher", 64), ("student", 48)):
        fields = shape("bert", hidden_size=width, num_hidden_layers=2, intermediate_size=96)
        fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (task / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    encoders = f"encoders=[{task / 'teacher.yaml'},{task / 'teacher.yaml'}]"
    words = run_words(task, encoders, "max_steps=150", f"output_dir={task / 'teachers'}")
    finetune(load_config(words), ALONE, show_table=False)
    return task


def run_method(task: Path, method: str, output: Path, *more: str) -> Path:
    words = run_words(
        task,
        f"teachers={task / 'teachers' / '*'}",
        f"student={task / 'student.yaml'}",
        f"method={method}",
        "max_steps=100",
        f"output_dir={output}",
        *(["teacher_column=who"] if method == "routed" else []),
        *more,
    )
    return distill(load_config(words), ALONE, show_table=False)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[] if method in QUICK else pytest.mark.slow)
        for method in shipped_files("methods")
    ],
)
def test_the_student_of_each_method_beats_a_constant_answer(world_of_methods, tmp_path, method):
    # half of tinybert's steps teach the head
    longer = ["max_steps=200"] if method == "tinybert" else []
    run = run_method(world_of_methods, method, tmp_path / "run", *longer)
    score = read(run / "scores.json")["splits"]["validation"]["student"]["accuracy"]
    assert score > 0.5 + MARGIN


def test_finetune_asks_no_teacher_and_is_the_run_without_teachers(world_of_methods, tmp_path):
    named = run_method(world_of_methods, "finetune", tmp_path / "named", "max_steps=3")
    words = run_words(
        world_of_methods,
        f"student={world_of_methods / 'student.yaml'}",
        "max_steps=3",
        f"output_dir={tmp_path / 'bare'}",
    )
    bare = distill(load_config(words), ALONE, show_table=False)
    assert model_bytes(named) == model_bytes(bare)
    assert read(named / "run_summary.json")["teacher_forwards"] == 0
    assert not (named / "teacher_manifest.json").exists()


def needed(run: Path) -> int:
    summary = read(run / "run_summary.json")
    return summary["teacher_forwards"] + summary["store_hits"]


def test_single_and_routed_ask_for_each_row_once_and_mean_asks_every_teacher(
    world_of_methods, tmp_path
):
    asked = {
        method: needed(run_method(world_of_methods, method, tmp_path / method, "max_steps=3"))
        for method in ("single", "routed", "mean")
    }
    rows = 3 * 64
    # what the validation and the dev split ask is the same for all
    assert asked["mean"] - asked["single"] == asked["mean"] - asked["routed"] == rows


def test_a_row_that_names_no_teacher_of_the_run_is_told_before_work(world_of_methods, tmp_path):
    said = re.escape(
        "train row 1: 'teacher-0' in column 'who' is not a teacher of this run; its teachers: a, b;"
    )
    entries = [f"{{path: {world_of_methods / 'teachers' / f'teacher-{n}'}, name: {name}}}"
               for n, name in enumerate("ab")]  # fmt: skip
    with pytest.raises(UserError, match=said):
        run_method(world_of_methods, "routed", tmp_path / "run", f"teachers=[{', '.join(entries)}]")
    with pytest.raises(UserError, match="no column 'whom'"):
        run_method(world_of_methods, "routed", tmp_path / "run", "teacher_column=whom")
