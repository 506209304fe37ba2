"""Exit codes: 2 for a person's mistake, 3 for what the machine does not grant."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sead_dist.cli import exits
from sead_dist.cli.commands import parse
from sead_dist.cli.exits import attempt
from sead_dist.config.load import load_config
from sead_dist.data.loading import read_rows
from sead_dist.data.tasks import TASKS, load_task
from sead_dist.errors import RunError, UserError, reading, rejection
from sead_dist.models import sequence_classifier
from sead_dist.models.pretrained import Checkpoint, load_model_config
from sead_dist.runs.claim import try_lock
from sead_dist.runtime.distributed import join_world
from sead_dist.slurm.jobs import state_folder
from sead_dist.store.layout import create, store_folder


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        *((getattr(errno, name), RunError) for name in ("EACCES", "ENOSPC", "EROFS", "ENOMEM")),
        *((getattr(errno, name), UserError) for name in ("ENOENT", "ENOTDIR", "EISDIR")),
    ],
)
def test_the_same_failure_of_a_file_is_told_alike_everywhere(tmp_path, monkeypatch, number, kind):
    failure = OSError(number, os.strerror(number))
    assert type(rejection("x", failure)) is kind
    for name in ("mine.yaml", "train.tsv", "config.json"):
        (tmp_path / name).write_text("{}")

    def fail(*_args, **_more):
        raise failure

    for target, name in ((Path, "read_text"), (Path, "read_bytes"), (Path, "mkdir"), (os, "open")):
        monkeypatch.setattr(target, name, fail)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    for do in (
        lambda: load_config([str(tmp_path / "mine.yaml")]),
        lambda: load_task(tmp_path / "mine.yaml"),
        lambda: read_rows(tmp_path / "train.tsv", TASKS["sst2"]),
        lambda: load_model_config(Checkpoint("a", tmp_path, None), False),
        lambda: try_lock(tmp_path / "run" / ".lock").__enter__(),
        lambda: create(tmp_path / "store"),
    ):
        with pytest.raises(kind):
            do()


def test_too_little_memory_is_told_in_one_line(capsys):
    for failure in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):

        def fail(failure=failure):
            raise failure

        assert attempt(fail) == 3
        said = capsys.readouterr().err
        assert said.startswith("sead-dist: not enough memory: ")
        assert said.count("\n") == 1


def test_what_a_reader_raises_is_one_line_chained_and_a_bug_elsewhere_a_traceback(capsys):
    def read():
        with reading("a.json", "fix it"):
            json.loads("{\n\0")

    with pytest.raises(
        UserError, match=r"^a.json cannot be read: JSONDecodeError: .*; fix it$"
    ) as e:
        read()
    assert isinstance(e.value.__cause__, json.JSONDecodeError)
    assert attempt(read) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert attempt(read, debug=True) == 2
    said = capsys.readouterr().err
    assert "JSONDecodeError" in said.split("direct cause")[0]
    assert said.splitlines()[-1].startswith("sead-dist: a.json cannot be read")
    assert attempt(lambda: {}["a bug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_mock_a_panic_of_a_rust_library_is_one_line_and_an_interrupt_stays_one(
    tmp_path, monkeypatch
):
    """A mock: no file is known that makes safetensors panic."""
    panic = type("PanicException", (BaseException,), {})
    for raised, shown in ((panic("index out of range"), UserError), (KeyboardInterrupt(), None)):

        def fail(*_args, raised=raised, **_keys):
            raise raised

        auto = sequence_classifier.AutoModelForSequenceClassification
        monkeypatch.setattr(auto, "from_pretrained", fail)
        with pytest.raises(shown or KeyboardInterrupt) as found:
            sequence_classifier.load_plain(tmp_path)
        if shown:
            assert str(found.value) == (
                "plain Transformers cannot load it (PanicException: index out of range)"
            )


def test_debug_may_stand_anywhere_after_the_command():
    for words in (["--debug", "jobs"], ["jobs", "--debug"], ["jobs", "logs", "a", "--debug"]):
        assert parse(words).debug
    assert not parse(["jobs"]).debug


def test_a_message_is_one_line_whatever_value_it_names(capsys):
    def fail():
        raise UserError("label 'a\nb\x1b[1m\ud800' is unknown")

    assert attempt(fail) == 2
    assert capsys.readouterr().err == "sead-dist: label 'a\\nb\\x1b[1m\\ud800' is unknown\n"


def test_a_closed_pipe_ends_quietly(tmp_path):
    shown = subprocess.Popen(
        [sys.executable, "-m", "sead_dist", "jobs", "--root", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shown.stdout.close()
    assert (shown.stderr.read(), shown.wait()) == (b"", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORLD_SIZE", "two"), ("WORLD_SIZE", ""), ("WORLD_SIZE", "-1")),
        *(("RANK", "x"), ("RANK", "9"), ("RANK", "-1"), ("RANK", "2")),
        *(("MASTER_PORT", "99999"), ("MASTER_PORT", "http")),
    ],
)
def test_what_a_launcher_sets_is_checked_and_told(monkeypatch, capsys, name, value):
    for variable, sound in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(variable, sound)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}='?{value}"):
        join_world()
    assert attempt(join_world) == 2
    assert f"{name}='{value}' is not a whole number" in capsys.readouterr().err


def test_a_mistake_of_all_ranks_is_told_by_one(monkeypatch, capsys):
    def fail():
        raise UserError("alpha=2")

    monkeypatch.setattr(exits, "GRACE_S", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        assert attempt(fail) == 2
        assert capsys.readouterr().err.count("alpha=2") == lines


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    for name in ("SEAD_DIST_STORE", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="set HOME, or store=DIR"):
        store_folder(None)
    with pytest.raises(UserError, match="set HOME, or give --root DIR"):
        state_folder(None)


@pytest.mark.parametrize(
    "word",
    [
        *("learning_rate=.inf", "temperature=1e999", "pool.timeout_s=.inf"),
        *("num_train_epochs=99999999999999999999999", "max_steps=1e400", "seed=" + "9" * 400),
        *("global_batch_size=2305843009213693951", "micro_batch_size=[" + "[" * 5000),
    ],
)
def test_infinite_and_huge_numbers_are_refused_at_once(word):
    with pytest.raises(UserError):
        load_config(["sst2", "output_dir=a", "global_batch_size=2147483647", word])
