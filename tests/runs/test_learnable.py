"""Before the first step a run says whether there is anything to learn, at the end what it kept."""

import shutil
import signal

import numpy as np
import pytest
from ranks import run_ranks
from small import (
    ALONE,
    LABELS,
    TASK,
    example_set,
    load_teachers,
    model_bytes,
    read,
    run_distill,
    save_teacher,
    sentences,
)

from sead_dist.config import automatic
from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.runs.baseline import (
    compare_ensemble,
    fit,
    kept_shares,
    learnable_line,
    second_ensemble,
    second_ensemble_line,
    share_lines,
    verdict,
    weighted,
)
from sead_dist.runs.distillation import distill
from sead_dist.runs.prepared_teachers import repeated_teacher_lines
from sead_dist.runtime.distributed import StopFlag
from sead_dist.runtime.run_log import is_finished


def test_the_verdict_goes_by_the_interval():
    assert verdict((0.001, 0.2), True) == "yes"
    assert verdict((-0.02, 0.0099), True) == "no"
    assert verdict((-0.02, 0.02), True) == "cannot be told from so few rows"


def test_a_gap_over_the_best_constant_answer_says_nothing_of_fine_tuning():
    assert verdict((0.1, 0.2), False) == "cannot be told without a fine-tuned student"
    assert verdict((-0.02, 0.0099), False) == "no"
    assert verdict((-0.02, 0.02), False) == "cannot be told from so few rows"


def test_a_teacher_that_is_given_twice_is_told(tmp_path):
    one, other = (save_teacher(tmp_path / name, seed=n) for n, name in enumerate("ab"))
    (line,) = repeated_teacher_lines(load_teachers([one, other, one]))
    assert (
        line
        == "WARNING: teacher a#2 is the same as a, which therefore counts more than once; give it once"
    )
    assert not repeated_teacher_lines(load_teachers([one, other]))


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
    found = compare_ensemble(TASK, selection, [0.8, 0.85], ["a", "b"], ensemble_BC, finetuned_BC)
    assert (found.majority, found.finetuned, found.ensemble) == (0.5, 0.7, 0.9)
    assert (found.best_name, found.best_teacher, found.rows) == ("b", 0.85, 200)
    assert found.gap == pytest.approx(0.2)
    assert found.verdict == "yes"
    alike = compare_ensemble(
        TASK, selection, [0.8], ["a"], ensemble_BC, answers(labels_B, slice(1, 21))
    )
    assert alike.verdict == "cannot be told from so few rows"
    alone = compare_ensemble(TASK, selection, [0.8], ["a"], ensemble_BC, None)
    assert alone.finetuned is None
    assert alone.gap == pytest.approx(0.4)
    assert alone.verdict == "cannot be told without a fine-tuned student"
    assert learnable_line(alone).endswith(": cannot be told without a fine-tuned student")


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
    first, second = share_lines(shares)
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


@pytest.mark.slow
def test_a_run_makes_its_own_baseline_first(distil, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(automatic, "LEAST_FINETUNING", 4)
    monkeypatch.setattr(automatic, "EPOCHS", 0)
    given = words(tmp_path / "run", "max_steps=20", "feature_loss=minilm", "method=null")
    run = distil(given)
    log = (run / "log.txt").read_text()
    assert f"student to compare with is trained first: 4 steps without teachers, in {run}" in log
    # the baseline has a log of its own
    assert "no teachers: " not in log
    told = (run / "baseline" / "log.txt").read_text()
    assert "no teachers: " in told
    assert "student to compare with is trained first" not in told
    own = read(run / "baseline" / "run_summary.json")
    assert (own["steps"], own["finished"], own["teacher_forwards"]) == (4, True, 0)
    # it is the run of method=finetune, and the student is the one of a run without it
    fine = distil(words(tmp_path / "fine", "method=finetune", "num_train_epochs=null"))
    assert model_bytes(fine) == model_bytes(run / "baseline")
    keys = ("feature_loss=minilm", "method=null", "baseline=null")
    plain = distil(words(tmp_path / "plain", "max_steps=20", *keys))
    assert model_bytes(run) == model_bytes(plain)
    assert not (plain / "baseline").exists()
    before = read(fine / "scores.json")["splits"]
    told = read(run / "learnable.json")
    assert told["finetuned"] == before["selection"]["student"]["accuracy"]
    validation = before["validation"]["student"]["accuracy"]
    assert told["splits"]["validation"]["finetuned"] == validation
    # given again it is finished, and nothing is made twice
    capsys.readouterr()
    distil(given)
    assert "finished: nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_makes_its_baseline_goes_on_there(
    distil, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(automatic, "LEAST_FINETUNING", 4)
    monkeypatch.setattr(automatic, "EPOCHS", 0)
    given = words(tmp_path / "run", "max_steps=20")
    run = tmp_path / "run"

    class StopInTheBaseline(StopFlag):
        def agreed_with(self, world, more):
            if (run / "baseline" / "run.json").is_file():
                self.signal = signal.SIGTERM
            return super().agreed_with(world, more)

    distill(load_config(given), ALONE, stop=StopInTheBaseline())
    assert (run / "baseline" / "run.json").is_file()
    assert not is_finished(run / "baseline")
    distil(given)
    assert is_finished(run / "baseline")
    assert is_finished(run)
    # of another run's baseline nothing stays
    for name in ("run_summary.json", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    distil(words(tmp_path / "run", "max_steps=20", "seed=1"))
    assert read(run / "baseline" / "run.json")["identity"]["config"]["seed"] == 1


def test_a_baseline_that_would_take_long_is_not_made(distil, words, tmp_path):
    run = distil(words(tmp_path / "run", "max_steps=1"))
    assert read(run / "learnable.json")["finetuned"] is None
    log = (run / "log.txt").read_text()
    assert (
        "the run makes no fine-tuned student to compare with: its 200 steps are more than a fifth"
        in log
    )
    assert "train one with method=finetune and give baseline=RUN_DIR" in log
    off = distil(words(tmp_path / "off", "max_steps=1", "teacher_validation=off"))
    assert not (off / "learnable.json").exists()
    assert "fine-tuned student" not in (off / "log.txt").read_text()


def test_a_baseline_that_cannot_be_compared_is_refused_before_work(
    finetuned, distil, words, tmp_path
):
    def refused(says, baseline, *more):
        with pytest.raises(UserError, match=says) as caught:
            distil(words(tmp_path / "new", f"baseline={baseline}", "max_steps=1", *more))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new" / "run.json").exists()

    refused("is not a finished run; give the folder of one, auto or null", tmp_path / "nowhere")
    refused(r"lacks \d+ of this run\'s \d+ selection rows", finetuned, "selection.seed=7")
    taught = distil(words(tmp_path / "taught", "max_steps=1"))
    refused("was trained with teachers; give a run of method=finetune", taught)


@pytest.mark.slow
def test_two_ranks_make_the_baseline_together(words, tmp_path):
    given = words(tmp_path / "run", "max_steps=1350", "global_batch_size=4", "micro_batch_size=2")
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    own = read(tmp_path / "run" / "baseline" / "run_summary.json")
    assert (own["finished"], own["steps"], own["world_size"]) == (True, 270, 2)
    assert read(tmp_path / "run" / "learnable.json")["finetuned"] is not None
    assert is_finished(tmp_path / "run")


def logits_of(rights_NB, labels_B):
    """logits_NBC of teachers that give the gold label where they are right."""
    said_NB = np.where(rights_NB, labels_B, 1 - labels_B)
    return np.eye(2, dtype=np.float32)[said_NB] * 2


def test_fitted_weights_stand_beside_equal_ones(selection):
    labels_B, rows = selection.labels_B, np.arange(200)
    # one is right in nine rows of ten, two are wrong together in four of ten
    rights_NB = np.stack([rows % 10 != 9, rows % 10 > 3, rows % 10 > 3])
    logits_NBC = logits_of(rights_NB, labels_B)
    found = second_ensemble(TASK, selection, ["a", "b", "c"], logits_NBC)
    assert (found.rows, found.equal, found.fitted) == (200, 0.6, 0.9)
    assert found.weights["a"] > 0.5
    assert sum(found.weights.values()) == pytest.approx(1)
    assert found.gap == pytest.approx(0.3)
    assert found.interval[0] > 0
    line = second_ensemble_line(found, "accuracy")
    assert "200 selection rows: equal weights 0.6000, fitted weights 0.9000 (+0.3000" in line
    assert f"(ensemble=fitted): a {found.weights['a']:.3f}, b " in line
    # too few rows that all answer, or one teacher alone
    logits_NBC[0, 0] = np.nan
    assert second_ensemble(TASK, selection, ["a", "b", "c"], logits_NBC) is None
    assert second_ensemble(TASK, selection, ["b"], logits_NBC[1:2]) is None


def test_fitted_weights_are_not_scored_on_the_rows_that_they_are_fitted_to(selection):
    chance = np.random.default_rng(0)
    logits_NBC = chance.normal(size=(100, 200, 2)).astype(np.float32)
    names = [f"t{n}" for n in range(100)]
    found = second_ensemble(TASK, selection, names, logits_NBC)
    weights_N = fit(names, logits_NBC, selection.labels_B)
    answer_BC = weighted(TASK, weights_N, logits_NBC)
    flattered = float((answer_BC.argmax(1) == selection.labels_B).mean())
    assert flattered > 0.62
    assert found.fitted < 0.5


def test_a_run_tells_of_fitted_weights_in_log_record_and_card(distil, words, tmp_path):
    half = ("selection.fraction=0.5", "max_steps=1")
    run = distil(words(tmp_path / "run", *half))
    second = read(run / "learnable.json")["second"]
    assert second["rows"] == 200
    assert second["equal"] == pytest.approx(read(run / "learnable.json")["ensemble"])
    log = (run / "log.txt").read_text()
    told = f"equal weights {second['equal']:.4f}, fitted weights {second['fitted']:.4f}"
    assert log.count(told) == 1
    in_card = f"{second['equal']:.4f} with equal weights and {second['fitted']:.4f} with fitted"
    assert in_card in (run / "README.md").read_text()
    fitted = distil(words(tmp_path / "fitted", *half, "method=null", "ensemble=fitted"))
    assert read(fitted / "learnable.json")["second"] is None
    assert "equal weights" not in (fitted / "log.txt").read_text()
    kept = read(fitted / "ensemble.json")["weights"]
    assert list(second["weights"].values()) == pytest.approx(kept, abs=1e-3)
