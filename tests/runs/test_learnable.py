"""Before the first step a run says whether there is anything to learn, at the end what it kept."""

import numpy as np
import pytest
from small import LABELS, TASK, example_set, read, sentences

from sead_dist.errors import UserError
from sead_dist.runs.learnable import kept_shares, told_shares, verdict, weigh_up


def test_the_verdict_goes_by_the_interval():
    assert verdict((0.001, 0.2)) == "yes"
    assert verdict((-0.02, 0.0099)) == "no"
    assert verdict((-0.02, 0.02)) == "cannot be told"


def answers(labels_B, wrong):
    said_B = labels_B.copy()
    said_B[wrong] = 1 - said_B[wrong]
    return np.eye(2, dtype=np.float32)[said_B] * 4


@pytest.fixture(scope="module")
def selection():
    texts = sentences(200)
    return example_set(texts, [LABELS[n % 2] for n in range(200)])


def test_what_there_is_to_learn_is_the_ensembles_gap_over_the_fine_tuned_student(selection):
    labels_B = selection.labels_B
    ensemble_BC, finetuned_BC = answers(labels_B, slice(20)), answers(labels_B, slice(60))
    found = weigh_up(TASK, selection, [0.8, 0.85], ["a", "b"], ensemble_BC, finetuned_BC)
    assert (found.majority, found.finetuned, found.ensemble) == (0.5, 0.7, 0.9)
    assert (found.best_name, found.best_teacher, found.rows) == ("b", 0.85, 200)
    assert found.gap == pytest.approx(0.2)
    assert found.verdict == "yes"
    alike = weigh_up(TASK, selection, [0.8], ["a"], ensemble_BC, answers(labels_B, slice(1, 21)))
    assert alike.verdict == "cannot be told"
    alone = weigh_up(TASK, selection, [0.8], ["a"], ensemble_BC, None)
    assert alone.finetuned is None
    assert alone.gap == pytest.approx(0.4)


def test_a_share_is_told_where_there_is_a_gap(tmp_path):
    (tmp_path / "scores.json").write_text(
        '{"metric": "accuracy", "splits": {"validation": {"student": {"accuracy": 0.7}}, '
        '"other": {"student": {"accuracy": 0.9}}}}'
    )
    of = {"student": {"accuracy": 0.8}, "ensemble": {"accuracy": 0.9}}
    scores = {"selection": of, "validation": of, "other": of}
    shares = kept_shares(tmp_path, scores, "accuracy")
    assert shares["validation"]["share"] == pytest.approx(0.5)
    assert "selection" not in shares
    assert "share" not in shares["other"]
    first, second = told_shares(shares)
    assert "share of the gap that is kept: 50%" in first
    assert "there is no gap" in second


@pytest.fixture(scope="module")
def finetuned(distil, words, tmp_path_factory):
    return distil(words(tmp_path_factory.mktemp("fine") / "run", "method=finetune", "max_steps=3"))


def test_a_run_says_whether_there_is_anything_to_learn_in_log_and_card(
    finetuned, distil, words, tmp_path
):
    run = distil(words(tmp_path / "run", f"baseline={finetuned}", "max_steps=12"))
    record = read(run / "learnable.json")
    scores = read(run / "scores.json")["splits"]
    before = read(finetuned / "scores.json")["splits"]
    assert record["finetuned"] == before["selection"]["student"]["accuracy"]
    assert record["ensemble"] == pytest.approx(scores["selection"]["ensemble"]["accuracy"])
    assert record["splits"]["validation"]["student"] == scores["validation"]["student"]["accuracy"]
    log = (run / "log.txt").read_text()
    assert "is there anything to learn? accuracy on 40 selection rows: majority baseline" in log
    assert "validation: fine-tuned student" in log
    card = (run / "README.md").read_text()
    assert f"Is there anything to learn: **{record['verdict']}" in card
    assert "| fine-tuned student |" in card


def test_without_a_baseline_it_is_the_majority_baseline_and_the_key_is_named(
    distil, words, tmp_path
):
    run = distil(words(tmp_path / "run", "max_steps=1"))
    assert read(run / "learnable.json")["finetuned"] is None
    assert "baseline=RUN_DIR compares with a fine-tuned student" in (run / "log.txt").read_text()
    off = distil(words(tmp_path / "off", "max_steps=1", "teacher_validation=off"))
    assert not (off / "learnable.json").exists()


def test_a_baseline_that_cannot_be_compared_is_refused_before_work(
    finetuned, distil, words, tmp_path
):
    def refused(says, baseline, *more):
        with pytest.raises(UserError, match=says) as caught:
            distil(words(tmp_path / "new", f"baseline={baseline}", "max_steps=1", *more))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new" / "run.json").exists()

    refused("is no finished run", tmp_path / "nowhere")
    refused("had other selection rows", finetuned, "selection.seed=7")
    taught = distil(words(tmp_path / "taught", "max_steps=1"))
    refused("had teachers; give a run of method=finetune", taught)
