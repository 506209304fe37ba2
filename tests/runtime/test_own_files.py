"""A run writes its own files only; a person's files, links, devices and pipes stay what they are."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from small import words, write_task

from sead_dist.cli.demo import configure, write_inputs
from sead_dist.config.load import load_config
from sead_dist.config.registered import kept_paths, load_plugins
from sead_dist.errors import UserError
from sead_dist.runs.claim import holds_run, keep_plugins, try_lock
from sead_dist.runtime.files import (
    check_writable,
    open_own,
    sweep_leftovers,
    sweep_old,
    written_aside,
)
from sead_dist.runtime.run_log import RunLog, tell, write_json, write_json_for_person
from sead_dist.slurm.settings import load_settings
from sead_dist.slurm.submit import job_folder


@pytest.fixture
def foreign(tmp_path):
    """A file that belongs to no run."""
    path = tmp_path / "foreign.txt"
    path.write_text("somebody's")
    return path


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path, foreign):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(foreign)
    with (
        pytest.raises(UserError, match=r"\.lock is a link, a pipe or a device"),
        try_lock(tmp_path / "run" / ".lock"),
    ):
        pass
    assert foreign.read_text() == "somebody's"


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "progress.json"])
def test_files_that_a_run_adds_to_are_never_reached_through_a_link(tmp_path, foreign, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(foreign)
    refused = pytest.raises(UserError, match="is a link, a pipe or a device")
    with refused, RunLog(tmp_path / "run", is_main=True, console=False) as log:
        tell("a line")
        log.step_done(1, 2)
    assert foreign.read_text() == "somebody's"


def test_a_kept_plugin_is_never_written_through_a_link(tmp_path, foreign):
    (tmp_path / "mine.py").write_text("A = 1\n")
    load_plugins([str(tmp_path / "mine.py")])
    (kept,) = kept_paths([str(tmp_path / "mine.py")], tmp_path / "run")
    Path(kept).parent.mkdir(parents=True)
    Path(kept).symlink_to(foreign)
    keep_plugins([str(tmp_path / "mine.py")], tmp_path / "run")
    assert Path(kept).read_text() == "A = 1\n"
    assert foreign.read_text() == "somebody's"


def test_a_kept_plugin_stays_whole_where_another_cannot_be_written(tmp_path, monkeypatch):
    mine, run = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text("B = 1\n")
    load_plugins([str(mine)])
    (run / "plugins").mkdir(parents=True)
    (run / "plugins" / "mine.py").write_text("B = 0\n")

    def full(path, _bytes):
        path.write_text("B")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            keep_plugins([str(mine)], run)
    assert [path.read_text() for path in (run / "plugins").iterdir()] == ["B = 0\n"]
    keep_plugins([str(mine)], run)
    assert [path.read_text() for path in (run / "plugins").iterdir()] == ["B = 1\n"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir()])
def test_a_pipe_or_folder_in_the_place_of_a_file_is_told_and_not_waited_for(tmp_path, make):
    make(tmp_path / "log.txt")
    with pytest.raises((UserError, IsADirectoryError)):
        open_own(tmp_path / "log.txt", os.O_WRONLY | os.O_APPEND)


def test_a_file_written_aside_takes_the_place_of_a_link_and_not_of_its_target(tmp_path, foreign):
    (tmp_path / "scores.json").symlink_to(foreign)
    write_json(tmp_path / "scores.json", {"a": 1})
    assert not (tmp_path / "scores.json").is_symlink()
    assert foreign.read_text() == "somebody's"


def test_the_name_aside_cannot_be_guessed_and_nothing_stays_of_it(tmp_path):
    names = []
    for _ in range(2):
        with written_aside(tmp_path / "a.json") as aside:
            aside.write_text("{}")
            names.append(aside.name)
    assert names[0] != names[1]
    assert not any(str(os.getpid()) in name for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    # a name as long as the file system takes
    with written_aside(tmp_path / ("a" * 255)) as aside:
        aside.write_text("whole")
    assert (tmp_path / ("a" * 255)).read_text() == "whole"


def test_a_link_that_a_person_names_stays_and_its_target_is_written(tmp_path, foreign):
    link = tmp_path / "link.json"
    link.symlink_to(foreign)
    check_writable("--json", link)
    write_json_for_person(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(foreign.read_text()) == {"a": 1}


def test_a_pipe_that_a_person_names_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    check_writable("--json", pipe)
    write_json_for_person(pipe, {"a": 1})
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1}
    assert pipe.is_fifo()


def test_a_device_that_a_person_names_is_written_into(tmp_path):
    # a terminal of the test's own: no file can take its place
    ours, theirs = os.openpty()
    device = Path(os.ttyname(theirs))
    check_writable("--json", device)
    write_json_for_person(device, {"a": 1})
    assert json.loads(os.read(ours, 100)) == {"a": 1}
    assert device.is_char_device()
    os.close(ours)
    os.close(theirs)
    with pytest.raises(UserError, match="does not exist"):
        check_writable("--json", tmp_path / "none" / "a.json")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_an_empty_folder_of_another_user_is_refused_before_it_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 12345, 12345)
    with pytest.raises(UserError, match="belongs to user 12345"):
        holds_run(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_the_demo_writes_over_nothing(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "train.tsv").write_text("mine")
    with pytest.raises(UserError, match="holds other files; give a new or an empty folder"):
        write_inputs(tmp_path, seed=0)
    assert (tmp_path / "task" / "train.tsv").read_text() == "mine"
    # a start that was killed is gone on with
    write_inputs(tmp_path / "demo", seed=0)
    (tmp_path / "demo" / "shapes" / "student.yaml").unlink()
    write_inputs(tmp_path / "demo", seed=0)
    assert (tmp_path / "demo" / "shapes" / "student.yaml").is_file()


def test_the_demo_s_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a, [b: 'c'"
    encoders = [folder / "one, two.yaml", folder / "three.yaml"]
    folder.mkdir()
    for file in encoders:
        file.touch()
    config = configure(folder, ["seed=3"], {"encoders": encoders, "output_dir": folder / "run"})
    assert [entry.path for entry in config.encoders] == [str(path) for path in encoders]
    assert (config.output_dir, config.data.path) == (str(folder / "run"), str(folder / "task"))
    assert (config.seed, config.store.path) == (3, str(folder / "store"))


def test_the_demo_goes_on_in_a_folder_in_which_its_text_has_the_older_name(tmp_path):
    write_inputs(tmp_path, seed=0)
    text = tmp_path / "task" / "unlabeled.tsv"
    written = text.read_bytes()
    text.rename(tmp_path / "task" / "transfer.tsv")
    write_inputs(tmp_path, seed=0)
    assert text.read_bytes() == written
    # the older runs' configurations name it
    assert (tmp_path / "task" / "transfer.tsv").read_bytes() == written
    for name in ("unlabeled", "transfer"):
        (tmp_path / "task" / f"{name}.tsv").unlink()
    with pytest.raises(
        UserError, match=r"lacks a file of the demo, task.unlabeled.tsv; give a new"
    ):
        write_inputs(tmp_path, seed=0)


def test_a_line_end_never_becomes_a_line_of_a_job(tmp_path):
    with pytest.raises(UserError, match=r"partition='a.ntouch x': expected a text without line"):
        load_settings(None, {"partition": "a\ntouch x"})
    with pytest.raises(UserError, match="expected a text without line"):
        load_config([*words(write_task(tmp_path / "d"), [], tmp_path / "run"), "output_dir=a\nb"])
    with pytest.raises(UserError, match="has a line break in its name"):
        job_folder(tmp_path / "a\nb")
    (tmp_path / "more.yaml").write_text("setup:\n  - |\n    module load a\n    module load b\n")
    assert "\n" in load_settings(str(tmp_path / "more.yaml"), {}).setup[0]


def test_what_killed_processes_leave_in_the_users_cache_is_swept_after_a_day(tmp_path):
    key, drawn = "0" * 64, "1" * 16
    old = [f".{drawn}.aside", f".{drawn}.aside.json", f".{key}.{drawn}.aside", f"{key}.77.tmp"]
    others = [key, "mine.tmp", ".aside", f".mine.{drawn}.aside-older"]
    for name in (*old, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    sweep_old(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(old) + len(others)
    before = time.time() - 25 * 3600
    for name in (*old, *others):
        os.utime(tmp_path / name, (before, before))
    file = tmp_path / f"{key}.78.tmp"
    file.touch()
    os.utime(file, (before, before))
    sweep_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_what_killed_runs_leave_behind_is_swept(tmp_path):
    left = [
        tmp_path / ".0123456789abcdef.aside.json",
        tmp_path / "model" / ".0123456789abcdef.aside.safetensors",
        tmp_path / ".trial-abc" / "model.safetensors",
        tmp_path / ".rehearsal-abc" / "scores.json",
        tmp_path / "checkpoints" / "step-00000004.tmp" / "optimizer.pt",
        tmp_path / "checkpoints" / "trial" / "optimizer.pt",
        tmp_path / ".onnx.12.aside" / "model.onnx",
        tmp_path / "model.tmp" / "model.safetensors",  # of versions before the names with a dot
        tmp_path / ".model.0123456789abcdef.aside-older" / "model.safetensors",
        tmp_path / "checkpoints" / ".step-00000002.01234567.aside-older" / "optimizer.pt",
    ]
    kept = [
        tmp_path / "checkpoints" / "step-00000002" / "optimizer.pt",
        tmp_path / "model" / "model.safetensors",
        tmp_path / ".lock",
    ]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    sweep_leftovers(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
    assert not (tmp_path / ".trial-abc").exists()
