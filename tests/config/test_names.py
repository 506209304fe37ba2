"""The one map of configuration keys, old to new."""

import pytest

from sead_dist.config.load import load_config
from sead_dist.config.names import RENAMED, renamed, renamed_config, renamed_record, renamed_words
from sead_dist.config.yaml_text import dump_config
from sead_dist.errors import UserError


@pytest.mark.parametrize("old", [key for key in RENAMED if not key.startswith(("teach", "enc"))])
def test_an_old_key_is_refused_with_the_new_one_named(old):
    with pytest.raises(UserError) as caught:
        load_config(["sst2", "output_dir=x", f"{old}=1"])
    said = str(caught.value)
    assert f"{old.split('.')[0]}" in said
    assert RENAMED[old] in said or RENAMED[old].split(".")[0] in said
    assert "was renamed to" in said
    assert "\n" not in said


def test_an_old_key_of_a_teacher_and_of_a_file_is_refused_likewise(tmp_path):
    with pytest.raises(
        UserError,
        match=r"'teachers\.0\.weights' was renamed to quantization; give quantization instead$",
    ):
        load_config(["sst2", "output_dir=x", "teachers=[{path: a, weights: int8}]"])
    (tmp_path / "old.yaml").write_text("checkpoint: {every_steps: 3}\n", encoding="utf-8")
    with pytest.raises(
        UserError, match="'checkpoint' was renamed to save_steps and save_total_limit"
    ):
        load_config(["sst2", "output_dir=x", str(tmp_path / "old.yaml")])
    (tmp_path / "method.yaml").write_text("graduate: last\n", encoding="utf-8")
    with pytest.raises(UserError, match="the key 'graduate' was renamed to final_checkpoint"):
        load_config(["sst2", "output_dir=x", f"method={tmp_path / 'method.yaml'}"])


def test_keys_of_an_old_identity_read_as_todays():
    old = {"epochs": 3, "select.on": "select", "start": "guide", "alpha": 0.5, "warmup": 0.1}
    assert renamed(old) == {
        "num_train_epochs": 3,
        "selection.split": "held_out",
        "student_init": "feature_teacher",
        "alpha": 0.5,
        "warmup_steps": 0.1,
    }


def test_sections_of_an_old_file_read_as_todays():
    old = {
        "gate": "on",
        "drift": "on",
        "warmup": 1.0,
        "evaluate": {"every_steps": 5},
        "checkpoint": {"every_steps": 7, "keep_last": 2},
        "select": {"fraction": 0.2, "on": "select"},
        "pool": {"claim_s": 60.0},
        "data": {"path": "here"},
        "teachers": [{"path": "a", "weights": "int8"}],
    }
    assert renamed_config(old) == {
        "teacher_validation": "fp32",
        "warmup_steps": 0.999999999,
        "eval_steps": 5,
        "save_steps": 7,
        "save_total_limit": 2,
        "selection": {"fraction": 0.2, "split": "held_out"},
        "pool": {"lease_s": 60.0},
        "data": {"path": "here"},
        "teachers": [{"path": "a", "quantization": "int8"}],
    }
    assert renamed_config({"gate": "off", "drift": "on"}) == {"teacher_validation": "off"}
    assert renamed_config({"gate": "on", "drift": "off"}) == {"teacher_validation": "on"}


def test_values_of_an_old_entry_of_teachers_read_as_todays():
    old = {"predictions": "a.csv", "unknown": "refuse", "duplicates": "mean"}
    now = {**old, "unknown": "reject"}
    assert renamed(old, "teachers.") == now
    assert renamed_config({"teachers": [old], "encoders": ["a"]})["teachers"] == [now]


def test_names_of_todays_files_are_left_alone():
    now = load_config(["sst2", "output_dir=x", "teachers=[{path: a, quantization: int8}]"])
    keys = now.model_dump(mode="json")
    assert renamed_config(keys) == keys
    assert renamed_record({"steps": 3, "transfer_rows": 2, "internals": None}) == {
        "steps": 3,
        "unlabelled_rows": 2,
        "feature_loss": None,
    }


def test_words_of_an_old_command_become_todays():
    old = ("sst2", "gate=off", "drift=on", "per_task.cb.epochs=5", "finetune.epochs=2", "seed=1")
    assert renamed_words(old) == (
        *("sst2", "teacher_validation=off", "per_task.cb.num_train_epochs=5"),
        *("finetune.num_train_epochs=2", "seed=1"),
    )
    assert renamed_words(("drift=on",)) == ("teacher_validation=fp32",)


def test_a_share_of_all_steps_is_not_read_as_one_step():
    config = load_config(["sst2", "output_dir=x", *renamed_words(("warmup=1",))])
    assert config.warmup(200) == 200
    assert load_config(["sst2", "output_dir=x", "warmup_steps=3"]).warmup(200) == 3


def test_another_method_takes_the_place_of_a_runs_own_with_all_its_keys(tmp_path, caplog):
    made = load_config(["sst2", "output_dir=x", "teachers=[a,b]"])
    (tmp_path / "config.yaml").write_text(dump_config(made), encoding="utf-8")
    other = load_config([str(tmp_path / "config.yaml"), "method=mean"])
    assert (other.ensemble, other.temperature, other.alpha) == ("mean_logits", 2.0, 0.5)
    assert "method=mean: a file's keys for method=sead are not used: ensemble" in caplog.text
