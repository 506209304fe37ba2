"""A comparison is fair: a method gets the rows that it can use, and as many steps as the others.

54 labelled and 20 unlabelled rows, 8 to a step. Where the length is left to the runs, three epochs of
the labels alone have 21 steps, and three passes over all rows 30.
"""

import re
import signal
from pathlib import Path

import pytest
from small import ALONE, read, records, sweep_words, words

from sead_dist.cli.submit import runs_to_submit, submit_sweep
from sead_dist.config import automatic
from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.planning.table import plan as plan_run
from sead_dist.runs.distillation import distill, finetune
from sead_dist.slurm.settings import SlurmSettings
from sead_dist.sweep import run as sweep
from sead_dist.sweep.checks import needs_rows, prepare_grid, steps_line
from sead_dist.sweep.grid import make_grid
from sead_dist.sweep.run import run_sweep


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Without the least numbers of steps of a real run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automatic, "LEAST_STEPS", 1)
        patch.setattr(automatic, "LEAST_FINETUNING", 1)
        yield


def fair_words(task: Path, output: Path, *more: str) -> list[str]:
    """A sweep of two methods and one seed, its length left to it, with unlabelled text."""
    return sweep_words(
        task,
        output,
        *("methods=[finetune,mean]", "seeds=1", "max_steps=null"),
        *("finetune.max_steps=2", f"unlabeled.path={task}/unlabeled.tsv", *more),
    )


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> tuple[Path, str]:
    """A sweep of equal steps, done, and what it said."""
    output = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(sweep, "tell", said.append)
        run_sweep(fair_words(tiny_data, output), ALONE)
    return output, "\n".join(said)


def summaries(output: Path) -> dict[str, dict]:
    return {
        method: read(output / "grammar" / method / "seed-0" / "run_summary.json")
        for method in ("finetune", "mean")
    }


@pytest.mark.slow
def test_only_students_of_teachers_get_unlabelled_rows_and_all_take_as_many_steps(finished):
    output, said = finished
    found = summaries(output)
    rows = {m: (of["train_rows"], of["unlabelled_rows"], of["steps"]) for m, of in found.items()}
    assert rows == {"finetune": (54, 0, 30), "mean": (74, 20, 30)}
    for teacher in (output / "grammar" / "teachers").glob("teacher-?"):
        assert read(teacher / "run_summary.json")["unlabelled_rows"] == 0
    assert (
        "grammar: 54 labelled rows, 20 unlabelled ones for methods with teachers; every method "
        "takes 30 steps (equal_steps=on; fewer by their own rows: finetune 21)"
    ) in said
    # the best student is chosen among as many
    scored = {
        method: [of["step"] for of in records(output / "grammar" / method / "seed-0", "eval")]
        for method in found
    }
    assert scored["finetune"] == scored["mean"] == [7, 14, 21, 28, 30]


def test_the_report_lists_rows_steps_and_seconds_of_each_method(finished):
    output, _ = finished
    report = read(output / "report" / "report.json")
    assert report["equal_steps"] is True
    keys = ("method", "labelled_rows", "unlabelled_rows", "steps", "own_steps")
    cells = [tuple(cell[key] for key in keys) for cell in report["cells"]]
    assert cells == [("finetune", 54, 0, 30, 21), ("mean", 54, 20, 30, None)]
    text = (output / "report" / "report.md").read_text()
    head = "| task | method | labelled rows | unlabelled rows | steps | seconds of training |"
    assert head in text
    assert re.search(r"\| grammar \| finetune \| 54 \| 0 \| 30 \| \d+\.\d \| 0 \|", text)
    assert re.search(r"\| grammar \| mean \| 54 \| 20 \| 30 \| \d+\.\d \| \d+ \|", text)
    for page in (text, (output / "report" / "report.html").read_text()):
        assert "(equal_steps=on). Fewer by their own rows: finetune on" in page


def test_rows_of_a_run_that_an_older_version_made_are_counted_likewise(finished, tiny_data):
    output, _ = finished
    before = read(output / "report" / "report.json")["cells"]
    kept = {file: file.read_text() for file in output.glob("grammar/*/seed-0/run_summary.json")}
    assert len(kept) == 2
    for file, text in kept.items():
        file.write_text(text.replace('"unlabelled_rows"', '"transfer_rows"'))
    run_sweep(fair_words(tiny_data, output), ALONE)
    assert read(output / "report" / "report.json")["cells"] == before
    for file, text in kept.items():
        file.write_text(text)


def test_again_it_finds_its_runs_done_and_so_does_submit(
    finished, tiny_data, tmp_path, capsys, shown
):
    output, _ = finished
    given = fair_words(tiny_data, output)
    run_sweep(given, ALONE)
    assert not re.search(r"run \d+ of", capsys.readouterr().out)
    settings = SlurmSettings.model_construct(signal_delay=30)
    submit_sweep(given, settings, 2, True, tmp_path)
    assert "is finished" in capsys.readouterr().out


def test_other_steps_and_old_teachers_are_refused_in_the_same_folder(finished, tiny_data):
    output, _ = finished
    with pytest.raises(UserError, match="max_steps was 30, is None"):
        run_sweep(fair_words(tiny_data, output, "equal_steps=off"), ALONE)
    record = output / "grammar" / "finetune" / "seed-0" / "run.json"
    before = record.read_text()
    record.write_text(before.replace('"max_steps": 30', '"max_steps": null'))
    with pytest.raises(
        UserError, match=r"max_steps was None, is 30; .*21 are finetune's own: equal"
    ):
        run_sweep(fair_words(tiny_data, output), ALONE)
    record.write_text(before)
    # earlier versions fine-tuned teachers on the unlabelled rows too
    made = output / "grammar" / "teachers" / "teacher-0" / "run.json"
    before = made.read_text()
    identity = read(made)["identity"]
    made.write_text(before.replace(identity["data"], "0" * 64))
    with pytest.raises(UserError, match="teacher-0 holds another run: the fingerprint of data"):
        run_sweep(fair_words(tiny_data, output), ALONE)
    made.write_text(before)


@pytest.mark.slow
def test_with_equal_steps_off_each_method_takes_its_own(
    finished, tiny_data, tmp_path, capsys, shown
):
    teachers = finished[0] / "grammar" / "teachers" / "*"
    given = fair_words(tiny_data, tmp_path / "out", "encoders=[]", f"teachers={teachers}")
    run_sweep([*given, "equal_steps=off"], ALONE)
    assert {m: of["steps"] for m, of in summaries(tmp_path / "out").items()} == {
        "finetune": 21,
        "mean": 30,
    }
    assert "; steps: finetune 21, mean 30 (equal_steps=off)" in capsys.readouterr().out
    assert "(equal_steps=off)" in (tmp_path / "out" / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_steps_it_was_given(
    finished, tiny_data, tmp_path, monkeypatch
):
    teachers = finished[0] / "grammar" / "teachers" / "*"
    given = fair_words(tiny_data, tmp_path / "out", "encoders=[]", f"teachers={teachers}")
    run = tmp_path / "out" / "grammar" / "finetune" / "seed-0"
    own = sweep.distill

    def stopped(config, world, *, stop, **more):
        stop.signal = signal.SIGTERM
        return own(config, world, stop=stop, **more)

    monkeypatch.setattr(sweep, "distill", stopped)
    run_sweep(given, ALONE)
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    monkeypatch.setattr(sweep, "distill", own)
    run_sweep(given, ALONE)
    assert [of["total_steps"] for of in records(run, "start")] == [30, 30]
    assert summaries(tmp_path / "out")["finetune"]["steps"] == 30


@pytest.mark.slow
def test_text_that_no_file_answers_makes_no_method_shorter(tiny_data, tmp_path, capsys, shown):
    rows = (tiny_data / "train.tsv").read_text().splitlines()
    (tmp_path / "says.tsv").write_text("\n".join(rows) + "\n")  # of training rows alone
    given = fair_words(
        tiny_data,
        tmp_path / "out",
        "encoders=[]",
        f"teachers=[{{predictions: {tmp_path}/says.tsv}}]",
    )
    run_sweep(given, ALONE)
    found = summaries(tmp_path / "out")
    assert {m: (of["unlabelled_rows"], of["steps"]) for m, of in found.items()} == {
        "finetune": (0, 30),
        "mean": (0, 30),
    }
    assert "takes 30 steps (equal_steps=on; fewer by their own rows: finetune 21)" in (
        capsys.readouterr().out
    )
    assert needs_rows(make_grid([*given, "methods=[mean]"]), "grammar")


def test_a_length_that_the_loss_may_cut_is_told_as_the_most(finished, tiny_data, tmp_path):
    grid = make_grid(fair_words(tiny_data, tmp_path / "out", "early_stopping_patience=2"))
    fixed, data = prepare_grid(grid, ["grammar"])
    assert "; every method takes at most " in steps_line(fixed, "grammar", data["grammar"])


def test_steps_that_are_given_are_every_methods(finished, tiny_data, tmp_path):
    grid = make_grid(fair_words(tiny_data, tmp_path / "out", "max_steps=3"))
    fixed, _ = prepare_grid(grid, ["grammar"])
    assert fixed == grid
    assert not needs_rows(grid, "grammar")


def test_a_run_refuses_text_that_nothing_can_use(tiny_data, tmp_path):
    out, text = tmp_path / "out", f"unlabeled.path={tiny_data}/unlabeled.tsv"
    untaught = load_config([*words(tiny_data, ["t"], out), text, "method=finetune"])
    alone = load_config([*words(tiny_data, [], out), text])
    encoder = f"encoders=[{tiny_data / 'student.yaml'}]"
    with pytest.raises(
        UserError, match=r"^unlabeled.path=.*: unlabelled .*ensemble=none uses none"
    ):
        distill(untaught, ALONE)
    with pytest.raises(UserError, match=r"none are given; leave unlabeled.path out, or give teach"):
        distill(alone, ALONE)
    with pytest.raises(UserError, match=r"finetune uses none; leave unlabeled.path out"):
        finetune(load_config([*words(tiny_data, [], out), text, encoder]), ALONE)
    with pytest.raises(UserError, match="uses none"):
        plan_run(untaught, ALONE, None, None, None, False, None)
    with pytest.raises(UserError, match="none are given"):
        runs_to_submit([*words(tiny_data, [], out), text], None)
    assert not out.exists()
