"""What an older version left behind is refused in one line, never taken over: invariant 6."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import example_set
from submitit.helpers import DelayedSubmission

import sead_dist as sd
from sead_dist.config.load import load_config
from sead_dist.data.examples import fingerprint
from sead_dist.data.metrics import Answer
from sead_dist.errors import UserError
from sead_dist.reporting.report import write_report
from sead_dist.runs.distillation import distill
from sead_dist.runtime.distributed import World
from sead_dist.sweep.run import run_sweep
from sead_dist.training.identity import RULES, Identity, reject_other, rules_of

OLD = Path(__file__).parents[1] / "fixtures" / "b2c3d08"
ALONE = World(0, 1, torch.device("cpu"))
WORDS = [
    *(
        "task=task/task.yaml",
        "data.path=task",
        "teachers=[teacher]",
        "student=start",
        "teacher_validation=off",
    ),
    *("num_train_epochs=2", "store=new-store", "selection.fraction=0.2", "micro_batch_size=16"),
]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of what commit b2c3d08 made, as the working folder."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("run", ["finished", "killed"])
def test_a_run_of_old_rules_is_refused_in_one_line_before_any_work(old, run):
    before = {path: path.read_bytes() for path in (old / run).rglob("*") if path.is_file()}
    epochs = ["num_train_epochs=2000"] if run == "killed" else []
    with pytest.raises(UserError) as caught:
        distill(load_config([*WORDS, *epochs, f"output_dir={run}"]), ALONE)
    said = str(caught.value)
    assert "\n" not in said
    assert f"output_dir={run} holds a run of another version of sead_dist, " in said
    assert (
        "rules order 1, start 1, input 1, defaults 1; this version has order 2, start 3, input 2, "
        in said
    )
    assert "give another output_dir" in said
    after = {path: path.read_bytes() for path in (old / run).rglob("*") if path.is_file()}
    after.pop(old / run / ".lock", None)
    assert after == before


def test_an_old_run_directory_is_read_under_the_present_names(old):
    config = sd.Run("finished").config
    assert (config.num_train_epochs, config.teacher_validation) == (2, "off")
    assert (config.selection.split, config.save_total_limit) == ("held_out", 2)
    assert (config.teachers[0].quantization, config.heartbeat.timeout_s) == (None, 600)
    metrics = old / "finished" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss_inner": null', '"loss_inner": 0.5'))
    summary = old / "finished" / "run_summary.json"
    summary.write_text(summary.read_text().replace('"transfer_rows": 0', '"transfer_rows": 7'))
    write_report(old / "finished")
    card = (old / "finished" / "README.md").read_text()
    assert "teacher_validation: 'off'" in card
    assert "selection:\n  fraction: 0.2" in card
    assert "| unlabelled rows of text among them | 7 |" in card
    for name in ("gate:", "graduate:", "epochs: 2\nmax", "internals", "transfer"):
        assert name not in card.replace("num_train_epochs: 2", "")


def test_a_model_of_an_old_run_is_scored_and_asked(old):
    found = sd.evaluate("finished")
    assert (
        found["eval_accuracy"]
        == json.loads((old / "finished/eval_results.json").read_text())["eval_accuracy"]
    )
    assert len(sd.predict("finished", ["the plot was good"])) == 1


def test_a_configuration_that_this_version_has_not_is_told_in_one_line(old):
    file = old / "finished" / "config.yaml"
    file.write_text(file.read_text() + "gone_since: 3\n")
    with pytest.raises(
        UserError, match=r"config\.yaml is not a configuration of this version: .*gone_since"
    ) as caught:
        assert sd.Run("finished").config
    assert "read it as YAML, or use the version that wrote it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_of_old_rules_is_not_mixed_with_new_runs(old):
    keys = [
        *(
            "tasks=[task/task.yaml]",
            "methods=[finetune]",
            "seeds=1",
            "data.path=task",
            "teacher_validation=off",
        ),
        *(
            "teachers=[teacher]",
            "student=start",
            "num_train_epochs=1",
            "output_dir=sweep",
            "store=new-store",
        ),
    ]
    with pytest.raises(UserError, match="holds a run of another version of sead_dist"):
        run_sweep(keys, ALONE)


def test_a_start_that_is_another_at_the_resume_is_refused(old):
    words = [*WORDS, "output_dir=run", "max_steps=2"]
    distill(load_config(words), ALONE)
    weights = old / "start" / "model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-1] ^= 1
    weights.write_bytes(spoilt)
    with pytest.raises(UserError, match=r"the student's start was .*, is .*; give the same"):
        distill(load_config(words), ALONE)
    # one that is gone is not another one: the run is finished all the same
    shutil.rmtree(old / "start")
    distill(load_config(words), ALONE)


def test_every_rule_has_a_part_in_the_identity():
    now = Identity({}, "data", [], "start", dict(RULES))
    for name in RULES:
        other = replace(now, rules={**RULES, name: 0})
        with pytest.raises(
            UserError, match=f"rules {name} 0; this version has {name} {RULES[name]}"
        ):
            reject_other(Path("run"), other, now)
    written = json.loads(json.dumps({"config": {}, "data": "data", "teachers": []}))
    assert set(Identity(**written).other_rules(now)) == set(RULES)


def test_rules_of_splits_count_only_where_they_give_other_rows():
    config = load_config(["sst2", "teachers=[m]", "output_dir=run"])
    now = Identity.of(config, "data", [], "start", "")
    older = replace(now, rules=dict(RULES))
    reject_other(Path("run"), older, now)
    reject_other(Path("run"), older, older.with_data("data"))
    for other in (now.with_data("rows"), older.with_data("rows"), replace(now, data="rows")):
        with pytest.raises(UserError, match=r"of other rows: .* \(rules splits 1, here 2\)"):
            reject_other(Path("run"), older, other)
    # under the same rules the data are others
    with pytest.raises(UserError, match="holds another run: the fingerprint of data and task was"):
        reject_other(Path("run"), now, now.with_data("rows"))


def test_a_run_whose_rows_an_older_version_divided_is_refused_as_such(old):
    words = [*WORDS, "output_dir=run", "max_steps=2"]
    distill(load_config(words), ALONE)
    record = old / "run" / "run.json"
    saved = json.loads(record.read_text())
    assert saved["identity"]["rules"].pop("splits") == 2
    record.write_text(json.dumps(saved))
    distill(load_config(words), ALONE)  # the rows are the same
    record.write_text(json.dumps(saved).replace(saved["identity"]["data"], "0" * 64))
    with pytest.raises(
        UserError, match=r"\(rules splits 1, here 2\); give the files .* or another output"
    ):
        distill(load_config(words), ALONE)


def test_a_run_with_files_of_predictions_has_the_rules_of_their_rows():
    model, file = ({"fingerprint": name, "labels": []} for name in "mf")
    words = ["sst2", "teachers=[m, {predictions: f.csv}]", "output_dir=run"]
    idle = "teachers=[{path: m, weight: 0}, {predictions: f.csv}]"
    config = load_config([words[0], idle, words[2], "ensemble=fixed"])
    begun = Identity({}, "data", [model, file], "start", dict(RULES))
    now = replace(begun, rules=rules_of(config))
    # where all teachers are asked, and where there is no file, nothing has changed
    assert rules_of(load_config(words)) == RULES
    assert rules_of(load_config([words[0], "teachers=[m]", "ensemble=fixed", words[2]])) == RULES
    with pytest.raises(UserError, match="with the rules answers 1; this version has answers 2"):
        reject_other(Path("run"), begun, now)
    # a file that is given besides is another teacher, not another version
    with pytest.raises(UserError, match="holds another run: teachers were m"):
        reject_other(Path("run"), replace(begun, teachers=[model]), now)


def test_groups_and_accepted_answers_are_part_of_the_data():
    plain = example_set(["good", "bad"])
    grouped = [replace(plain, groups_B=torch.tensor(ids).numpy()) for ids in ([0, 0], [0, 1])]
    answered = [
        replace(plain, answers=[Answer("a", ("a", more)), Answer("b", ("b",))]) for more in "cd"
    ]
    assert len({fingerprint(each) for each in (plain, *grouped, *answered)}) == 5


def test_a_job_that_was_pickled_before_the_keys_had_their_names_still_runs(old, capfd, monkeypatch):
    launch = DelayedSubmission.load("waiting.pkl").function
    assert launch.attempt(launch.recipe, launch.words) is None
    assert (old / "waiting" / "model" / "model.safetensors").is_file()
    assert "training: " in capfd.readouterr().out
    # what a recipe tells is in the job's log too: again, as the one task of a job
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert launch.attempt(launch.recipe, launch.words) is None
    assert "waiting holds this run, finished: nothing to do" in capfd.readouterr().out


def test_a_pickled_job_with_a_checkpoint_of_old_rules_ends_in_one_line(old, capfd):
    launch = DelayedSubmission.load("killed.pkl").function
    assert launch.attempt(launch.recipe, launch.words) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "output_dir=killed" in line]
    assert len(said) == 1
    assert "holds a run of another version of sead_dist" in said[0]
