"""One start of a run: `plan`, `labels` and a worker of the pool refuse what `distill` refuses, with
the same line."""

import pytest
from small import ALONE, save_teacher, words, write_task

from sead_dist.cli.commands import print_plan
from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.planning.table import plan
from sead_dist.runs.distillation import distill
from sead_dist.runs.pool_worker import teach
from sead_dist.runs.teacher_labels import write_labels


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The built-in task, a teacher, and a file that answers one training row."""
    root = tmp_path_factory.mktemp("checked")
    data = write_task(root / "data")
    first = (data / "train.tsv").read_text().splitlines()[1].split("\t")[0]
    (root / "one.tsv").write_text(f"sentence\tnegative\tpositive\n{first}\t0.2\t0.8\n")
    file = f"{{predictions: {root / 'one.tsv'}, kind: probabilities, placement: colocated}}"
    return data, [save_teacher(root / "a"), file]


def rejections(given, output, commands, **of_plan):
    """What each of these commands says of a run, none of which may write."""
    config = load_config(given)
    asked = {"ranks": None, "gpu_memory": None, "rates_file": None, "json_file": None, **of_plan}
    starts = {
        "distill": lambda: distill(config, ALONE),
        "plan": lambda: plan(config, ALONE, fresh=False, **asked),
        "labels": lambda: write_labels(config, output / "soft.jsonl", ALONE),
        "teach": lambda: teach(config, "1/1", ALONE),
    }
    said = {}
    for name in commands:
        with pytest.raises(UserError) as caught:
            starts[name]()
        said[name] = str(caught.value)
    assert not (output / "run").exists()
    assert not (output / "store").exists()
    return said


STUDENT = ("distill", "plan")
ALL = ("distill", "plan", "labels", "teach")


@pytest.mark.parametrize(
    ("commands", "keys", "line"),
    [
        (STUDENT, {"precision": "fp16"}, "precision=fp16 needs a GPU"),
        (STUDENT, {"report_to": "nonsense"}, "report_to=nonsense is"),
        (
            STUDENT,
            {"method": "tinybert", "deepspeed": "zero3"},
            "feature_loss=tinybert needs each rank to hold the student whole",
        ),
        (
            STUDENT,
            {"repair__text": "text.txt", "repair__teacher": "whole", "deepspeed": "zero3"},
            "repair.text=text.txt needs",
        ),
        (STUDENT, {"push_to_hub": "true"}, "cannot reach the hub"),
        (STUDENT, {"baseline": "elsewhere"}, "baseline=elsewhere is"),
        (
            STUDENT,
            {"encoders": "[L6-H256-A8]"},
            "encoders is a key of finetune; give the teachers to",
        ),
        (("distill", "plan", "teach"), {"method": "minilm"}, "teacher one is a file, and feature"),
        (
            ALL,
            {"ensemble": "score"},
            "ensemble=score needs each teacher's score, and one has predictions",
        ),
        (ALL, {"ensemble": "fitted"}, "ensemble=fitted needs 200 labelled rows"),
        (ALL, {"ensemble": "routed"}, "ensemble=routed"),
        (ALL, {"data__train": "no.tsv"}, "no.tsv"),
        (ALL, {"teacher": "nobody"}, "teacher=nobody"),
    ],
)
def test_whatever_starts_a_run_refuses_it_with_the_same_line(
    task, tmp_path, monkeypatch, commands, keys, line
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = words(*task, tmp_path / "run", **{"placement": "pool", **keys})
    said = rejections(given, tmp_path, commands)
    assert line in said["distill"]
    assert said == dict.fromkeys(commands, said["distill"])


def test_a_folder_that_is_not_a_store_is_refused_by_a_plan_too(task, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    given = words(*task, tmp_path / "run", store=tmp_path / "other")
    said = rejections(given, tmp_path, STUDENT)
    assert "holds other things ('letter.txt')" in said["distill"]
    assert said["plan"] == said["distill"]


def test_a_plan_for_other_ranks_is_checked_for_those(task, tmp_path):
    data, (teacher, _) = task
    entry = f"{{path: {teacher}, placement: partitioned}}"
    given = words(data, [entry], tmp_path / "run", method="minilm")
    said = rejections(given, tmp_path, ["plan"], ranks=2)["plan"]
    assert said.startswith("teacher a is partitioned, and feature_loss=minilm needs it on every")


def test_a_plan_for_other_hardware_is_checked_for_that(task, tmp_path, capsys):
    data, (teacher, _) = task
    rates = tmp_path / "rates.yaml"
    rates.write_text("hardware: a GPU\nforward: {fp32: 2.0e+9}\ntraining: {fp16: 1.0e+9}\n")
    given = words(data, [teacher], tmp_path / "run", precision="fp16")
    print_plan(plan(load_config(given), ALONE, None, None, rates, False, None))
    assert "a GPU" in capsys.readouterr().out
    rates.write_text(f"{rates.read_text()}device: cpu\n")
    said = rejections(given, tmp_path, ["plan"], rates_file=rates)["plan"]
    assert said.startswith("precision=fp16 needs a GPU")
