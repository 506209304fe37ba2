"""A sweep on a real SLURM of two nodes: workers of one array share its runs."""

import pytest
from small import read, records, sweep_words, write_task
from submitted import Submitted, run, until

from sead_dist.slurm import settings as slurm

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


def test_workers_of_an_array_share_the_runs_and_a_notice_loses_none(tmp_path, capsys):
    task = write_task(tmp_path / "grammar")
    made = Submitted(tmp_path, (task, []))
    out = made.run
    given = sweep_words(task, out, "max_steps=40", "methods=[finetune,mean]")
    options = ["--workers", 2, "--nodes", 1, "--partition", "low", "--time", "0:10:00"]
    assert made.command("submit", *given, *options) is None
    assert [job.name for job in made.jobs] == ["run/worker-0", "run/worker-1"]
    # a second submission would only add workers that wait
    assert made.command("submit", *given, *options) == 2
    assert "already; wait for it" in capsys.readouterr().err
    until(lambda: any(out.glob("grammar/*/*/checkpoints/step-*[0-9]")), "a checkpoint")
    first = made.jobs[0].job
    until(lambda: slurm.job_states([first]).get(first) == "RUNNING", "the first worker")
    until(lambda: "run " in made.jobs[0].log(0).read_text(), "the first worker's first run")
    run("scancel", "--signal=USR2", first)
    made.wait()
    runs = [path.parent for path in out.glob("grammar/*/*/run_summary.json")]
    assert len(runs) == 6
    starts = [len(records(run, "start")) for run in runs]
    assert sum(starts) <= 7  # the one that was stopped went on
    assert f"saved; job {first} is queued again" in made.jobs[0].log(0).read_text()
    report = read(out / "report" / "report.json")
    assert (report["failed"], report["missing"]) == ([], [])
    capsys.readouterr()
    assert made.command("jobs") is None
    assert capsys.readouterr().out.count("COMPLETED") == 2
    assert made.command("submit", *given, *options) is None
    assert "run is finished" in capsys.readouterr().out
