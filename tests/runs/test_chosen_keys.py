"""What a run takes for keys that are left to it: told first in the log, kept in summary and card."""

import re

import torch
from safetensors.torch import load_file
from small import ALONE, read

from sead_dist.config import automatic
from sead_dist.config.load import load_config
from sead_dist.data.tasks import load_task
from sead_dist.models.pretrained import load_tokenizer
from sead_dist.models.start import student_tokenizer
from sead_dist.models.student import build_student
from sead_dist.runs.shown import resolve_all
from sead_dist.teachers.rates import Rate, default_rates, remember, student_key, this_machine


def said(run):
    return (run / "log.txt").read_text().splitlines()


LEFT = ("num_train_epochs=null", "learning_rate=null", "eval_steps=20")


def test_a_run_with_nothing_said_tells_first_what_it_takes(distil, words, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "LEAST_STEPS", 4)
    # 360 training rows, 32 a step: three passes
    run = distil(words(tmp_path / "run", *LEFT))
    first, second, third = said(run)[:3]
    assert "36 steps (automatic: three passes over 360 rows, at least 4, at most 30000;" in first
    assert "about" not in first
    assert "never reached" not in second
    assert "learning_rate=0.0003 (automatic: the student's width is 32)" in second
    assert "the mean of the weights of the last 7 of 36 steps (automatic: 40 selection" in third
    chosen = {"max_steps": 36, "learning_rate": 3e-4, "final_checkpoint": "average"}
    summary = read(run / "run_summary.json")
    assert summary["chosen"] == chosen
    assert summary["steps"] == summary["best_step"] == 36
    scores = read(run / "scores.json")["splits"]["selection"]["student"]
    assert summary["best_metric"] == scores["accuracy"]
    card = (run / "README.md").read_text()
    for line in ("max_steps: 36", "learning_rate: 0.0003", "final_checkpoint: average"):
        assert f"\n{line}\n" in card
    assert "the checkpoint was chosen on it" not in card


def test_the_time_is_told_where_the_students_rate_is_known(distil, words, tmp_path):
    given = load_config(words(tmp_path / "run"))
    tokenizer = load_tokenizer(student_tokenizer(given.student, given.teachers))
    task = load_task(given.task)
    student = build_student(given.student, task, tokenizer, 0)
    key = student_key(student, given, task.kind, this_machine(torch.device("cpu")))
    remember(default_rates(), {key: Rate((8, 64), (0.5, 4.0), batch_s=1.0, once_s=1.0)})
    _, notes = resolve_all(load_config(words(tmp_path / "run", "max_steps=2")), ALONE)
    run = distil(words(tmp_path / "run", "max_steps=2"))
    for note, line in zip(notes[-3:], said(run)[:3], strict=True):
        assert line.endswith(note)
    assert "2 steps (max_steps; num_train_epochs=1 is not used); about " in said(run)[0]
    more = ("max_steps=2", "num_train_epochs=null", "warmup_steps=5")
    length, rate, _ = resolve_all(load_config(words(tmp_path / "run", *more)), ALONE)[1][-3:]
    assert "2 steps (max_steps); about" in length
    assert rate.endswith("; WARNING: it is never reached: warmup_steps=5, and the run has 2 steps")
    assert "s of training, at the rate that `plan` measured here" in said(run)[0]
    early = ("max_steps=2", "early_stopping_patience=1")
    length = resolve_all(load_config(words(tmp_path / "run", *early)), ALONE)[1][-3]
    assert re.search(r"not fallen for .*; at most about [\d.]+ s of training", length)


def test_sead_with_one_teacher_says_that_it_is_single(distil, words, teachers, tmp_path):
    one = (f"teachers=[{teachers[0]}]", "max_steps=3")
    run = distil(words(tmp_path / "one", *one))
    line = "with one teacher it trains the same student as method=single"
    assert line in "\n".join(said(run))
    single = distil(words(tmp_path / "single", *one, "method=single"))
    weights = [load_file(of / "model" / "model.safetensors") for of in (run, single)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)
    card = (run / "README.md").read_text()
    assert "single" in card.split("# ", 1)[1].splitlines()[0]
    assert "method sead" not in card
    both = distil(words(tmp_path / "both", "max_steps=3"))
    assert line not in "\n".join(said(both))
