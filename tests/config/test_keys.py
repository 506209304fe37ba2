"""`sead-dist keys` and `--print-config`: what a newcomer asks for first."""

from dataclasses import fields

import pytest
import yaml
from small import save_teacher, words, write_task

from sead_dist.cli.commands import parse
from sead_dist.cli.keys import SLURM, SWEEP, TASK
from sead_dist.config.keys import all_keys, base_yaml, find_keys
from sead_dist.config.load import config_folder, load_config
from sead_dist.config.schema import RunConfig, SweepConfig
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError
from sead_dist.slurm.settings import SlurmSettings, load_settings
from sead_dist.sweep.grid import make_grid

BASE = config_folder() / "base.yaml"


def run(capsys, *argv):
    args = parse(argv)
    args.run(args)
    return capsys.readouterr().out


def test_base_yaml_is_what_the_fields_say():
    assert BASE.read_text("utf-8") == base_yaml(), (
        "configs/base.yaml is not what the fields say; run "
        "`.venv/bin/python -m sead_dist.config.keys`"
    )


def test_base_yaml_read_as_a_file_changes_no_key_of_a_run():
    given = ["task=sst2", "output_dir=run", "teachers=[a]", "method=sead"]
    assert load_config([str(BASE), *given]) == load_config(given)
    assert RunConfig(task="sst2", output_dir="run") == load_config(["task=sst2", "output_dir=run"])


def test_every_key_is_told_with_its_default_and_a_sentence():
    keys = list(all_keys())
    assert [key.name.partition(".")[0] for key in keys if "." not in key.name] == [
        *RunConfig.model_fields
    ]
    for key in keys:
        assert key.default is None or len(key.text) > 10, key.name


def test_a_key_that_may_change_on_a_resume_says_so():
    said = {key.name for key in all_keys() if "(operational" in key.text}
    identity = set(load_config(["task=sst2", "output_dir=run"]).identity())
    values = {key.name for key in all_keys() if key.default is not None}
    assert identity == {
        name for name in values - said if not name.startswith(("augment.", "repair."))
    }


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
            find_keys(list(all_keys()), asked)
        return
    assert [key.name for key in find_keys(list(all_keys()), asked)] == found


def test_the_command_prints_them(capsys):
    assert run(capsys, "keys", "alpha_end") == (
        "alpha_end: null\n    alpha at the last step; it changes linearly up to there; null: "
        "alpha is constant\n"
    )
    assert run(capsys, "keys").count("\n    ") > 50


def test_print_config_prints_every_key_and_the_rows_and_trains_nothing(tmp_path, capsys):
    data = write_task(tmp_path / "data")
    given = words(data, [save_teacher(tmp_path / "a")], tmp_path / "run", alpha=0.25)
    capsys.readouterr()
    said = run(capsys, "distill", *given, "--print-config")
    asked, told = load_config(given).model_dump(mode="json"), yaml.safe_load(said)
    # what is left to the run is told as the run takes it
    settled = {key for key in asked if asked[key] != told[key]}
    assert settled <= {
        *("max_steps", "learning_rate", "final_checkpoint", "eval_steps", "loss", "unlabeled"),
        *("augment", "baseline"),
    }
    assert (told["max_steps"], told["final_checkpoint"], told["loss"]) == (7, "average", "kl")
    assert told["eval_steps"] == 7
    assert told["unlabeled"]["rest"] is True
    assert "# task grammar: train 54 labelled + 0 unlabelled, selection 6, validation 20" in said
    assert "# placement=auto: the placement is chosen at the start" in said
    copied = run(capsys, "distill", *given, "augment.copies=auto", "--print-config")
    assert yaml.safe_load(copied)["augment"]["copies"] == 10
    assert "# copies: " in copied
    assert not (tmp_path / "run").exists()


def test_keys_of_an_entry_of_teachers_are_told_where_a_hint_names_them(tmp_path, capsys):
    with pytest.raises(UserError) as wrong:
        load_config(["task=sst2", "output_dir=run", "teachers=[{path: a, weight: -1}]"])
    asked = str(wrong.value).rpartition("`sead-dist keys ")[2].removesuffix("`")
    assert asked == "teachers.weight"
    assert run(capsys, "keys", asked).startswith("teachers.weight: 1.0\n    its weight")
    assert run(capsys, "keys", "encoders").count("\nencoders.") == 2  # path and revision


@pytest.mark.parametrize(
    ("asked", "begins"),
    [
        ("jobs", "# of `sead-dist sweep`, beside those of its runs\njobs: 1\n    number of runs"),
        ("reference", "# of `sead-dist sweep`, beside those of its runs\nreference: null\n"),
        ("label_column", "# in the YAML file of a task of your own\nlabel_column: label\n    the"),
        ("gpus_per_node", "# of `sead-dist submit`, as options (--gpus-per-node 8) or in"),
    ],
)
def test_keys_of_a_sweep_a_task_file_and_a_slurm_job_are_found_too(asked, begins, capsys):
    said = run(capsys, "keys", asked)
    assert said.startswith(begins)
    assert said.count("\n") == 3


def test_every_key_of_a_sweep_a_task_file_and_a_slurm_job_is_told_with_its_default(capsys):
    said = run(capsys, "keys")
    for kind, heading in ((SweepConfig, SWEEP), (SlurmSettings, SLURM), (TaskSpec, TASK)):
        part = said.partition(f"# {heading}\n")[2].partition("\n# ")[0]
        values = yaml.safe_load("\n".join(part.splitlines()[::2]))
        named = [f.name for f in fields(TaskSpec)] if kind is TaskSpec else kind.model_fields
        assert set(values) == set(named)
        assert all(len(text.strip()) > 4 for text in part.splitlines()[1::2])


def test_a_mistake_in_a_key_of_a_sweep_or_a_slurm_job_names_the_command_that_tells_of_it(tmp_path):
    with pytest.raises(UserError, match=r"jobs=0: .*; see `sead-dist keys jobs`$"):
        make_grid(["tasks=cola", "methods=mean", "teachers=[T]", "output_dir=out", "jobs=0"])
    with pytest.raises(UserError, match=r"nodes=0: .*; see `sead-dist keys nodes`$"):
        load_settings(None, {"nodes": 0})
    (tmp_path / "own.yaml").write_text("partitionen: low\n")
    with pytest.raises(UserError, match="unknown key 'partitionen'; did you mean 'partition'"):
        load_settings(str(tmp_path / "own.yaml"), {})


def test_data_are_shown_without_an_output_folder(tmp_path, capsys):
    data = write_task(tmp_path / "data")
    given = words(data, [save_teacher(tmp_path / "a")], tmp_path / "run")
    given = [word for word in given if not word.startswith("output_dir=")]
    assert "training rows" in run(capsys, "data", *given)
    with pytest.raises(UserError, match="output_dir is not set"):
        load_config(given)
