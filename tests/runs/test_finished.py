"""A run is called finished only where its model is there and its teachers are the same."""

import json
import shutil
import socket

import pytest
from huggingface_hub import constants
from small import ALONE, save_teacher, words, write_task

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.models.pretrained import locate
from sead_dist.runs.claim import already_finished
from sead_dist.runs.distillation import distill


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    data = write_task(root / "data")
    given = words(data, [save_teacher(root / "a")], root / "run", max_steps=1)
    distill(load_config(given), ALONE, show_table=False, console=False)
    return root, given


def again(finished, tmp_path, spoil):
    """The same command for a copy of the run directory that is spoilt."""
    root, given = finished
    shutil.copytree(root / "run", tmp_path / "run")
    spoil(tmp_path)
    changed = [word.replace(f"{root}/run", f"{tmp_path}/run") for word in given]
    distill(load_config(changed), ALONE, show_table=False, console=False)


def remove_weights(root):
    (root / "run" / "model" / "model.safetensors").unlink()


def remove_model(root):
    shutil.rmtree(root / "run" / "model")


def empty_weights(root):
    (root / "run" / "model" / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("spoil", [remove_weights, remove_model, empty_weights])
def test_a_finished_run_whose_model_is_gone_is_not_said_to_be_done(finished, tmp_path, spoil):
    with pytest.raises(UserError, match=r"finished, but its model cannot be read .* restore"):
        again(finished, tmp_path, spoil)


def test_a_finished_run_whose_teacher_has_other_weights_is_not_said_to_be_done(finished, tmp_path):
    again(finished, tmp_path / "same", lambda root: None)
    root = finished[0]
    shutil.move(root / "a", tmp_path / "a")
    again(finished, tmp_path / "gone", lambda root: None)  # it is not another one
    save_teacher(root / "a", seed=7)
    with pytest.raises(UserError, match=r"the weights of teacher .*a have changed since"):
        again(finished, tmp_path / "other", lambda root: None)
    shutil.rmtree(root / "a")
    shutil.move(tmp_path / "a", root / "a")


def test_states_that_were_to_be_kept_stay_when_the_command_is_given_without_the_key(tmp_path):
    data, teacher = write_task(tmp_path / "data"), save_teacher(tmp_path / "a")
    given = words(data, [teacher], tmp_path / "run", max_steps=2, save_steps=1)
    distill(load_config([*given, "keep_training_state=true"]), ALONE, show_table=False)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept
    distill(load_config(given), ALONE, show_table=False, console=False)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == kept


def test_whether_a_run_is_finished_asks_nothing_of_the_network(finished, tmp_path, monkeypatch):
    """Of a run whose teacher is on the hub, with a network that is there to be asked."""
    root, given = finished
    shutil.copytree(root / "run", tmp_path / "run")
    record = tmp_path / "run" / "run.json"
    saved = json.loads(record.read_text())
    saved["teachers_given"][0]["path"] = "someone/teacher"
    record.write_text(json.dumps(saved))
    asked = []

    def refused(host, *_given, **_more):
        asked.append(host)
        raise OSError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    words_ = [word.replace(f"{root}/run", f"{tmp_path}/run") for word in given]
    config = load_config([*words_, "teachers=[someone/teacher]"])
    assert already_finished(config)
    assert asked == []
    with pytest.raises(UserError):
        locate("someone/teacher")
    assert asked != []
