"""What the packages below tell is printed inside of a command, and nowhere else."""

import logging

import pytest

from sead_dist.cli.exits import attempt, lines_shown
from sead_dist.runtime.run_log import tell, tell_table

BELOW = logging.getLogger("sead_dist.runs.checks")


def tell_all():
    tell("\na line of [red]")
    tell("beside the result", aside=True)
    tell_table("Scores", ["model", "accuracy"], [["student", 0.92661]])
    BELOW.warning("%s leaves out %s", "a", "b")


def test_a_command_prints_what_is_told_on_its_stream_and_only_once(capsys):
    with lines_shown():
        assert attempt(tell_all) is None
    said = capsys.readouterr()
    assert said.out.startswith("\na line of [red]\nScores")
    assert "│ student │   0.9266 │" in said.out
    assert said.err == "beside the result\na leaves out b\n"


def test_outside_of_a_command_nothing_is_printed_and_the_logger_has_it(capsys, caplog):
    assert attempt(lambda: None) is None  # it leaves the logger as it was
    caplog.set_level("INFO", logger="sead_dist")
    tell_all()
    assert capsys.readouterr() == ("", "")
    assert caplog.messages[:2] == ["\na line of [red]", "beside the result"]
    assert "| student | 0.9266 |" in caplog.messages[2]


def test_a_closed_pipe_is_left_to_the_command(monkeypatch):
    def closed(*_words, **_where):
        raise BrokenPipeError

    with lines_shown(), pytest.raises(BrokenPipeError):
        monkeypatch.setattr("builtins.print", closed)
        tell("a line")
