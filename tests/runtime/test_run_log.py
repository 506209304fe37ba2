"""The run directory's own files and the console."""

import io
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sead_dist.errors import UserError
from sead_dist.runtime import console
from sead_dist.runtime.files import written_aside
from sead_dist.runtime.run_log import (
    RunLog,
    environment,
    noted,
    read_if_written,
    read_json,
    read_metrics,
    tell,
    write_json,
)


def open_log(folder, is_main=True, console=False):
    return RunLog(folder, is_main=is_main, console=console)


def test_each_record_is_on_disk_as_soon_as_it_is_given(tmp_path):
    log = open_log(tmp_path / "run")
    log.metrics("train", step=1, loss=np.float32(0.5), agreement={"a": np.float64(0.25)})
    assert read_metrics(tmp_path / "run") == [
        {"event": "train", "step": 1, "loss": 0.5, "agreement": {"a": 0.25}}
    ]
    log.metrics("eval", step=1, split="selection", metrics={"accuracy": float("nan")})
    line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1]
    assert json.loads(line, parse_constant=pytest.fail)["metrics"] == {"accuracy": None}


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    log = open_log(tmp_path / "run", is_main=False, console=True)
    log.metrics("train", step=1)
    with log:
        tell("hello")
        log.truncate_after(0)
        with log.progress("steps", total=2) as bar:
            bar.advance(2)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tail", ['{"event": "tra', '{"event"', "{}x", "7"])
def test_a_torn_last_line_is_passed_over_and_cut_on_opening(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n' + tail)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    open_log(tmp_path).metrics("train", step=2)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    assert path.read_text().count("\n") == 2


def test_a_whole_last_line_without_its_line_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1}')
    open_log(tmp_path).metrics("train", step=2)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_a_bad_line_before_the_last_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 "):
        read_metrics(tmp_path)


def test_no_metrics_file_gives_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_has_no_step_twice(tmp_path):
    log = open_log(tmp_path)
    log.metrics("start", world_size=1)
    for step in range(1, 6):
        log.metrics("train", step=step)
    log.metrics("eval", step=5)
    log.close()
    log = open_log(tmp_path)
    log.truncate_after(3)
    log.metrics("train", step=4)
    records = read_metrics(tmp_path)
    assert [r.get("step") for r in records] == [None, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_goes_to_the_console_whole_and_into_the_log_file(tmp_path, capsys):
    line = "teacher [bold]a[/bold] " + "x" * 200
    with open_log(tmp_path, console=True):
        tell(line)
    assert capsys.readouterr().out == line + "\n"
    assert (tmp_path / "log.txt").read_text().endswith(f" {line}\n")


def test_console_off_still_writes_the_log_file(tmp_path, capsys):
    with open_log(tmp_path):
        tell("hello")
    assert capsys.readouterr().out == ""
    assert "hello" in (tmp_path / "log.txt").read_text()


def lines_of(folder):
    """The lines of a run's log.txt, without their times."""
    return [line.split(" ", 2)[2] for line in (folder / "log.txt").read_text().splitlines()]


def test_lines_go_to_the_log_of_the_open_run_and_after_its_end_or_failure_to_the_logger(
    tmp_path, caplog
):
    caplog.set_level("INFO", logger="sead_dist")
    logger = logging.getLogger("sead_dist")
    before = (list(logger.handlers), list(logger.filters), logger.level, logger.propagate)
    tell("before")
    with open_log(tmp_path / "a"):
        tell("of a")
    tell("between")
    with pytest.raises(ValueError, match="stop"), open_log(tmp_path / "b"):
        tell("of b")
        raise ValueError("stop")
    tell("after")
    assert (lines_of(tmp_path / "a"), lines_of(tmp_path / "b")) == (["of a"], ["of b"])
    assert caplog.messages == ["before", "of a", "between", "of b", "after"]
    assert (list(logger.handlers), list(logger.filters), logger.level, logger.propagate) == before


def test_a_run_inside_another_has_lines_of_its_own(tmp_path):
    with open_log(tmp_path / "outer"):
        tell("one")
        with pytest.raises(ValueError, match="stop"), open_log(tmp_path / "inner"):
            tell("two")
            raise ValueError("stop")
        tell("three")
    assert lines_of(tmp_path / "outer") == ["one", "three"]
    assert lines_of(tmp_path / "inner") == ["two"]


def test_runs_of_two_threads_have_lines_of_their_own(tmp_path):
    def work(name):
        with open_log(tmp_path / name):
            for n in range(50):
                tell(f"{name} {n}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, "ab"))
    for name in "ab":
        assert lines_of(tmp_path / name) == [f"{name} {n}" for n in range(50)]


@pytest.mark.parametrize("off", ["level", "disable", "disabled", "filter"])
def test_the_log_file_has_every_line_whatever_the_callers_logging_lets_through(
    tmp_path, caplog, monkeypatch, request, off
):
    logger = logging.getLogger("sead_dist")
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    caplog.set_level("ERROR" if off == "level" else "INFO", logger="sead_dist")
    logging.disable(logging.CRITICAL if off == "disable" else logging.NOTSET)
    monkeypatch.setattr(logger, "disabled", off == "disabled")
    monkeypatch.setattr(logger, "filters", [lambda _record: False] if off == "filter" else [])
    with open_log(tmp_path):
        tell("hello")
    assert lines_of(tmp_path) == ["hello"]
    assert caplog.messages == []


def test_a_line_that_any_rank_may_tell_is_logged_by_other_ranks_and_written_by_rank_0(
    tmp_path, caplog
):
    caplog.set_level("INFO", logger="sead_dist")
    with open_log(tmp_path / "run", is_main=False, console=True):
        tell("of rank 0 alone")
        tell("a bad block", any_rank=True)
    assert not (tmp_path / "run").exists()
    assert [(record.getMessage(), record.aside) for record in caplog.records] == [
        ("a bad block", True)
    ]
    with open_log(tmp_path / "run", console=True):
        tell("a bad block", any_rank=True)
    assert lines_of(tmp_path / "run") == ["a bad block"]
    tell("another", any_rank=True)
    assert [record.aside for record in caplog.records] == [True, False]


def test_noted_lines_go_nowhere_else(tmp_path, caplog):
    caplog.set_level("INFO", logger="sead_dist")
    with open_log(tmp_path):
        with pytest.raises(ValueError, match="stop"), noted() as notes:
            tell("kept")
            raise ValueError("stop")
        tell("told")
    assert notes == ["kept"]
    assert lines_of(tmp_path) == caplog.messages == ["told"]


def test_a_warning_of_the_package_is_logged_and_is_not_in_the_log_file(tmp_path, caplog):
    with open_log(tmp_path):
        logging.getLogger("sead_dist.data.text_files").warning("it is quoted")
        tell("a line")
    assert lines_of(tmp_path) == ["a line"]
    assert "it is quoted" in caplog.messages


def test_progress_without_a_terminal_is_a_line_every_tenth(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(console, "monotonic", lambda: float(next(clock)))
    with open_log(tmp_path, console=True).progress("steps", total=200, done=95) as bar:
        for step in range(96, 201):
            bar.update(loss=step / 1000, note="x")
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "100/200",
        "120/200",
        "140/200",
        "160/200",
        "180/200",
        "200/200",
    ]
    # five steps of two seconds each are done, a hundred are left
    assert lines[0] == "steps: 100/200 (50%) loss=0.1 note=x left=3.33 min"
    assert "left=" not in lines[-1]


def test_the_first_line_of_long_work_comes_after_half_a_minute(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(console, "monotonic", lambda: float(next(clock)))
    with open_log(tmp_path, console=True).progress("steps", total=1000) as bar:
        for _ in range(60):
            bar.advance()
    assert capsys.readouterr().out == "steps: 15/1000 (1%) left=32.8 min\n"


def test_a_line_of_progress_has_the_time_left_that_the_caller_gives(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 31))
    monkeypatch.setattr(console, "monotonic", lambda: float(next(clock)))
    with open_log(tmp_path, console=True).progress("steps", total=1000) as bar:
        bar.advance(1, 100.0)
    assert capsys.readouterr().out == "steps: 1/1000 (0%) left=100 s\n"


def test_fast_work_without_a_terminal_says_only_that_it_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "monotonic", lambda: 0.0)
    with open_log(tmp_path, console=True).progress("validation", total=7) as bar:
        bar.advance(3)
        bar.advance(4)
    assert capsys.readouterr().out == "validation: 7/7 (100%)\n"


def test_progress_in_a_terminal_is_a_bar_that_ends_with_the_block(tmp_path):
    log = open_log(tmp_path, console=True)
    screen = io.StringIO()
    log.console = Console(file=screen, force_terminal=True, width=120)
    with (
        pytest.raises(ValueError, match="stop"),
        log,
        log.progress("steps", total=4) as outer,
        log.progress("rows", total=2) as inner,
    ):
        outer.advance()
        outer.update(loss=0.123456)
        inner.advance(2)
        tell("between")
        raise ValueError("stop")
    text = screen.getvalue()
    assert "1/4" in text
    assert "2/2" in text
    assert "loss=0.1235" in text
    assert "between" in text
    assert text.count("\x1b[?25l") >= 1  # the cursor is hidden while the bar lives
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # and shown again


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run_summary.json"
    write_json(path, {"steps": np.int64(3), "rates": np.array([1.5, np.inf]), "at": tmp_path})
    assert read_json(path) == {"steps": 3, "rates": [1.5, None], "at": str(tmp_path)}
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert read_json(path)["steps"] == 3
    assert os.listdir(tmp_path) == ["run_summary.json"]


def test_json_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"scores\.json is missing"):
        read_json(tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"scores\.json is not JSON"):
        read_json(tmp_path / "scores.json")


def test_environment_tells_versions_and_nothing_private(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    found = environment()
    assert found["versions"]["numpy"] == np.__version__
    assert found["cpu_count"] == os.cpu_count()
    text = json.dumps(found)
    assert "hf_abcdefghijklmnop" not in text
    assert os.path.expanduser("~") not in text
    assert os.uname().nodename not in text


def test_a_file_that_is_written_while_it_is_looked_for_is_missing_and_no_mistake(
    tmp_path, monkeypatch
):
    path = tmp_path / "student.json"

    def missing_then_written(self, *_):
        monkeypatch.undo()
        path.write_text('{"store": "a"}')
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", missing_then_written)
    assert read_if_written(dict[str, str], path) is None
    assert read_if_written(dict[str, str], path) == {"store": "a"}
    path.write_text("[")
    with pytest.raises(UserError, match=r"student\.json is not JSON"):
        read_if_written(dict[str, str], path)
