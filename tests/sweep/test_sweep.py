"""Sweeps of the built-in task with tiny shapes: what runs, what is passed over, what is reported."""

import json
import os
import re
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
from ranks import finish, run_ranks, start
from small import ALONE, model_bytes, read, records, student_shape, sweep_words, write_task
from transformers.utils import logging as transformers_logging

from sead_dist.errors import RunError, UserError
from sead_dist.runs.claim import try_lock
from sead_dist.runtime.surroundings import as_before
from sead_dist.sweep import run as sweep
from sead_dist.sweep.results import without_figures
from sead_dist.sweep.run import run_sweep

METHODS = ("finetune", "mean", "single")


def work(world, words) -> None:
    """A worker's whole life (for `ranks`)."""
    run_sweep(words, world)


def runs_of(output: Path) -> list[Path]:
    return sorted(path.parent for path in output.glob("*/*/*/run.json"))


def await_path(output: Path, pattern: str, ranks) -> None:
    """Return when a path of this pattern is there. The ranks must not end before."""
    while not any(output.glob(pattern)):
        assert ranks[0].is_alive(), f"it ended before {pattern} was there"
        time.sleep(0.02)


def starts(run: Path) -> int:
    return len(records(run, "start"))


def report_of(output: Path) -> dict:
    return read(output / "report" / "report.json")


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Path:
    """A sweep's folder, done; tests only read it."""
    output = tmp_path_factory.mktemp("done") / "out"
    run_sweep(sweep_words(tiny_data, output), ALONE)
    return output


def test_every_run_is_made_and_the_report_says_what_it_scored(finished):
    folders = {str(run.relative_to(finished)) for run in runs_of(finished)}
    students = {f"grammar/{method}/seed-{seed}" for method in METHODS for seed in (0, 1)}
    assert folders == students | {f"grammar/teachers/teacher-{n}" for n in (0, 1)}
    report = report_of(finished)
    assert [task["name"] for task in report["tasks"]] == ["grammar"]
    assert report["mean_tasks"] == ["grammar"]
    assert (report["tasks"][0]["dev_rows"], report["tasks"][0]["train_rows"]) == (20, 54)
    assert (report["failed"], report["missing"], report["not_applicable"]) == ([], [], [])
    cells = {cell["method"]: cell for cell in report["cells"]}
    markdown = (finished / "report" / "report.md").read_text()
    for method in METHODS:
        runs = [finished / "grammar" / method / f"seed-{seed}" for seed in (0, 1)]
        scores = [
            read(run / "scores.json")["splits"]["validation"]["student"]["accuracy"] for run in runs
        ]
        cell = cells[method]
        assert cell["scores"] == scores
        assert cell["mean"] == pytest.approx(statistics.mean(scores))
        assert cell["spread"] == pytest.approx(statistics.stdev(scores))
        assert f"{cell['mean']:.4f} ± {cell['spread']:.4f}" in markdown
        assert cell["steps"] == 4
    assert cells["finetune"]["difference"] is None
    # two seeds tell no spread, so nothing is called larger than chance
    assert cells["mean"]["interval"] is None
    assert cells["mean"]["beyond_chance"] is None
    assert "A spread of two seeds is unsure" in markdown
    assert {row["who"] for row in report["ceilings"]} == {
        *("teacher-0", "teacher-1", "ensemble (mean_logits)")
    }


def test_a_sweep_that_is_given_again_keeps_the_encoders_of_its_pattern(
    tiny_data, tiny_task, tmp_path, caplog, capsys, shown
):
    shutil.copytree(tiny_task[1][0], tmp_path / "encoders" / "a")
    pattern = f"encoders={tmp_path / 'encoders'}/*"
    given = sweep_words(
        tiny_data, tmp_path / "out", "methods=[mean]", "seeds=1", "max_steps=1", pattern
    )
    run_sweep(given, ALONE)
    shutil.copytree(tiny_task[1][1], tmp_path / "encoders" / "b")
    capsys.readouterr()
    run_sweep(given, ALONE)
    said = capsys.readouterr().out
    assert "2 of 2 runs are done" in said
    assert "dev texts occur in" not in said  # the data are read and not told of
    assert "encoders/b, which did not exist when" in caplog.text
    assert len(runs_of(tmp_path / "out")) == 2


def test_a_call_silences_libraries_as_the_command_does_and_leaves_them_as_they_were(
    tiny_task, tmp_path, capfd
):
    task, (start, _) = tiny_task
    more = ("methods=[finetune]", "encoders=[]", "seeds=1", "max_steps=1")
    given = sweep_words(task, tmp_path / "out", *more, f"student={start}", "student.tokenizer=null")
    with as_before():
        transformers_logging.set_verbosity_info()
        transformers_logging.enable_progress_bar()
        run_sweep(given, ALONE)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    said = capfd.readouterr()
    assert said.err == ""
    assert "Model config" not in said.out


def test_what_the_runs_warn_of_stands_in_the_report_without_figures(finished):
    told = report_of(finished)["remarks"]
    small = [of for of in told if of["remark"].startswith("the selection split has 6 rows")]
    # of these only `single` chooses by so few rows: its teacher
    assert {of["method"] for of in small} == {"single"}
    assert {of["seeds"] for of in small} == {"0, 1"}
    assert all(of["remark"] in (finished / "report" / "report.md").read_text() for of in told)
    assert all(of["remark"] in (finished / "report" / "report.html").read_text() for of in told)
    assert without_figures("a on dev: accuracy +0.1 (0 to 1)") == "a on dev"
    assert without_figures("x=1 is not read: it is for y") == "x=1 is not read: it is for y"


def test_predictions_are_shared_and_each_method_is_charged_with_what_it_needs(finished):
    """Two seeds: 32 of 54 training rows each, 6 of selection, 20 of dev, by both teachers."""
    summaries = {
        (run.parent.name, run.name): read(run / "run_summary.json")
        for run in runs_of(finished)
        if run.parent.name != "teachers"
    }
    computed = sum(of["teacher_forwards"] for of in summaries.values())
    cells = {cell["method"]: cell for cell in report_of(finished)["cells"]}
    assert computed <= 2 * (54 + 6 + 20)
    assert cells["finetune"]["teacher_forwards"] == 0
    assert cells["mean"]["teacher_forwards"] == 2 * 2 * (32 + 6 + 20)
    # one teacher teaches, both are validated
    assert cells["single"]["teacher_forwards"] == 2 * (32 + 2 * (6 + 20))


def test_a_finished_run_keeps_its_model_and_no_checkpoints(finished):
    for run in runs_of(finished):
        assert (run / "model" / "config.json").is_file()
        assert not (run / "checkpoints").exists()


def test_encoders_that_no_method_reads_are_not_fine_tuned(tiny_data, tmp_path, capsys, shown):
    output = tmp_path / "out"
    given = ("seeds=1", "max_steps=1", "finetune.max_steps=1")
    run_sweep(sweep_words(tiny_data, output, *given, "methods=[finetune]"), ALONE)
    assert "grammar: no method needs a teacher, so no encoder is fine-tuned" in (
        capsys.readouterr().out
    )
    assert [str(run.relative_to(output)) for run in runs_of(output)] == ["grammar/finetune/seed-0"]
    # with a method that asks them the first one's run stays as it is
    run_sweep(sweep_words(tiny_data, output, *given, "methods=[finetune,mean]"), ALONE)
    assert "no method needs a teacher" not in capsys.readouterr().out
    assert len(runs_of(output)) == 4
    assert starts(output / "grammar" / "finetune" / "seed-0") == 1


def test_again_it_does_nothing_but_write_the_report(finished, tiny_data, capsys, shown):
    before = {run: (run / "run_summary.json").stat().st_mtime_ns for run in runs_of(finished)}
    (finished / "report" / "report.json").unlink()
    run_sweep(sweep_words(tiny_data, finished), ALONE)
    said = capsys.readouterr().out
    assert "8 of 8 runs are done" in said
    assert not re.search(r"run \d+ of", said)
    assert {run: (run / "run_summary.json").stat().st_mtime_ns for run in before} == before
    assert all(starts(run) == 1 for run in before)
    assert report_of(finished)["missing"] == []


def test_other_settings_in_the_same_folder_are_refused_before_anything_runs(finished, tiny_data):
    with pytest.raises(UserError, match="holds another run: max_steps was 4, is 5"):
        run_sweep(sweep_words(tiny_data, finished, "max_steps=5", "seeds=3"), ALONE)
    assert not (finished / "grammar" / "mean" / "seed-2").exists()
    # another method is not another setting
    before = (finished / "report" / "report.json").read_bytes()
    run_sweep(sweep_words(tiny_data, finished, "methods=[finetune]"), ALONE)
    assert report_of(finished)["methods"] == ["finetune"]
    (finished / "report" / "report.json").write_bytes(before)


def test_other_data_under_finished_runs_are_refused(finished, tiny_data, tmp_path):
    other = write_task(tmp_path / "grammar", rows=61)
    words = sweep_words(tiny_data, finished, f"data.path={other}")
    with pytest.raises(UserError, match="holds another run: the fingerprint of data"):
        run_sweep(words, ALONE)


def test_other_data_than_those_of_finished_teachers_are_refused(finished, tiny_data, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished / "grammar" / "teachers", output / "grammar" / "teachers")
    other = write_task(tmp_path / "grammar", rows=61)
    words = sweep_words(tiny_data, output, f"data.path={other}")
    with pytest.raises(UserError, match="teacher-0 holds another run: the fingerprint of data"):
        run_sweep(words, ALONE)


def test_students_of_another_number_of_teachers_are_refused(finished, tiny_data):
    shape = tiny_data / "student.yaml"
    for count, seeds in ((3, 2), (1, 3)):
        words = sweep_words(
            tiny_data, finished, f"encoders=[{','.join([str(shape)] * count)}]", f"seeds={seeds}"
        )
        with pytest.raises(
            UserError,
            match=r"mean/seed-0 holds a run with 2 teachers \(teacher-0, teacher-1\), and encoders "
            rf"has {count}; give the encoders that it began with",
        ):
            run_sweep(words, ALONE)
    assert not (finished / "grammar" / "teachers" / "teacher-2").exists()
    # a method without teachers does not depend on them
    words = sweep_words(tiny_data, finished, f"encoders=[{shape}]", "methods=[finetune]")
    before = (finished / "report" / "report.json").read_bytes()
    run_sweep(words, ALONE)
    (finished / "report" / "report.json").write_bytes(before)


def test_rows_that_an_older_version_divided_otherwise_are_refused_as_such(
    finished, tiny_data, tmp_path
):
    output = shutil.copytree(finished, tmp_path / "out")
    for record in output.glob("grammar/*/*/run.json"):
        record.write_text(record.read_text().replace('"splits": 2', '"splits": 1'))
    other = write_task(tmp_path / "grammar", rows=61)
    with pytest.raises(
        UserError,
        match=r"holds a run of other rows: its files .* splits 1, here 2\); give the files",
    ):
        run_sweep(sweep_words(tiny_data, output, f"data.path={other}"), ALONE)


@pytest.mark.slow
def test_another_command_in_the_same_folder_is_refused_though_it_began_later(
    tiny_data, tmp_path, monkeypatch
):
    """While one run is made, the other command makes the next with settings of its own."""
    output = tmp_path / "out"
    mine = sweep_words(tiny_data, output, "methods=[finetune]", "seeds=2")
    others = sweep_words(
        tiny_data, output, "methods=[finetune]", "seeds=[1]", "max_steps=3", "finetune.max_steps=4"
    )
    own, came = sweep.distill, []

    def distill(config, *given, **more):
        if not came and config.output_dir.endswith("seed-0"):
            came.append(True)
            run_sweep(others, ALONE)
        return own(config, *given, **more)

    monkeypatch.setattr(sweep, "distill", distill)
    with pytest.raises(UserError, match=r"seed-1 holds another run: max_steps was 3, is 4"):
        run_sweep(mine, ALONE)


def test_a_student_of_a_shape_takes_the_tokeniser_of_teachers_that_are_given(
    finished, tiny_data, tmp_path
):
    teachers = finished / "grammar" / "teachers" / "*"
    given = ["methods=[finetune,mean]", "encoders=[]", f"teachers={teachers}", "seeds=1"]
    words = sweep_words(tiny_data, tmp_path / "out", *given, "student.tokenizer=null")
    run_sweep(words, ALONE)
    assert len(runs_of(tmp_path / "out")) == 2


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_there(tiny_data, tmp_path, finished):
    output = tmp_path / "out"
    words = sweep_words(tiny_data, output)
    ranks = start(1, tmp_path / "ranks", work, words)
    await_path(output, "grammar/mean/seed-0/checkpoints/step-*[0-9]", ranks)
    os.kill(ranks[0].pid, signal.SIGKILL)
    ranks[0].join()
    done = [run for run in runs_of(output) if (run / "run_summary.json").is_file()]
    assert len(done) == 3
    before = {run: (run / "run_summary.json").stat().st_mtime_ns for run in done}
    run_sweep(words, ALONE)
    assert {run: (run / "run_summary.json").stat().st_mtime_ns for run in done} == before
    assert starts(output / "grammar" / "mean" / "seed-0") == 2
    for run in runs_of(output):
        assert model_bytes(run) == model_bytes(finished / run.relative_to(output)), run


@pytest.mark.slow
def test_two_workers_share_the_runs(tiny_data, tmp_path):
    output = tmp_path / "out"
    words = sweep_words(tiny_data, output)
    workers = [start(1, tmp_path / str(n), work, words) for n in (0, 1)]
    for n, ranks in enumerate(workers):
        assert finish(ranks, tmp_path / str(n), 300.0) == [None]
    assert len(runs_of(output)) == 8
    assert [starts(run) for run in runs_of(output)] == [1] * 8
    assert report_of(output)["missing"] == []


@pytest.mark.slow
def test_a_worker_waits_for_a_run_that_another_has_in_hand(tiny_data, tmp_path):
    """The other worker is this test, which ends without having done the run."""
    output = tmp_path / "out"
    held = output / "grammar" / "mean" / ".seed-1.lock"
    with try_lock(held) as taken:
        assert taken
        ranks = start(1, tmp_path / "ranks", work, sweep_words(tiny_data, output))
        await_path(output, "grammar/single/seed-1/run_summary.json", ranks)
        ranks[0].join(4.0)
        assert ranks[0].is_alive(), "it did not wait"
        assert not (output / "grammar" / "mean" / "seed-1").exists()
    assert finish(ranks, tmp_path / "ranks", 300.0) == [None]
    assert report_of(output)["missing"] == []


@pytest.mark.slow
def test_a_run_that_fails_is_written_down_and_the_others_go_on(tiny_data, tmp_path, capsys, shown):
    """Teachers of four steps know nothing, and the validation says so."""
    output = tmp_path / "out"
    words = sweep_words(tiny_data, output, "seeds=1", "methods=[mean,finetune]")
    with pytest.raises(RunError, match=r"1 of 4 runs failed: grammar mean seed 0; .*validation"):
        run_sweep([*words, "teacher_validation=on", "finetune.learning_rate=1e-9"], ALONE)
    report = report_of(output)
    (failed,) = report["failed"]
    assert (failed["task"], failed["method"], failed["seed"]) == ("grammar", "mean", 0)
    assert "failed its validation" in failed["reason"]
    assert report["missing"] == []
    assert "failed its validation" in (output / "report" / "report.md").read_text()
    assert (output / "grammar" / "finetune" / "seed-0" / "run_summary.json").is_file()
    # tried again by the same command; here with what was wrong fixed
    run_sweep([*words, "teacher_validation=off", "finetune.learning_rate=1e-9"], ALONE)
    assert report_of(output)["failed"] == []
    assert not list(output.glob("*/*/*.failed.json"))


def test_students_whose_teacher_failed_are_not_run(tiny_data, tmp_path, monkeypatch):
    """A learning rate without bounds: the second teacher's loss is not a number."""
    output = tmp_path / "out"
    broken = student_shape(tmp_path, initializer_range=1e30)
    words = sweep_words(
        tiny_data, output, "seeds=1", f"encoders=[{tiny_data / 'student.yaml'},{broken}]"
    )
    with pytest.raises(RunError, match="1 of 5 runs failed: grammar teachers seed 1"):
        run_sweep(words, ALONE)
    report = report_of(output)
    assert [row["method"] for row in report["failed"]] == ["teachers"]
    assert [row["method"] for row in report["missing"]] == list(METHODS)
    assert [str(run.relative_to(output)) for run in runs_of(output)] == [
        "grammar/teachers/teacher-0",
        "grammar/teachers/teacher-1",
    ]


@pytest.mark.slow
def test_again_with_folds_and_text_it_finds_its_runs_done(tiny_data, tmp_path, capsys, shown):
    text = f"unlabeled.path={tiny_data}/unlabeled.tsv"
    given = [
        *sweep_words(tiny_data, tmp_path / "out", text, "folds=2"),
        "methods=[mean]",
        "seeds=1",
    ]
    run_sweep(given, ALONE)
    assert "run 1 of 3" in capsys.readouterr().out
    run_sweep(given, ALONE)
    assert not re.search(r"run \d+ of", capsys.readouterr().out)


def test_one_seed_is_a_single_run_without_a_spread(tiny_data, tmp_path):
    output = tmp_path / "out"
    run_sweep(sweep_words(tiny_data, output, "seeds=1", "methods=[finetune,mean]"), ALONE)
    for cell in report_of(output)["cells"]:
        given = [cell[key] for key in ("spread", "difference", "interval", "p", "beyond_chance")]
        assert given == [None] * 5
    markdown = (output / "report" / "report.md").read_text()
    assert "Single runs" in markdown
    assert "±" not in markdown


def test_mistakes_in_what_is_given_are_found_before_the_first_run(tiny_data, tmp_path):
    output = tmp_path / "out"
    for words, line in (
        ([f"data.path={tmp_path / 'nowhere'}"], "nowhere"),
        (["student=nothing.yaml"], "file nothing.yaml does not exist"),
        (
            [f"encoders=[{tiny_data / 'student.yaml'},nothing.yaml]"],
            "file nothing.yaml does not exist",
        ),
        (["encoders=[]", f"teachers=[{tmp_path / 'none'}]"], "none"),
        (
            ["teacher=nobody"],
            "teacher=nobody is not a teacher of this run; give one of teacher-0, ",
        ),
        (
            ["per_task={grammar: {methods: {mean: {student: {path: ./none, shape: null}}}}}"],
            "./none is not a folder",
        ),
        (["precision=fp16"], "fp16"),
        (["report_to=nothing"], "nothing"),
        ([f"output_dir={tiny_data}"], "holds other files"),
    ):
        with pytest.raises(UserError, match=line):
            run_sweep(sweep_words(tiny_data, output, *words), ALONE)
    assert not output.exists()
    assert not (tiny_data / "report").exists()


@pytest.mark.slow
def test_two_ranks_take_part_in_every_run(tiny_data, tmp_path):
    """The first try is told to stop: it saves, reports what is missing, and goes on from there."""
    output = tmp_path / "out"
    words = sweep_words(tiny_data, output)
    ranks = start(2, tmp_path / "ranks", work, words)
    await_path(output, "grammar/finetune/seed-1/checkpoints/step-*[0-9]", ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert finish(ranks, tmp_path / "ranks", 300.0) == [None, None]
    before = report_of(output)
    assert before["missing"]
    assert before["ranks"] == 2
    run_ranks(2, tmp_path / "again", work, words, timeout_s=300.0)
    after = report_of(output)
    assert after["missing"] == []
    assert [starts(run) for run in runs_of(output)].count(2) <= 1
    # two ranks add up in another order; the runs are the same ones
    assert [cell["steps"] for cell in after["cells"]] == [4] * 3
    summary = json.loads((output / "grammar" / "mean" / "seed-1" / "run_summary.json").read_text())
    assert summary["world_size"] == 2
