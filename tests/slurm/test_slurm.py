"""What sbatch is told, and what is refused before it is asked. No SLURM is needed."""

import os
import pickle
import stat
import subprocess

import pytest
from small import command, config, words

from sead_dist.cli import commands as cli
from sead_dist.cli.submit import parse_seeds, runs_to_submit
from sead_dist.config.load import config_folder
from sead_dist.config.yaml_text import parse_yaml
from sead_dist.errors import UserError
from sead_dist.slurm import settings as slurm
from sead_dist.slurm.settings import SlurmSettings, load_settings, minutes, sbatch_parameters
from sead_dist.slurm.submit import Launch, job_folder, sbatch_text


def test_every_setting_has_a_default_and_a_comment_and_every_shipped_file_is_accepted():
    text = (config_folder() / "slurm" / "base.yaml").read_text()
    assert set(parse_yaml(text, "base.yaml")) == set(SlurmSettings.model_fields)
    assert all("#" in line for line in text.splitlines() if line)
    for path in (config_folder() / "slurm").glob("*.yaml"):
        load_settings(path.stem, {})


def test_options_are_laid_over_the_file_and_the_file_over_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("nodes: 4\npartition: long\nsetup: [module load cuda]\n")
    found = load_settings(str(file), {"nodes": 2, "account": None})
    assert (found.nodes, found.partition, found.account) == (2, "long", None)
    assert found.setup == ["module load cuda"]
    assert found.time == "1:00:00"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: low", r"unknown key 'partion'; did you mean 'partition'\?"),
        ("nodes: 0", "nodes=0: input should be greater than 0; see `sead-dist keys nodes`$"),
        ("time: 60", "time=60: expected a text; quote it: '60'"),
        ("time: soon", "time='soon' is not a time limit; give MINUTES, H:MM:SS"),
        ('time: "0"', "is zero"),
        ('{time: "3", signal_delay: 120}', "signal_delay=120 seconds is more than half of time=3"),
        ("- nodes", "holds no settings"),
    ],
)
def test_wrong_settings_are_named(text, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_settings(str(file), {})


def test_settings_that_are_not_there_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'preemptible'"):
        load_settings("preemptable", {})


def test_time_limits_are_read_as_slurm_writes_them():
    given = ["30", "30:30", "1:00:00", "0:10:00", "2-12", "1-00:30", "1-0:0:1"]
    assert [minutes(text) for text in given] == [30, 31, 60, 10, 3600, 1470, 1441]


def text_of(tmp_path, count=1, **options):
    settings = load_settings(None, options)
    parameters = sbatch_parameters(settings, "name", tmp_path)
    return sbatch_text(parameters, settings.python, tmp_path, count)


def test_without_gpus_there_is_one_task_a_node_and_with_them_one_a_gpu(tmp_path):
    plain = text_of(tmp_path, nodes=2)
    assert "#SBATCH --ntasks-per-node=1\n" in plain
    assert "--gpus" not in plain
    assert '"$ended" -lt 2' in plain
    eight = text_of(tmp_path, nodes=2, gpus_per_node=8)
    assert "#SBATCH --gpus-per-node=8\n" in eight
    assert "#SBATCH --ntasks-per-node=8\n" in eight
    assert '"$ended" -lt 16' in eight


def test_every_setting_reaches_sbatch_or_srun(tmp_path):
    text = text_of(
        tmp_path,
        count=5,
        partition="p",
        account="a",
        qos="q",
        constraint="x&y",
        gres="gpu:2",
        cpus_per_task=3,
        mem="4G",
        time="0:10:00",
        exclusive=True,
        signal_delay=45,
        concurrent=2,
        setup=["module load cuda"],
        srun=["--container-image=i.sqsh"],
        python="apptainer exec i.sif python",
        sbatch={"mail-type": "END"},
    )
    for line in (
        *("partition=p", "account=a", "qos=q", "constraint='x&y'", "gres=gpu:2"),
        *("cpus-per-task=3", "mem=4G", "time=10", "exclusive", "signal=USR2@45"),
        *("array=0-4%2", "mail-type=END", "requeue", "open-mode=append"),
    ):
        assert f"#SBATCH --{line}\n" in text, line
    assert "\nmodule load cuda\n" in text
    assert "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-3}" in text
    (srun,) = [line for line in text.splitlines() if line.startswith("srun ")]
    for word in ("--cpus-per-task=3", "--container-image=i.sqsh", "apptainer exec i.sif python -u"):
        assert word in srun


def test_the_dry_run_prints_a_file_and_leaves_nothing(one_teacher, tmp_path, capsys):
    given = words(*one_teacher, tmp_path / "run")
    assert command("submit", *given, "--dry-run", "--nodes", 2, "--root", tmp_path / "jobs") is None
    assert capsys.readouterr().out.startswith("#!/bin/bash")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "jobs").exists()


@pytest.mark.slow
def test_launch_slurm_py_is_sead_dist_submit(one_teacher, tmp_path, capsys):
    import sys
    from pathlib import Path

    given = [*words(*one_teacher, tmp_path / "run"), "--dry-run"]
    script = Path(__file__).parents[2] / "launch" / "slurm.py"
    done = subprocess.run(
        [sys.executable, script, *given], capture_output=True, text=True, check=True
    )
    assert command("submit", *given) is None
    assert done.stdout == capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("epoch=2", "unknown key 'epoch'; did you mean 'num_train_epochs'?"),
        ("data.path=nowhere", "data.path nowhere does not exist"),
        ("data.train=nowhere.tsv", "data file nowhere.tsv does not exist"),
        ("unlabeled.path=nowhere.tsv", "unlabeled.path=nowhere.tsv does not exist"),
        ("teachers=[./nowhere]", "./nowhere is not a folder"),
        ("loss=mse", None),
        ("ensemble=score", None),
    ],
)
def test_a_mistake_is_found_before_the_queue(word, message, one_teacher, tmp_path, capsys):
    given = [*words(*one_teacher, tmp_path / "run"), word]
    code = command("submit", *given, "--dry-run")
    said = capsys.readouterr().err
    assert code == (2 if message else None), said
    if message:
        assert message in said
        assert said.count("\n") == 1


def test_where_there_is_no_sbatch_it_says_so(one_teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        command("submit", *words(*one_teacher, tmp_path / "run"), "--root", tmp_path / "jobs") == 2
    )
    said = capsys.readouterr().err
    assert "there is no sbatch on this machine" in said
    assert "--dry-run" in said
    assert not (tmp_path / "run").exists()


def test_a_job_that_cannot_be_cancelled_here_has_no_hint_of_dry_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no scancel on this machine; use a login .* cluster$"):
        slurm.cancel("7")


def test_the_job_folder_is_for_this_user_alone(tmp_path):
    (tmp_path / "run" / ".slurm").mkdir(parents=True, mode=0o755)
    folder = job_folder(tmp_path / "run")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("name", ["run", "run/.slurm"])
def test_a_folder_of_somebody_else_is_refused(name, tmp_path):
    (tmp_path / "run" / ".slurm").mkdir(parents=True)
    os.chown(tmp_path / name, 12345, 12345)
    with pytest.raises(UserError, match=f"{name} belongs to another user"):
        job_folder(tmp_path / "run")


def test_seeds_make_a_run_each():
    assert parse_seeds("0-2,7") == [0, 1, 2, 7]
    for wrong in ("", "a", "1,1", "3-1"):
        with pytest.raises(UserError, match="--seeds"):
            parse_seeds(wrong)
    _, asked = runs_to_submit(["sst2", "output_dir=out", "seed=9"], "3,4")
    assert [one.name for one in asked] == ["out/seed-3", "out/seed-4"]
    assert [one.config.seed for one in asked] == [3, 4]
    assert asked[0].config.output_dir == "out/seed-3"
    # what is held out stays the same
    assert {one.config.selection.seed for one in asked} == {config().selection.seed}


def test_encoders_make_a_fine_tuning_with_a_run_for_each_teacher(tmp_path):
    (_, (asked,)) = runs_to_submit(["sst2", f"output_dir={tmp_path}", "encoders=[a/b,c/d]"], None)
    assert asked.recipe == "finetune"
    assert asked.runs == (f"{tmp_path}/teacher-0", f"{tmp_path}/teacher-1")


def test_finished_teachers_of_other_keys_are_refused(one_teacher, tmp_path, capsys):
    data, (encoder,) = one_teacher
    given = [*words(data, [], tmp_path / "out"), f"encoders=[{encoder}]", "max_steps=1"]
    assert command("finetune", *given) is None
    capsys.readouterr()
    assert command("submit", *given, "--dry-run") is None
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert command("submit", *given, "max_steps=2", "--dry-run") == 2
    assert "teacher-0 holds another run: max_steps was 1, is 2" in capsys.readouterr().err


# what the job's script does after srun, with stand-ins for squeue and scontrol


@pytest.mark.parametrize(
    ("code", "said", "lost", "state", "again"),
    [
        (0, 2, 0, "RUNNING", False),  # all went well
        (137, 1, 0, "RUNNING", True),  # one rank was killed, the other said that it lost it
        (137, 0, 2, "RUNNING", True),  # all were, for the third time
        (137, 0, 3, "RUNNING", False),  # once too often
        (140, 0, 3, "RUNNING", True),  # the notice came before it could save: does not count
        (2, 2, 0, "RUNNING", False),  # every rank said what was wrong
        (137, 0, 0, "COMPLETING", False),  # cancelled, or queued again by SLURM
    ],
)
def test_a_job_starts_again_where_a_rank_ended_without_a_word_with_stand_ins_for_slurm(
    code, said, lost, state, again, tmp_path
):
    programs, folder = tmp_path / "bin", tmp_path / "job's"
    programs.mkdir()
    folder.mkdir()
    for name, line in (
        ("squeue", f"echo {state}"),
        ("scontrol", f'echo "$@" >>{tmp_path}/asked'),
        ("srun", f"touch {tmp_path}/ran; exit {code}"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    (folder / "7.lost").write_text("137\n" * lost)
    (folder / "7.9.exit").write_text("0\n")  # of an earlier start: forgotten
    text = text_of(folder, nodes=2)
    ranks = "".join(
        f"echo {code} >'{folder}/7.{rank}.exit'\n".replace("'s/", "'\\''s/") for rank in range(said)
    )
    script = text.replace(
        "export SUBMITIT_EXECUTOR=slurm\n", "export SUBMITIT_EXECUTOR=slurm\n" + ranks
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "asked").exists() == again, done.stdout + done.stderr
    assert ("starting again" in done.stdout) == (again and code == 137)


def test_states_come_from_sacct_where_squeue_has_forgotten(monkeypatch):
    answers = {"squeue": "7|RUNNING\n8_1|PENDING\n", "sacct": "9|CANCELLED by 0\n"}
    monkeypatch.setattr(slurm, "_output_of", lambda command: answers[command[0]])
    assert slurm.job_states(["7", "8_1", "9", "10"]) == {
        "7": "RUNNING",
        "8_1": "PENDING",
        "9": "CANCELLED",
    }


def test_no_slurm_at_all_is_no_state(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.job_states(["7"]) == {}


def test_a_launch_is_pickled_without_the_code_that_made_it(tmp_path):
    """Nodes read it with whatever sead_dist they have: plain values, and a function by its name."""
    import cloudpickle

    data = cloudpickle.dumps(Launch(cli.attempt_recipe, "distill", ("sst2",), ("run",), "folder"))
    assert len(data) < 500
    assert b"attempt_recipe" in data


def test_a_pool_is_submitted_as_an_array_of_workers_and_a_student(one_teacher, tmp_path, capsys):
    (tmp_path / "cpus.yaml").write_text("partition: cpus\ntime: '2:00:00'\n")
    given = [
        *words(*one_teacher, tmp_path / "run"),
        "--dry-run",
        "--partition",
        "gpus",
        "--nodes",
        2,
    ]
    pool = ["--teacher-workers", 3, "--teacher-slurm", tmp_path / "cpus.yaml"]
    assert command("submit", *given, *pool) is None
    workers, student = capsys.readouterr().out.split("#!/bin/bash")[1:]
    for line in ("--array=0-2%3", "--nodes=1", "--partition=cpus", "--job-name=run-teachers"):
        assert f"#SBATCH {line}\n" in workers
    for line in ("--nodes=2", "--partition=gpus", "--job-name=run"):
        assert f"#SBATCH {line}\n" in student
    assert "--array" not in student
    # without settings of their own, workers have the student's, on one node and one GPU each
    more = ["--gpus-per-node", 4, "--teacher-workers", 1]
    assert command("submit", *given, *more) is None
    worker = capsys.readouterr().out.split("#!/bin/bash")[1]
    for line in ("--nodes=1", "--partition=gpus", "--gpus-per-node=1", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in worker


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["placement=colocated"], "--teacher-workers 2 is for teachers with placement=pool"),
        (["--seeds", "0-2"], "--seeds 0-2 and --teacher-workers 2 cannot both be given"),
        (["teachers=[./nowhere]"], "./nowhere is not a folder"),
    ],
)
def test_a_mistake_with_a_pool_is_found_before_the_queue(
    more, message, one_teacher, tmp_path, capsys
):
    given = words(*one_teacher, tmp_path / "run")
    assert command("submit", *given, *more, "--dry-run", "--teacher-workers", 2) == 2
    assert message in capsys.readouterr().err


def test_a_job_pickled_before_the_packages_moved_finds_its_launch():
    from sead_dist.cli.commands import attempt_recipe

    assert pickle.loads(b"csead_dist.launcher\nLaunch\n.").__base__ is Launch
    assert pickle.loads(b"csead_dist.cli\nattempt_recipe\n.") is attempt_recipe
