"""A sweep that loses its machine, its models or its process, and several runs at once."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from small import ALONE, CPU, read, records, sweep_words

from sead_dist.errors import RunError, UserError
from sead_dist.models.pretrained import locate, weights_hash
from sead_dist.runs.claim import try_lock
from sead_dist.runtime.distributed import World
from sead_dist.runtime.files import remove_folder
from sead_dist.sweep import run as sweep
from sead_dist.sweep.checks import check_jobs
from sead_dist.sweep.grid import make_grid
from sead_dist.sweep.rounds import again_lines, at_work, is_ready, lock_of, tidy, try_join
from sead_dist.sweep.run import Memory, choose, run_sweep, time_left

# what is left of a run whose folder went through a version control or a small disk
TABLE = ("run.json", "run_summary.json", "scores.json", "teacher_manifest.json", "predictions")


def words(task: Path, output: Path, *more: str) -> list[str]:
    return sweep_words(task, output, "max_steps=2", "seeds=1", "methods=[finetune,mean]", *more)


def scores(output: Path) -> dict[str, list]:
    cells = read(output / "report" / "report.json")["cells"]
    return {cell["method"]: cell["scores"] for cell in cells}


def made_at(run: Path) -> int:
    return (run / "run_summary.json").stat().st_mtime_ns


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Path:
    """A sweep of two seeds whose models were not kept; tests only read it."""
    output = tmp_path_factory.mktemp("done") / "out"
    run_sweep(words(tiny_data, output, "seeds=2", "keep_models=false"), ALONE)
    return output


@pytest.mark.slow
def test_all_methods_of_a_seed_are_done_before_the_next(finished):
    runs = sorted(finished.glob("grammar/*/seed-*"), key=made_at)
    assert [str(run.relative_to(finished / "grammar")) for run in runs] == [
        *("finetune/seed-0", "mean/seed-0", "finetune/seed-1", "mean/seed-1")
    ]


def test_where_models_are_not_kept_scores_and_predictions_stay(finished):
    runs = list(finished.glob("grammar/*/*/"))
    assert len(runs) == 6
    for run in runs:
        assert not (run / "model").exists()
        assert not (run / "checkpoints").exists()
        assert (run / "scores.json").is_file()
        assert (run / "predictions" / "validation.parquet").is_file()


@pytest.mark.slow
def test_models_of_teachers_stay_until_the_last_student_of_their_task(
    tiny_data, tmp_path, monkeypatch
):
    output, own = tmp_path / "out", sweep.distill
    seen = []

    def distill(config, *given, **more):
        seen.append(len(list(output.glob("grammar/teachers/*/model"))))
        return own(config, *given, **more)

    monkeypatch.setattr(sweep, "distill", distill)
    run_sweep(words(tiny_data, output, "keep_models=false"), ALONE)
    assert seen == [0, 1, 2, 2]
    assert not list(output.glob("grammar/*/*/model"))


@pytest.mark.slow
def test_a_round_that_was_cut_off_is_done_again(
    finished, tiny_data, tmp_path, monkeypatch, capsys, shown
):
    """Killed in its second method; the folder of the first went with the machine."""
    output, own = tmp_path / "out", sweep.distill

    def killed(config, *given, **more):
        if config.output_dir.endswith("mean/seed-1"):
            raise KeyboardInterrupt
        return own(config, *given, **more)

    monkeypatch.setattr(sweep, "distill", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(words(tiny_data, output, "seeds=2"), ALONE)
    monkeypatch.setattr(sweep, "distill", own)
    shutil.rmtree(output / "grammar" / "finetune" / "seed-1")
    kept = [output / "grammar" / method / "seed-0" for method in ("finetune", "mean")]
    before = [made_at(run) for run in kept]
    capsys.readouterr()
    run_sweep(words(tiny_data, output, "seeds=2"), ALONE)
    said = capsys.readouterr().out
    assert said.count("run 5 of 6: grammar finetune seed-1 (2 runs left, about ") == 1
    assert [made_at(run) for run in kept] == before
    assert scores(output) == scores(finished)


@pytest.mark.slow
def test_a_sweep_goes_on_from_its_table_alone(finished, tiny_data, tmp_path, capsys, shown):
    output = tmp_path / "out"
    for run in (*finished.glob("grammar/*/seed-0"), *finished.glob("grammar/teachers/*/")):
        for name in TABLE:
            copy = shutil.copytree if (run / name).is_dir() else shutil.copy
            if (run / name).exists():
                (output / run.relative_to(finished)).mkdir(parents=True, exist_ok=True)
                copy(run / name, output / run.relative_to(finished) / name)
    kept = list(output.glob("grammar/*/seed-0"))
    before = [made_at(run) for run in kept]
    assert len(kept) == 2
    # all is done: nothing is made, the teachers neither
    run_sweep(words(tiny_data, output, "keep_models=false"), ALONE)
    assert [made_at(run) for run in kept] == before
    # another seed: the teachers are made again
    capsys.readouterr()
    run_sweep(words(tiny_data, output, "seeds=2", "keep_models=false"), ALONE)
    said = capsys.readouterr().out
    assert "grammar teachers teacher-1: its model is gone, so it is made again" in said
    line = "grammar: 2 teachers to be made again: no model is left; finished students that stay: 2"
    assert said.index(line) < said.index("\nrun ")
    assert [made_at(run) for run in kept] == before
    assert scores(output) == scores(finished)


def test_a_student_waits_for_the_model_of_its_teacher(finished, tiny_data):
    given = words(tiny_data, finished, "seeds=2", "keep_models=false")
    grid = make_grid(given)
    ready = {unit.method: is_ready(grid, unit) for unit in grid.students("grammar")}
    # the teachers are finished, and their models are gone
    assert ready == {"finetune": True, "mean": False}


def test_what_goes_with_teachers_whose_models_are_gone_is_told_before_the_first_run(
    finished, tiny_data, tmp_path
):
    def told(*given):
        return list(again_lines(make_grid(words(tiny_data, finished, "keep_models=false", *given))))

    # all is done: no teacher is made
    assert told("seeds=2") == []
    again = "grammar: 2 teachers to be made again: no model is left"
    assert told("seeds=3") == [f"{again}; finished students that stay: 4"]
    # an open round: its finished students had the old teachers
    cold = "methods=[finetune,mean,{name: cold, method: mean, temperature: 1}]"
    undone = "; done again if the teachers differ then: grammar mean seed-1"
    assert told("seeds=[1]", cold) == [f"{again}{undone}; finished students that stay: 1"]
    assert told("seeds=[1,2]") == [f"{again}; finished students that stay: 2"]
    assert told("seeds=[5]") == [f"{again}; finished students that stay: 0"]
    # a run that was begun
    copy = shutil.copytree(finished, tmp_path / "out")
    (copy / "grammar" / "mean" / "seed-1" / "run_summary.json").unlink()
    grid = make_grid(words(tiny_data, copy, "keep_models=false", "seeds=2"))
    begun = "; what begins again: grammar mean seed-1"
    assert list(again_lines(grid)) == [f"{again}{begun}; finished students that stay: 3"]


def test_students_of_other_teachers_than_those_that_are_there_are_told_before_the_first_run(
    finished, tiny_data, one_teacher, tmp_path
):
    copy = shutil.copytree(finished, tmp_path / "out")
    teachers = [copy / "grammar" / "teachers" / f"teacher-{n}" for n in (0, 1)]
    cold = "methods=[finetune,mean,{name: cold, method: mean, temperature: 1}]"

    def told(*given):
        return list(again_lines(make_grid(words(tiny_data, copy, *given))))

    for teacher in teachers:
        shutil.copytree(one_teacher[1][0], teacher / "model")
    differ = "done again, since the teachers that are there differ: grammar mean seed-1"
    assert told("seeds=[1]", cold) == [f"grammar: {differ}; finished students that stay: 1"]
    # no round is open
    assert told("seeds=3") == []
    # the same weights as those that taught
    for seed in (0, 1):
        manifest = copy / "grammar" / "mean" / f"seed-{seed}" / "teacher_manifest.json"
        there = weights_hash(locate(str(teachers[0])))
        same = [{**teacher, "weights_sha256": there} for teacher in read(manifest)]
        manifest.write_text(json.dumps(same))
    assert told("seeds=[1]", cold) == []
    # a teacher's folder is gone, with all that it held
    shutil.rmtree(teachers[1])
    unsure = "1 teacher to be made; done again if the teachers differ then: grammar mean seed-1"
    assert told("seeds=[1]", cold) == [f"grammar: {unsure}; finished students that stay: 1"]
    assert told("seeds=3") == []


def test_a_model_is_removed_whole_or_not_at_all(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove_folder(model)
    assert not model.exists()
    # what the kill left is not a hindrance, and goes with the next
    model.mkdir()
    remove_folder(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_within_a_round_all_students_have_the_same_teachers(
    finished, tiny_data, tmp_path, capsys, shown
):
    """The teachers were made again on another machine, with other bits, while a round was open."""
    output = shutil.copytree(finished, tmp_path / "out")
    for seed in (0, 1):
        manifest = output / "grammar" / "mean" / f"seed-{seed}" / "teacher_manifest.json"
        others = [{**teacher, "weights_sha256": "0" * 64} for teacher in read(manifest)]
        manifest.write_text(json.dumps(others))
    closed, untaught = (output / "grammar" / name for name in ("mean/seed-0", "finetune/seed-1"))
    before = [made_at(closed), made_at(untaught)]
    arms = "methods=[finetune,mean,{name: cold, method: mean, temperature: 1}]"
    shutil.rmtree(output / "grammar" / "finetune" / "seed-0")
    run_sweep(words(tiny_data, output, "seeds=[1]", arms), ALONE)
    assert "grammar mean seed-1: it had other teachers, so it is done again" in (
        capsys.readouterr().out
    )
    assert [made_at(closed), made_at(untaught)] == before
    manifests = [
        read(output / "grammar" / arm / "seed-1" / "teacher_manifest.json")
        for arm in ("mean", "cold")
    ]
    hashes = [[teacher["weights_sha256"] for teacher in found] for found in manifests]
    assert hashes[0] == hashes[1]


def test_another_machine_takes_another_round(tiny_data, tmp_path):
    given = words(tiny_data, tmp_path / "out", "methods=[finetune]", "encoders=[]", "seeds=2")
    grid = make_grid(given)
    with try_join(grid.units[0], "another machine") as taken, ExitStack() as held:
        assert taken
        memory = Memory({})
        assert choose(grid, memory, held)[0] == 1
        assert memory.round == ("grammar", 1)
        memory.joined.close()
    with try_join(grid.units[0], "this machine") as first:
        with try_join(grid.units[0], "this machine") as second:
            assert (first, second) == (True, True)
        with try_join(grid.units[0], "another machine") as third:
            assert not third
    with try_join(grid.units[0], "another machine") as free:
        assert free


def test_teachers_whose_models_another_command_removes_are_made_again(tiny_data, tmp_path):
    """It has fewer seeds, so its last student is not that of this command."""
    given = words(tiny_data, tmp_path / "out", "methods=[mean]", "keep_models=false")
    grid, fewer = make_grid([*given, "seeds=2"]), make_grid(given)
    *teachers, first, _ = grid.units
    for unit in (*teachers, first):
        (unit.folder / "model").mkdir(parents=True)
        (unit.folder / "run_summary.json").write_text('{"finished": true}')
    memory = Memory({})
    with memory.joined, ExitStack() as held:
        assert choose(grid, memory, held) == (3, 0)
        held.close()
        tidy(fewer, first)
        # the student that is left waits for the second teacher too
        assert choose(grid, memory, held) == (0, 0)


def test_a_run_that_another_worker_undid_is_done_here_too(tiny_data, tmp_path):
    given = words(tiny_data, tmp_path / "out", "methods=[finetune]", "encoders=[]")
    grid = make_grid(given)
    (unit,) = grid.units
    unit.folder.mkdir(parents=True)
    (unit.folder / "run_summary.json").write_text('{"finished": true}')
    memory = Memory({})
    with memory.joined, ExitStack() as held:
        assert choose(grid, memory, held) == (None, 0)
        remove_folder(unit.folder)
        assert choose(grid, memory, held) == (0, 0)


def test_a_report_has_the_runs_that_end_while_it_waits_for_another_worker(
    tiny_data, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    grid = make_grid(words(tiny_data, output, "methods=[finetune]", "encoders=[]"))
    other = ExitStack()
    assert other.enter_context(try_lock(output / "report" / ".lock"))

    def end_a_run(_):
        (unit,) = grid.units
        unit.folder.mkdir(parents=True)
        (unit.folder / "run_summary.json").write_text('{"finished": true}')
        other.close()

    monkeypatch.setattr(sweep.time, "sleep", end_a_run)
    sweep.report(grid, {}, CPU)
    assert read(output / "report" / "report.json")["missing"] == []


@pytest.mark.slow
def test_two_runs_at_once_give_the_same_table(finished, tiny_data, tmp_path, capfd, shown):
    output = tmp_path / "out"
    run_sweep(words(tiny_data, output, "seeds=2", "keep_models=false", "jobs=2"), ALONE)
    said = capfd.readouterr().out
    assert "[1] run " in said
    assert "[2] run " in said
    assert "6 of 6 runs are done" in said
    assert scores(output) == scores(finished)
    assert [len(records(run, "start")) for run in output.glob("grammar/*/seed-*")] == [1] * 4


def test_a_worker_that_ends_badly_is_told(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(
        RunError, match="2 of 2 workers of the sweep ended with exit code 1; see their"
    ):
        run_sweep(words(tiny_data, tmp_path / "out", "jobs=2"), ALONE)


def test_runs_at_once_divide_the_threads(tiny_data, tmp_path, monkeypatch):
    grid = make_grid(words(tiny_data, tmp_path / "out", "jobs=2"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: env)
    for threads, share in ((8, "4"), (5, "2"), (1, "1")):
        monkeypatch.setattr("torch.get_num_threads", lambda count=threads: count)
        found = sweep.start_worker(grid)
        assert (found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"]) == (share, share)


def test_several_runs_at_once_are_for_one_process_without_a_gpu(tiny_data, tmp_path):
    grid = make_grid(words(tiny_data, tmp_path / "out", "jobs=2"))
    with pytest.raises(UserError, match=r"jobs=2 is for one process .* has 2 ranks; leave"):
        check_jobs(grid, World(0, 2, CPU))


def test_arms_are_run_with_their_keys_and_compared_with_the_reference(tiny_data, tmp_path):
    output = tmp_path / "out"
    arms = "methods=[finetune,{name: long, method: finetune, max_steps: 3, learning_rate: 1e-2}]"
    more = (arms, "seeds=3", "encoders=[]", "reference=long", "equal_steps=off")
    run_sweep(words(tiny_data, output, *more), ALONE)
    long, plain = (output / "grammar" / name / "seed-2" for name in ("long", "finetune"))
    assert [read(run / "run_summary.json")["steps"] for run in (long, plain)] == [3, 2]
    report = read(output / "report" / "report.json")
    cells = {cell["method"]: cell for cell in report["cells"]}
    assert report["reference"] == "long"
    assert cells["long"]["difference"] is None
    expected = cells["finetune"]["mean"] - cells["long"]["mean"]
    assert cells["finetune"]["difference"] == pytest.approx(expected)
    text = (output / "report" / "report.md").read_text()
    assert "| long | finetune | max_steps=3, learning_rate=0.01 |" in text
    assert "## Differences from long" in text
    page = (output / "report" / "report.html").read_text()
    assert "finetune with max_steps=3, learning_rate=0.01" in page
    assert "Differences from long" in page


def test_the_time_left_follows_from_runs_of_the_same_method(tiny_data, tmp_path):
    given = words(tiny_data, tmp_path / "out", "seeds=3", "encoders=[]", "teachers=[T]")
    grid = make_grid(given)
    assert time_left(grid, 1) == "6 runs left"

    def finish(unit, seconds):
        unit.folder.mkdir(parents=True)
        summary = {"finished": True, "train_s": seconds}
        (unit.folder / "run_summary.json").write_text(json.dumps(summary))

    first, other, second, _, _, _ = grid.units
    finish(first, 100.0)
    # nothing is known of the other method
    assert time_left(grid, 1) == "5 runs left, at least 3.33 min"
    finish(other, 900.0)
    assert time_left(grid, 1) == "4 runs left, about 33.3 min"
    finish(second, 300.0)
    assert time_left(grid, 2) == "3 runs left, about 16.7 min"


def test_the_time_of_a_teacher_follows_from_teachers_of_the_same_encoder(tiny_data, tmp_path):
    given = words(tiny_data, tmp_path / "out", "encoders=[SMALL,LARGE,SMALL,LARGE]")
    grid = make_grid([*given, "methods=[mean]"])
    assert len(grid.units) == 5

    def finish(unit, seconds):
        unit.folder.mkdir(parents=True)
        (unit.folder / "model").mkdir()
        summary = {"finished": True, "train_s": seconds}
        (unit.folder / "run_summary.json").write_text(json.dumps(summary))

    finish(grid.units[0], 100.0)
    assert time_left(grid, 1) == "4 runs left, at least 100 s"
    finish(grid.units[1], 700.0)
    assert time_left(grid, 1) == "3 runs left, at least 13.3 min"
    for unit in grid.units[2:4]:
        finish(unit, 400.0)
    # nothing is known of the student
    assert time_left(grid, 1) == "1 run left"


def test_the_time_left_is_shared_by_the_runs_that_processes_do_now(tiny_data, tmp_path):
    """A round of another machine is one run at a time there, however many runs it has."""
    arms = "methods=[finetune,{name: other, method: finetune, learning_rate: 1e-2}]"
    given = words(tiny_data, tmp_path / "out", arms, "encoders=[]", "seeds=3")
    grid = make_grid(given)
    assert at_work(grid) == 0
    with (
        try_join(grid.units[0], "another machine"),
        try_lock(lock_of(grid.units[0])),
        ExitStack() as held,
    ):
        memory = Memory({})
        assert choose(grid, memory, held)[0] == 2
        assert at_work(grid) == 2
        memory.joined.close()
    assert at_work(grid) == 0
