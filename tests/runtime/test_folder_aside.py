"""A folder is written aside and takes its place whole, whatever goes wrong and whenever it is killed."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sead_dist.runtime.files import folder_aside, put_folder, remove_folder, sweep_leftovers


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "one").write_text(text)
    (path / "two").write_text(text)
    return path


def held(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


OLD, NEW = {"one": "old", "two": "old"}, {"one": "new", "three": "new"}


def write_new(target: Path, replaces: bool = True) -> None:
    with folder_aside(target, replaces) as aside:
        for name, text in NEW.items():
            (aside / name).write_text(text)


def test_a_folder_written_aside_takes_the_place_of_the_old_one(tmp_path):
    write_new(tmp_path / "model")
    assert held(tmp_path / "model") == NEW
    folder_of(tmp_path / "other", "old")
    write_new(tmp_path / "other")
    assert held(tmp_path / "other") == NEW
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]


def test_an_error_while_it_is_written_leaves_the_old_one(tmp_path):
    target = folder_of(tmp_path / "model", "old")
    with pytest.raises(OSError, match="disk"), folder_aside(target) as aside:
        (aside / "one").write_text("new")
        raise OSError("no room on the disk")
    assert held(target) == OLD
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_an_error_between_its_two_renames_puts_the_old_one_back(tmp_path, monkeypatch, error):
    target, rename = folder_of(tmp_path / "model", "old"), Path.rename

    def broken(path, to):
        if path.name.endswith(".aside"):
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(type(error)):
        write_new(target)
    assert held(target) == OLD
    assert os.listdir(tmp_path) == ["model"]


def test_without_replacing_the_folder_of_a_quicker_process_stays(tmp_path):
    target = folder_of(tmp_path / "model", "old")
    with pytest.raises(OSError, match="not empty"):
        write_new(target, replaces=False)
    assert held(target) == OLD
    assert os.listdir(tmp_path) == ["model"]
    write_new(tmp_path / "first", replaces=False)
    assert held(tmp_path / "first") == NEW


def test_a_link_in_its_place_is_replaced_and_what_it_leads_to_stays(tmp_path):
    elsewhere = folder_of(tmp_path / "elsewhere", "old")
    (tmp_path / "model").symlink_to(elsewhere)
    write_new(tmp_path / "model")
    assert held(tmp_path / "model") == NEW
    assert not (tmp_path / "model").is_symlink()
    assert held(elsewhere) == OLD
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "model"]


def killed_at(target: Path, moment: int, do: Callable[[Path], None] = write_new) -> None:
    """Write `target` again, or remove it, in a process that is killed at a step of that."""
    child = os.fork()
    if child == 0:
        left = [moment]

        def counted(step):
            def go(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return step(*args, **kwargs)

            return go

        # two renames, one of the old folder before it is removed, and its files
        os.rename, os.unlink = map(counted, (os.rename, os.unlink))
        do(target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("moment", range(3))
def test_a_kill_at_any_step_of_a_removal_leaves_the_whole_folder_or_none(tmp_path, moment):
    target = folder_of(tmp_path / "seed-1", "old")
    folder_of(tmp_path / ".seed-1.other.0123456789abcdef.aside", "another's")
    killed_at(target, moment, remove_folder)
    assert (held(target) if target.exists() else None) == [OLD, None, None][moment]
    remove_folder(target)
    assert os.listdir(tmp_path) == [".seed-1.other.0123456789abcdef.aside"]


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_at_any_step_leaves_no_part_of_a_folder(tmp_path, moment):
    target = folder_of(tmp_path / "model", "old")
    killed_at(target, moment)
    found = held(target) if target.exists() else None
    assert found == [OLD, None, NEW, NEW, NEW][moment]
    sweep_leftovers(tmp_path)
    assert held(target) == (found or OLD)
    assert os.listdir(tmp_path) == ["model"]
    write_new(target)
    assert held(target) == NEW


def test_a_part_of_an_old_folder_is_not_put_back(tmp_path):
    target = folder_of(tmp_path / "onnx", "old")
    killed_at(target, 4)
    shutil.rmtree(target)  # by the user
    sweep_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def killed_between_renames(target: Path) -> None:
    """Write `target` again in a process that is killed when its old folder has been renamed."""
    child = os.fork()
    if child == 0:
        rename = os.rename

        def killed_at_the_second(source, to):
            if str(source).endswith(".aside"):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, to)

        os.rename = killed_at_the_second
        write_new(target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not target.exists()


@pytest.mark.parametrize(
    "place", ["onnx", "model.rejected", "model/plots", "checkpoints/step-00000002"]
)
def test_the_old_folder_of_a_killed_process_is_put_back_where_leftovers_are_swept(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    target = folder_of(tmp_path / place, "old")
    killed_between_renames(target)
    sweep_leftovers(tmp_path)
    assert held(target) == OLD
    assert os.listdir(target.parent) == [target.name]


def test_a_folder_written_again_after_a_kill_is_first_the_old_one(tmp_path):
    # an export's folder, whose run no process claims any more
    target = folder_of(tmp_path / "onnx", "old")
    killed_between_renames(target)
    with pytest.raises(OSError, match="disk"), folder_aside(target):
        raise OSError("no room on the disk")
    assert held(target) == OLD
    killed_between_renames(target)
    put_folder(folder_of(tmp_path / "new", "new"), target)
    assert held(target) == {"one": "new", "two": "new"}
    left = [name for name in os.listdir(tmp_path) if name.endswith("-older")]
    assert left == []


def test_a_folder_of_a_longer_name_is_not_put_back_under_a_shorter_one(tmp_path):
    rejected = folder_of(tmp_path / "model.rejected", "old")
    killed_between_renames(rejected)
    write_new(tmp_path / "model")
    sweep_leftovers(tmp_path)
    assert (held(tmp_path / "model"), held(rejected)) == (NEW, OLD)


def test_a_folder_that_is_there_already_gets_another_name(tmp_path):
    source = folder_of(tmp_path / "model", "old")
    folder_of(tmp_path / "model.rejected", "older")
    put_folder(source, tmp_path / "model.rejected")
    assert held(tmp_path / "model.rejected") == OLD
    assert os.listdir(tmp_path) == ["model.rejected"]
