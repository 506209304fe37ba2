"""Runs without gold labels: teachers alone say what there is to learn."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ranks import finish, run_ranks
from small import (
    ALONE,
    model_bytes,
    read,
    records,
    run_distill,
    save_teacher,
    student_shape,
    sweep_words,
    words,
    write_task,
)
from test_resume import at_step, in_a_block, in_a_checkpoint, kill_ranks, start_run

import sead_dist
from sead_dist.cli.grammar import LABELS, grammar_tokenizer
from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.planning.table import plan
from sead_dist.runs.distillation import distill
from sead_dist.runs.pool_worker import teach
from sead_dist.runs.teacher_labels import write_labels, write_rows
from sead_dist.runtime.distributed import StopFlag
from sead_dist.sweep.run import run_sweep


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """60 training rows without a label column, 20 rows of dev whose labels are empty; two
    teachers."""
    root = tmp_path_factory.mktemp("without")
    data = write_task(root / "data")
    shutil.copytree(data, root / "gold")
    train = texts_of(data, "train")
    (data / "train.tsv").write_text("\n".join(["sentence", *train]) + "\n")
    dev = [f"{text}\t" for text in texts_of(data, "validation")]
    (data / "validation.tsv").write_text("\n".join(["sentence\tlabel", *dev]) + "\n")
    student_shape(data)
    return data, [save_teacher(root / "a"), save_teacher(root / "b", seed=1)]


def texts_of(data, split):
    return [line.split("\t")[0] for line in (data / f"{split}.tsv").read_text().splitlines()[1:]]


def given(task, output, teachers=None, **changes):
    keys = {"max_steps": 7, "eval_steps": 3, "teacher_validation": "on", **changes}
    return words(task[0], task[1] if teachers is None else teachers, output, **keys)


def run_of(task, output, teachers=None, **changes):
    return distill(load_config(given(task, output, teachers, **changes)), ALONE)


def log_of(run):
    return (run / "log.txt").read_text()


@pytest.fixture(scope="module")
def done(task, tmp_path_factory):
    return run_of(task, tmp_path_factory.mktemp("done") / "run")


def test_the_student_learns_from_the_teachers_alone_and_is_the_average(done):
    log, trained = log_of(done), records(done)
    assert "train 0 labelled + 54 unlabelled" in log
    assert log.count("no gold labels in train, selection, validation (column 'label'") == 1
    assert "if another column holds the labels, rename it to 'label'" in log
    assert (
        log.count("the selection split has no gold labels: no teacher is validated or calibrated")
        == 1
    )
    assert "final_checkpoint=average" in log
    assert "the selection split has no gold labels to choose by" in log
    assert all(line["loss_hard"] is None for line in trained)
    assert trained[-1]["loss"] == pytest.approx(trained[-1]["loss_soft"])
    assert not (done / "teacher_validation.json").exists()
    assert read(done / "ensemble.json")["weights"] == [0.5, 0.5]


def test_every_figure_is_agreement_with_the_ensemble(done):
    scores = read(done / "scores.json")
    assert scores["metric"] == "agreement"
    rows = pq.read_table(done / "predictions" / "validation.parquet").to_pydict()
    together = np.array(rows["ensemble_probabilities"]).argmax(1)
    same = float((np.array(rows["student_logits"]).argmax(1) == together).mean())
    found = scores["splits"]["validation"]
    assert found["student"] == {"agreement": pytest.approx(same)}
    assert found["ensemble"] is None
    assert set(found["teachers"][0]["metrics"]) == {"agreement"}
    assert set(rows["label"]) == {-1}
    assert set(rows["gold_label"]) == {None}
    assert read(done / "eval_results.json")["eval_agreement"] == pytest.approx(same)
    assert read(done / "run_summary.json")["best_metric"] is not None
    assert set(records(done, "eval")[0]["metrics"]) == {"agreement"}
    card = (done / "model" / "README.md").read_text()
    assert "agreement with the teachers, because there are no gold labels" in card
    assert "No teacher was validated or calibrated" in card
    assert "scores there measure agreement with the teachers" in card
    for page in (card, log_of(done), (done / "scores.json").read_text()):
        assert "accuracy" not in page
    assert "model-index" not in card


def test_the_command_line_says_agreement_and_evaluates_it_again(task, done, cli, tmp_path):
    result = cli("distill", *given(task, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "agreement with the teachers" in result.stdout
    assert "accuracy" not in result.stdout
    assert model_bytes(tmp_path / "run") == model_bytes(done)
    result = cli("evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "scores.json"))
    assert result.returncode == 0, result.stderr
    assert "eval_agreement" in result.stdout
    assert "accuracy" not in result.stdout
    again, before = read(tmp_path / "scores.json"), read(done / "eval_results.json")
    assert again["eval_agreement"] == pytest.approx(before["eval_agreement"])
    result = cli("data", *given(task, tmp_path / "other"))
    assert result.returncode == 0, result.stderr
    assert "text: train file" in result.stdout
    result = cli("distill", *given(task, tmp_path / "other"), "--print-config")
    assert result.returncode == 0, result.stderr
    assert "final_checkpoint: average" in result.stdout
    result = cli("evaluate", str(done), "--data", str(task[0].parent / "gold"))
    assert "eval_accuracy" in result.stdout


def test_python_takes_a_table_without_a_label_column(task, tmp_path):
    import pandas as pd

    frames = {
        split: pd.DataFrame({"sentence": texts_of(task[0], split)})
        for split in ("train", "validation")
    }
    run = sead_dist.distill(
        task[0] / "task.yaml", data=frames, teachers=list(map(str, task[1])),
        student=str(task[0] / "student.yaml"), output_dir=tmp_path / "run", max_steps=4,
        global_batch_size=8, micro_batch_size=4, **{"student.tokenizer": str(task[0] / "tokenizer")},
    )  # fmt: skip
    assert set(run.scores["validation"]["student"]) == {"agreement"}
    assert sead_dist.evaluate(run)["eval_agreement"] == pytest.approx(
        run.scores["validation"]["student"]["agreement"]
    )


def test_a_stopped_run_comes_to_the_same_student(task, done, tmp_path):
    stop = StopFlag()
    stop.signal = 15
    config = load_config(given(task, tmp_path / "run", save_steps=1))
    for _ in range(2):
        distill(config, ALONE, stop=stop)
        assert not (tmp_path / "run" / "model").exists()
    distill(config, ALONE)
    assert model_bytes(tmp_path / "run") == model_bytes(done)
    assert read(tmp_path / "run" / "scores.json") == read(done / "scores.json")
    made = (done / "run_summary.json").stat().st_mtime_ns
    distill(load_config(given(task, done)), ALONE)
    assert (done / "run_summary.json").stat().st_mtime_ns == made


@pytest.mark.slow
def test_invariant_06_a_run_killed_again_and_again_comes_to_the_same_student(task, done, tmp_path):
    lines = given(task, tmp_path / "run", save_steps=1, prefetch_rows=8)
    for moment in (in_a_block, in_a_checkpoint(2), at_step(5)):
        kill_ranks(tmp_path, start_run(1, tmp_path, lines), moment)
        assert not (tmp_path / "run" / "model").exists()
    finish(start_run(1, tmp_path, lines), tmp_path / "ranks", 120.0)
    assert "resuming at step" in log_of(tmp_path / "run")
    assert model_bytes(tmp_path / "run") == model_bytes(done)
    assert read(tmp_path / "run" / "scores.json") == read(done / "scores.json")


def test_two_ranks_learn_what_one_learns(task, done, tmp_path):
    run_ranks(2, tmp_path / "ranks", run_distill, given(task, tmp_path / "two"))
    ours, theirs = (records(run)[-1] for run in (tmp_path / "two", done))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    splits = [read(run / "scores.json")["splits"] for run in (tmp_path / "two", done)]
    assert splits[0]["validation"] == splits[1]["validation"]


def test_a_file_that_answers_half_the_rows_is_the_measure_on_these(task, tmp_path):
    texts = [*texts_of(task[0], "train"), *texts_of(task[0], "validation")]
    lines = [json.dumps({"sentence": t, "label": LABELS[len(t) % 2]}) for t in texts[::2]]
    (tmp_path / "gpt.jsonl").write_text("\n".join(lines) + "\n")
    entry = f"{{predictions: {tmp_path / 'gpt.jsonl'}}}"
    run = run_of(task, tmp_path / "run", [entry])
    assert read(run / "run_summary.json")["train_rows"] < 54
    found = read(run / "scores.json")["splits"]["validation"]
    assert found["teachers"] == [{"name": "gpt", "metrics": {"agreement": 1.0}, "rows": 10}]
    rows = pq.read_table(run / "predictions" / "validation.parquet").to_pydict()
    said = {text: LABELS[len(text) % 2] for text in texts[::2]}
    same = [
        said[text] == label
        for text, label in zip(rows["text_a"], rows["predicted_label"], strict=True)
        if text in said
    ]
    assert found["student"]["agreement"] == pytest.approx(np.mean(same))
    assert sead_dist.evaluate(run)["eval_agreement"] == pytest.approx(np.mean(same))
    (tmp_path / "gpt.jsonl").write_text("\n".join(lines[:20]) + "\n")
    with pytest.raises(
        UserError, match="validation has no gold labels, and no file has a prediction of"
    ):
        run_of(task, tmp_path / "none", [entry])


def test_where_dev_has_gold_labels_its_figures_are_scores(task, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(task[0], data)
    shutil.copy(task[0].parent / "gold" / "validation.tsv", data)
    run = run_of((data, task[1]), tmp_path / "run")
    scores = read(run / "scores.json")
    assert scores["metric"] == "accuracy"
    assert set(scores["splits"]["validation"]["student"]) == {"accuracy"}
    rows = pq.read_table(run / "predictions" / "validation.parquet").to_pydict()
    right = np.array(rows["ensemble_probabilities"]).argmax(1) == rows["label"]
    ensemble = scores["splits"]["validation"]["ensemble"]
    assert ensemble == {"accuracy": pytest.approx(right.mean())}
    assert set(scores["splits"]["selection"]["student"]) == {"agreement"}
    card = (run / "model" / "README.md").read_text()
    assert "model-index" in card
    assert "selection (held out of train): agreement with the teachers" in card
    # chosen on dev, which has gold labels, teachers are validated
    on_dev = run_of((data, task[1]), tmp_path / "on_dev", teacher_validation="off",
                    selection__split="dev", ensemble="score")  # fmt: skip
    assert (on_dev / "teacher_validation.json").exists()


def test_scores_of_teachers_are_a_measure_too(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, numbers in (("train", range(50)), ("validation", range(50, 60))):
        lines = [f"the plot was {n % 5} {n}" for n in numbers]
        (data / f"{name}.tsv").write_text("\n".join(["sentence", *lines]) + "\n")
    (data / "task.yaml").write_text(
        'name: marks\nkind: regression\ntext_a: "{sentence}"\nscore_range: [0, 5]\n'
    )
    student_shape(data)
    grammar_tokenizer().save_pretrained(data / "tokenizer")
    said = [f"the plot was {n % 5} {n},{n % 5}" for n in range(60)]
    (tmp_path / "marks.csv").write_text("\n".join(["sentence,score", *said]) + "\n")
    run = run_of((data, []), tmp_path / "run", [f"{{predictions: {tmp_path / 'marks.csv'}}}"])
    found = read(run / "scores.json")["splits"]["validation"]
    assert list(found["student"]) == ["agreement_pearson", "agreement_spearmanr"]
    assert found["teachers"][0]["metrics"]["agreement_pearson"] == pytest.approx(1.0)
    assert sead_dist.evaluate(run)["eval_agreement_pearson"] == pytest.approx(
        found["student"]["agreement_pearson"]
    )


@pytest.mark.parametrize("ensemble", ["score", "confidence", "answers"])
def test_weightings_by_gold_labels_count_teachers_alike(task, done, tmp_path, ensemble):
    store = done.parent / "store"
    alike = run_of(task, tmp_path / "alike", ensemble="mean_probabilities", store=store)
    run = run_of(task, tmp_path / "run", ensemble=ensemble, store=store)
    assert f"ensemble={ensemble} gives all teachers the same weight" in log_of(run)
    assert model_bytes(run) == model_bytes(alike)


REFUSED = {
    "final_checkpoint=best needs gold labels .*; leave final_checkpoint=best out": {
        "final_checkpoint": "best"
    },
    "early_stopping_patience needs gold labels": {"early_stopping_patience": 2},
    "teacher_validation=fp32 needs gold labels": {"teacher_validation": "fp32"},
    "baseline=/old needs gold labels": {"baseline": "/old"},
    "ensemble=fitted needs gold labels": {"ensemble": "fitted"},
    "ensemble=single without teacher=NAME needs gold labels .*; name one teacher": {
        "ensemble": "single"
    },
    "feature_loss without teacher=NAME needs gold labels": {"feature_loss": "distilbert"},
    "no column 'label'.*only a run with teachers": {"method": "finetune"},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_needs_gold_labels_is_refused_in_one_line(task, tmp_path, line):
    with pytest.raises(UserError, match=line) as caught:
        run_of(task, tmp_path / "run", **REFUSED[line])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_finetune_some_labels_and_a_sweep_are_refused(task, cli, tmp_path):
    keys = [
        word for word in given(task, tmp_path / "run") if not word.startswith(("teach", "stud"))
    ]
    result = cli("finetune", *keys, f"encoders=[{task[1][0]}]")
    assert result.returncode == 2
    assert "no column 'label'; its columns: sentence" in result.stderr
    data = tmp_path / "some"
    shutil.copytree(task[0], data)
    rows = [f"{t}\t{'positive' if n else ''}" for n, t in enumerate(texts_of(task[0], "train"))]
    (data / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    with pytest.raises(UserError, match="train row 1: label '' in column 'label' is outside"):
        run_of((data, task[1]), tmp_path / "run")
    teachers = ["encoders=[]", f"teachers=[{','.join(map(str, task[1]))}]", "seeds=1"]
    sweep = [f"data.path={task[0]}", *teachers, "methods=[mean,entropy]"]
    with pytest.raises(UserError, match="validation of grammar has no gold labels, and a sweep"):
        run_sweep(sweep_words(task[0], tmp_path / "sweep", *sweep), ALONE)
    shutil.copy(task[0].parent / "gold" / "validation.tsv", data)
    (data / "train.tsv").write_text((task[0] / "train.tsv").read_text())
    some = [f"data.path={data}", *teachers, "methods=[mean,finetune]"]
    with pytest.raises(UserError, match="no gold labels, and finetune has no teachers"):
        run_sweep(sweep_words(task[0], tmp_path / "sweep", *some), ALONE)


def test_labels_plan_and_a_pool_worker_know_such_runs(task, done, tmp_path):
    write_rows(load_config(given(task, tmp_path / "run", [])), tmp_path / "rows.jsonl")
    asked = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(asked) == 80
    write_labels(load_config(given(task, tmp_path / "run")), tmp_path / "soft.jsonl", ALONE)
    rows = [json.loads(line) for line in (tmp_path / "soft.jsonl").read_text().splitlines()]
    assert {row["gold_label"] for row in rows} == {None}
    plan(load_config(given(task, tmp_path / "run")), ALONE, None, None, None, False,
         tmp_path / "plan.json")  # fmt: skip
    assert read(tmp_path / "plan.json")["teacher_forwards"] == 0  # `labels` kept all
    pooled = given(task, tmp_path / "pooled", placement="pool", store=tmp_path / "pool")
    teach(load_config(pooled), "1/1", ALONE)
    distill(load_config(pooled), ALONE)
    assert model_bytes(tmp_path / "pooled") == model_bytes(done)


def test_the_page_on_teachers_says_how(task, cli, tmp_path):
    """docs/teachers.md, with a smaller student and fewer steps."""
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text("utf-8")
    block = page.split("## Without any gold label")[1].split("```console\n")[1].split("```")[0]
    texts = [f'"{text}"' for text in texts_of(task[0], "train")]
    said = [f"{text},{('Pos', 'Neg', 'unsure')[n % 3]}" for n, text in enumerate(texts)]
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *texts]) + "\n")
    (tmp_path / "gpt.csv").write_text("\n".join(["sentence,answer", *said]) + "\n")
    shutil.copy(task[0] / "task.yaml", tmp_path)
    smaller = [f"student.shape={task[0] / 'student.yaml'}", "max_steps=2", "global_batch_size=8",
               f"student.tokenizer={task[0] / 'tokenizer'}", "micro_batch_size=4"]  # fmt: skip
    for line in block.replace("\\\n", "").splitlines():
        _, command, *given_words = shlex.split(line)
        if command == "distill":
            given_words = [w for w in given_words if not w.startswith("student=")] + smaller
        result = cli(command, *given_words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "eval_agreement" in result.stdout
    assert "data.train is the only file" in log_of(tmp_path / "taught")
