"""`sead-dist keys` and `--print-config`: what a newcomer asks for first."""

import pytest
import yaml
from small import save_teacher, words, write_task

from sead_dist.cli.commands import parse
from sead_dist.config.keys import find_keys, read_keys
from sead_dist.config.load import _flat_keys, config_folder, load_config
from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError

BASE = config_folder() / "base.yaml"


def run(capsys, *argv):
    args = parse(argv)
    args.run(args)
    return capsys.readouterr().out


def test_every_key_is_told_with_its_default_and_a_sentence():
    keys = {key.name: key for key in read_keys(BASE)}
    entries = ("teachers.", "encoders.")  # explained in one sentence each
    assert set(keys) == {name for name in _flat_keys(RunConfig) if not name.startswith(entries)}
    base = yaml.safe_load(BASE.read_text())
    for name, key in keys.items():
        value = base
        for part in name.split("."):
            value = value[part]
        if not isinstance(value, dict):
            assert yaml.safe_load(key.default) == value
            assert len(key.text) > 10, name


def test_a_comment_of_several_lines_belongs_to_its_key():
    (key,) = [key for key in read_keys(BASE) if key.name == "micro_batch_size"]
    assert key.text.startswith("rows per forward and backward of one rank")
    assert key.text.endswith("never of more than micro_batch_size longest rows")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("alpha", ["alpha"]),
        ("heartbeat", ["heartbeat", "heartbeat.timeout_s", "heartbeat.hang_timeout_s"]),
        ("epochs", ["num_train_epochs"]),  # its old name
        ("Retries", None),
        ("bias", ["weight_decay"]),  # in the sentence
    ],
)
def test_keys_are_found_by_name_section_old_name_and_text(asked, found):
    if found is None:
        with pytest.raises(UserError, match="no key has 'Retries' in its name or its sentence"):
            find_keys(read_keys(BASE), asked)
        return
    assert [key.name for key in find_keys(read_keys(BASE), asked)] == found


def test_the_command_prints_them(capsys):
    assert run(capsys, "keys", "alpha_end") == (
        "alpha_end: null\n    alpha at the last step, changing evenly from step to step; null: alpha "
        "stays\n"
    )
    assert run(capsys, "keys").count("\n    ") > 50


def test_print_config_prints_every_key_and_the_rows_and_trains_nothing(tmp_path, capsys):
    data = write_task(tmp_path / "data")
    given = words(data, [save_teacher(tmp_path / "a")], tmp_path / "run", alpha=0.25)
    capsys.readouterr()
    said = run(capsys, "distill", *given, "--print-config")
    assert load_config(given).model_dump(mode="json") == yaml.safe_load(said)
    assert "# task grammar: train 54 labelled + 0 unlabelled, selection 6, validation 20" in said
    assert not (tmp_path / "run").exists()
