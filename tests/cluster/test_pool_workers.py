"""A student and the workers of its pool as jobs of a real SLURM of two nodes."""

import json

import pytest
from small import model_bytes
from submitted import Submitted

from sead_dist.runs.pool_worker import worker_folder
from sead_dist.runtime.run_log import is_finished
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]
# of two teachers: 54 training, 6 selection and 20 dev rows
PAIRS = 2 * (54 + 6 + 20)


@pytest.fixture
def submitted(tmp_path, task):
    made = Submitted(tmp_path, task, pool__item_rows=8)
    yield made
    made.free_nodes()


def test_two_workers_beside_the_student_make_the_student_of_one_machine(submitted, reference):
    assert submitted.submit("--teacher-workers", 2, "--wait") is None
    assert model_bytes(submitted.run) == reference
    # listed by the second in which they were submitted: the student may share the workers' or not
    names = sorted(job.name for job in submitted.jobs)
    assert names == ["run", "run/worker-1", "run/worker-2"]
    for job in submitted.jobs:
        known = slurm.job_states([job.job]).get(job.job)
        assert jobs.state_of(job, known) == "COMPLETED", job.log(0).read_text()
    summary = json.loads((submitted.run / "run_summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["placement"] == "pool"
    assert summary["teacher_forwards"] == 0
    folders = [worker_folder(submitted.run, number, 2) for number in (1, 2)]
    assert all(map(is_finished, folders))
    rows = [json.loads((folder / "run_summary.json").read_text())["rows"] for folder in folders]
    assert sum(rows) == PAIRS


def test_workers_leave_the_queue_when_the_students_job_is_refused(submitted, tmp_path, capsys):
    (tmp_path / "workers.yaml").write_text("partition: low\ntime: '0:10:00'\n")
    code = submitted.submit(
        *("--teacher-workers", 2, "--teacher-slurm", tmp_path / "workers.yaml"),
        *("--partition", "nowhere"),
    )
    assert code == 2
    assert "sbatch rejected the job" in capsys.readouterr().err
    assert [job.name for job in submitted.jobs] == ["run/worker-1", "run/worker-2"]
    submitted.out_of_the_queue()
