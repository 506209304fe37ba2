"""What a plan counts beside the run's own steps is what the run does: teachers that are not asked of
rows that they were trained on, repair, baseline, feature teacher, and an early end."""

import json
import shutil

import pytest
from safetensors.numpy import save_file
from small import ALONE, read, save_teacher, sentences, words

from sead_dist.cli.commands import print_plan
from sead_dist.config.load import load_config
from sead_dist.data.examples import entries
from sead_dist.data.splits import load_examples
from sead_dist.data.tasks import load_task
from sead_dist.planning.table import plan
from sead_dist.runs.distillation import distill
from sead_dist.teachers.teacher import TRAINED_ROWS

# so that times follow from operations alone
GIVEN = "hardware: none\ndevice: cpu\nforward: {fp32: 1.0e+9}\ntraining: {fp32: 1.0e+9}\n"
LABELLED, SELECTION, DEV = 54, 6, 20
# of fine-tuning so few rows (config/automatic.py), at most a fifth of the run's
BASELINE = 200


def run_of(task, tmp_path, **changes):
    data, teachers = task
    given = words(data, teachers, tmp_path / "run", **changes)
    if "student__path" in changes:
        given = [word for word in given if not word.startswith("student.shape=")]
    return load_config(given)


def planned(run, tmp_path):
    (tmp_path / "rates.yaml").write_text(GIVEN)
    print_plan(plan(run, ALONE, None, None, tmp_path / "rates.yaml", False, tmp_path / "plan.json"))
    return json.loads((tmp_path / "plan.json").read_text())


def colocated(run, tmp_path):
    return planned(run, tmp_path)["placements"][0]


@pytest.fixture(scope="module")
def folded(two_alike, tmp_path_factory):
    """Teachers of which the first was trained on 30 of the rows, and the second on none."""
    data, teachers = two_alike
    root = tmp_path_factory.mktemp("folded")
    first = shutil.copytree(teachers[0], root / "a")
    given = load_config(words(data, teachers, root / "run"))
    train = load_examples(given, load_task(given.task)).train
    save_file({"ids_U2": entries(train.ids_B2)[0][:30]}, first / TRAINED_ROWS)
    return data, [first, teachers[1]]


@pytest.mark.parametrize(
    ("ensemble", "more"), [("mean_probabilities", {}), ("mean_logits", {"max_steps": 20})]
)
def test_a_row_is_counted_for_those_teachers_alone_that_the_run_asks_of_it(
    folded, tmp_path, ensemble, more
):
    run = run_of(folded, tmp_path, ensemble=ensemble, **more)
    told = planned(run, tmp_path)["teacher_forwards"]
    assert told == LABELLED - 30 + LABELLED + 2 * (SELECTION + DEV)
    assert read(distill(run, ALONE) / "run_summary.json")["teacher_forwards"] == told
    # what the store has of them is not work, and it has nothing of the other rows
    assert planned(run, tmp_path)["teacher_forwards"] == 0


def test_an_ensemble_that_asks_one_teacher_for_a_row_asks_it_of_its_own_rows_too(folded, tmp_path):
    run = run_of(folded, tmp_path, ensemble="random")
    # in one epoch half of the rows of each
    assert planned(run, tmp_path)["teacher_forwards"] == 2 * (LABELLED // 2 + SELECTION + DEV)


def test_the_run_s_own_baseline_is_counted_where_it_is_made(two_alike, tmp_path, capsys):
    def told(**changes):
        given = {"max_steps": 5 * BASELINE, "teacher_validation": "on", **changes}
        return colocated(run_of(two_alike, tmp_path, **given), tmp_path)

    one = told()
    # on the same rows
    assert one["before_s"] == {"baseline": pytest.approx(one["training_s"] / 5)}
    total = one["before_s"]["baseline"] + one["teachers_s"] + one["training_s"]
    assert one["seconds"] == pytest.approx(total)
    assert " baseline " in capsys.readouterr().out
    assert told(max_steps=5 * BASELINE - 1)["before_s"] == {}
    assert told(baseline="null")["before_s"] == {}
    assert told(teacher_validation="off")["before_s"] == {}
    assert told(method="finetune")["before_s"] == {}
    made = tmp_path / "run" / "baseline"
    made.mkdir(parents=True)
    (made / "run_summary.json").write_text('{"finished": true}')
    assert told()["before_s"] == {}


def test_a_repair_is_counted_until_its_start_is_kept(two_alike, tmp_path, capsys):
    whole = save_teacher(tmp_path / "whole", num_hidden_layers=4)
    (tmp_path / "text.txt").write_text("\n".join(sentences(40, seed=7)), "utf-8")
    run = run_of(
        two_alike, tmp_path, student__path=whole, student__layers="[1,3]", max_steps=20,
        repair__text=tmp_path / "text.txt", repair__steps=20, repair__folder=tmp_path / "kept",
    )  # fmt: skip
    one = colocated(run, tmp_path)
    # three of a student's forwards with half of the layers, and one of the whole model; the texts
    # are a little longer than the task's
    assert one["before_s"]["repair"] / one["training_s"] == pytest.approx((3 + 2) / 3, rel=0.25)
    assert "repair: scaled from the student's step by operations\n" in capsys.readouterr().out
    distill(run, ALONE)
    assert colocated(run, tmp_path)["before_s"] == {}


def test_an_end_that_is_not_known_before_makes_the_plan_an_upper_bound(
    two_alike, tmp_path, capsys, shown
):
    # a loss that never falls: the least steps are those that the run takes
    run = run_of(
        two_alike, tmp_path, num_train_epochs=12, early_stopping_patience=1, learning_rate=1e-12,
        eval_steps=84, weight_decay=0,
    )  # fmt: skip
    found = planned(run, tmp_path)
    said = capsys.readouterr().out
    assert "1 rank: at most 648 examples in 84 steps" in said
    assert "<= " in said
    assert "dev texts occur in" not in said  # the lines of the run itself
    assert "at most: early_stopping_patience=1 may end the run from step 42 on, which" in said
    assert (found["least_steps"], found["steps"]) == (42, 84)
    assert read(distill(run, ALONE) / "run_summary.json")["steps"] == found["least_steps"]


def test_the_feature_teachers_own_forwards_are_counted_as_long_as_it_is_asked(two_alike, tmp_path):
    def training_s(**changes):
        given = {"max_steps": 20, **changes}
        return colocated(run_of(two_alike, tmp_path, **given), tmp_path)["training_s"]

    none = training_s()
    whole = training_s(feature_loss="distilbert") - none
    half = training_s(feature_loss="tinybert", teacher="a") - none
    assert half == pytest.approx(whole / 2)
    assert whole > 0
