"""Silent disappointments are told: in the log, the terminal, the card and scores.json."""

import pyarrow.parquet as pq
import pytest
import torch
from small import ALONE, read, save_teacher, words

from sead_dist.cli.commands import attempt_recipe
from sead_dist.config.load import load_config
from sead_dist.data import significance
from sead_dist.errors import UserError
from sead_dist.runs import checks, distillation, remarks
from sead_dist.runs.prediction import evaluate_model
from sead_dist.runs.remarks import unread_keys


@pytest.fixture
def task(tiny_task):
    return tiny_task[0], tiny_task[1][0]


def of_one_answer(task, monkeypatch):
    """Every student that is built answers `negative` to whatever it reads."""
    build = distillation.build

    def built(*given, **more):
        setup = build(*given, **more)
        with torch.no_grad():
            setup.engine.module.classifier.weight.zero_()
            setup.engine.module.classifier.bias.copy_(torch.tensor([9.0, -9.0]))
        return setup

    monkeypatch.setattr(distillation, "build", built)


def test_a_student_of_one_answer_is_told_everywhere(tmp_path, task, monkeypatch, capsys, shown):
    data, teacher = task
    of_one_answer(task, monkeypatch)
    given = words(data, [teacher], tmp_path / "run", max_steps=1, alpha_end=0.1, teacher="a")
    run = distillation.distill(load_config(given), ALONE)
    said = capsys.readouterr().out
    remarks = read(run / "scores.json")["remarks"]
    assert any(
        "the student is no better than the majority baseline on validation" in r for r in remarks
    )
    assert any(r == "the student never predicts positive on validation" for r in remarks)
    assert any(r.startswith("teacher=a is not read: it is for ensemble=single") for r in remarks)
    for line in remarks:
        assert f"WARNING: {line}" in said
        assert f"WARNING: {line}" in (run / "log.txt").read_text()
        assert f"- {line}" in (run / "README.md").read_text()


def test_the_card_and_evaluate_show_every_class(tmp_path, task, capsys, shown):
    data, teacher = task
    run = distillation.distill(
        load_config(words(data, [teacher], tmp_path / "run", max_steps=2)), ALONE, console=False
    )
    card = (run / "README.md").read_text()
    assert "| class | rows | predicted | precision | recall | F1 |" in card
    assert "plots/confusion.png" in card
    assert (run / "model" / "plots" / "confusion.png").is_file()
    capsys.readouterr()
    evaluate_model(str(run), None, None, None, None, None)
    said = capsys.readouterr().out
    assert "| class | rows | predicted | precision | recall | F1 |" in said
    assert "| gold label / predicted | negative | positive |" in said


@pytest.mark.parametrize("texts", [True, False])
def test_predictions_have_rows_names_probabilities_and_texts(tmp_path, task, texts):
    data, teacher = task
    key = str(texts).lower()
    given = words(data, [teacher], tmp_path / "run", max_steps=1, prediction_texts=key)
    run = distillation.distill(load_config(given), ALONE, show_table=False, console=False)
    table = pq.read_table(run / "predictions" / "validation.parquet").to_pydict()
    lines = (data / "validation.tsv").read_text().splitlines()[1:]
    assert table["row"] == list(range(1, len(lines) + 1))
    assert table["gold_label"] == [line.split("\t")[1] for line in lines]
    assert set(table["predicted_label"]) <= {"negative", "positive"}
    sums = [
        a + b
        for a, b in zip(table["probability_negative"], table["probability_positive"], strict=True)
    ]
    assert sums == pytest.approx([1.0] * len(lines), abs=1e-5)
    assert ("text_a" in table) is texts
    if texts:
        assert table["text_a"] == [line.split("\t")[0] for line in lines]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["temperature=4", "teachers=[]", "method=finetune"], ["temperature=4.0 is not read: the run uses no teacher"]),
        (["loss=mse", "temperature=4", "ensemble=mean_logits"], ["temperature=4.0 is not read: loss=mse compares logits"]),
        (["feature_stage_ratio=0.2"], ["feature_stage_ratio=0.2 is not read: it is for feature_loss="]),
        (["unlabeled.ratio=2"], ["unlabeled.ratio=2.0 is not read: there is no unlabelled text"]),
        (["teachers=[{path: a, weight: 2}]"], ["the weight of teacher a is not read: it is for"]),
        (["temperature=4", "alpha=0.1", "ensemble=fixed", "teachers=[{path: a, weight: 2}]"], []),
        (["augment.copies=null", "augment.gold_labels=true"], ["augment.gold_labels=True is not read: augment.copies is"]),
        (["augment.operations=[mask]", "teachers=[]", "method=finetune"], ["augment.operations=['mask'] is not read: without teachers"]),
        (["augment.operations=[mask]", "teachers=[{predictions: a.csv}]"], ["augment.operations=['mask'] is not read: files of"]),
        (["augment.operations=[mask]"], []),
        (["repair.steps=9", "repair.teacher=b"], ["repair.steps=9 is not read: there is no repair.text", "repair.teacher=b is not read"]),
        (["student=b", "student.layers=[1]", "repair.steps=9", "repair.text=c"], []),
        (["average_share=0.5", "final_checkpoint=best"], ["average_share=0.5 is not read: it is for final_checkpoint=average, not best"]),
        (["average_share=0.5"], []),
        (["method=sead"], []),  # its own keys are nobody's mistake
        ([], []),
    ],
)  # fmt: skip
def test_a_key_that_the_method_does_not_read_is_told(keys, said):
    lines = unread_keys(load_config(["task=sst2", "output_dir=run", "teachers=[a]", *keys]))
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


@pytest.mark.parametrize("method", [[], ["method=sead"], ["method=mean"]])
def test_distill_without_teachers_by_what_asks_them_is_refused(tmp_path, task, capsys, method):
    given = [*words(task[0], [], tmp_path / "run", max_steps=1), *method]
    assert attempt_recipe("distill", given) == 2
    assert "teachers is empty, so there is nothing to distil; give" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="teachers is empty"):
        checks.check_inputs(load_config(given))


def test_distill_without_teachers_by_method_finetune_trains(tmp_path, task):
    given = words(task[0], [], tmp_path / "run", max_steps=1)
    assert attempt_recipe("distill", [*given, "method=finetune"]) is None
    # the keys of a teacher's own run
    checks.reject_untaught(load_config([*given, "method=finetune", "ensemble=score"]))


def test_an_ensemble_no_better_than_its_best_member_is_told_by_interval_everywhere(
    tmp_path, task, capsys, shown
):
    data, teacher = task
    twins = [str(teacher), str(save_teacher(tmp_path / "b", seed=0))]
    given = words(data, twins, tmp_path / "run", max_steps=1)
    run = distillation.distill(load_config(given), ALONE)
    told = read(run / "scores.json")
    gap = told["splits"]["validation"]["ensemble_gap"]
    assert gap["interval"][0] <= 0 <= gap["interval"][1]
    (line,) = [line for line in told["remarks"] if line.startswith("the ensemble is not better")]
    assert line.startswith(
        f"the ensemble is not better beyond chance on validation than {gap['teacher']}, its best "
        "teacher by the selection split: accuracy "
    )
    assert f"WARNING: {line}" in capsys.readouterr().out
    assert f"WARNING: {line}" in (run / "log.txt").read_text()
    assert f"- {line}" in (run / "README.md").read_text()


def test_an_ensemble_that_is_better_than_its_best_member_is_not_told(tmp_path, task, monkeypatch):
    data, teacher = task
    monkeypatch.setattr(remarks, "paired_gap", lambda *_given: significance.Gap(0.1, (0.02, 0.18)))
    twins = [str(teacher), str(save_teacher(tmp_path / "b", seed=0))]
    given = words(data, twins, tmp_path / "run", max_steps=1)
    run = distillation.distill(load_config(given), ALONE, console=False)
    told = read(run / "scores.json")
    assert told["splits"]["validation"]["ensemble_gap"]["interval"] == [0.02, 0.18]
    assert not any(line.startswith("the ensemble") for line in told["remarks"])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"final_checkpoint": "auto"}, False),  # the average: nothing is chosen
        ({"final_checkpoint": "best"}, True),
        ({"final_checkpoint": "auto", "ensemble": "score"}, True),
    ],
)
def test_a_small_selection_split_is_told_where_something_is_chosen_by_it(
    tmp_path, task, keys, told
):
    data, teacher = task
    given = words(data, [teacher], tmp_path / "run", max_steps=1, **keys)
    run = distillation.distill(load_config(given), ALONE, console=False)
    remark = "the selection split has 6 rows, and with fewer than 500 a choice by scores is"
    lines = read(run / "scores.json")["remarks"]
    assert any(line.startswith(remark) for line in lines) == told
    # by the same bound as the final checkpoint
    few = "6 selection rows are too few to choose by; 500 are enough"
    automatic = keys["final_checkpoint"] == "auto"
    assert (few in (run / "log.txt").read_text()) == automatic
