"""Exit codes: 2 for a person's mistake, 3 for what the machine does not grant."""

import errno
import os
from pathlib import Path

import pytest
import torch

from sead_dist.cli.commands import attempt
from sead_dist.config.load import load_config
from sead_dist.data.loading import read_rows
from sead_dist.data.task_files import TASKS, load_task
from sead_dist.errors import RunError, UserError, refusal
from sead_dist.models.pretrained import Checkpoint, load_model_config
from sead_dist.runs.claim import try_lock
from sead_dist.store.layout import create


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        *((getattr(errno, name), RunError) for name in ("EACCES", "ENOSPC", "EROFS", "ENOMEM")),
        *((getattr(errno, name), UserError) for name in ("ENOENT", "ENOTDIR", "EISDIR")),
    ],
)
def test_the_same_failure_of_a_file_is_told_alike_everywhere(tmp_path, monkeypatch, number, kind):
    failure = OSError(number, os.strerror(number))
    assert type(refusal("x", failure)) is kind
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
        assert said.startswith("sead-dist: memory does not suffice: ")
        assert said.count("\n") == 1
