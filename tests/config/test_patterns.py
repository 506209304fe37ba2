"""`teachers=DIR/*` and `encoders=DIR/*`: which folders it stands for, at the first start and later."""

import json
from pathlib import Path

import pytest

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.runs.claim import given_teachers
from sead_dist.runs.distillation import keep_encoders
from sead_dist.sweep.grid import make_grid

BASE = ["sst2", "student=s", "output_dir=o"]


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("t/a", "t/c"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "t"


def begin(config) -> None:
    """What a run writes down when it claims its folder."""
    run = Path(config.output_dir)
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"teachers_given": given_teachers(config)}))


def paths(config) -> list[str]:
    return [entry.path for entry in config.teachers]


def test_a_folder_with_brackets_is_a_folder_and_a_pattern_leaves_out_what_cannot_teach(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    for name in ("t[1]", "runs/a/model", "runs/b", "runs/out", "runs/plain"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{}")
    (tmp_path / "runs/a/model/config.json").write_text("{}")
    (tmp_path / "runs/b/run.json").write_text("{}")
    assert load_config([*BASE, "teachers=t[1]"]).teachers[0].path == "t[1]"
    read = load_config(["sst2", "student=s", "output_dir=runs/out", "teachers=runs/*"])
    assert [entry.path for entry in read.teachers] == ["runs/a", "runs/plain"]
    assert "leaves out runs/b, a run that is not finished" in caplog.text
    assert "leaves out runs/out, the output of this run" in caplog.text


def test_a_run_that_has_begun_keeps_its_teachers(models, caplog):
    words = [*BASE, "teachers=[x, t/*]"]
    begin(load_config(words))
    (models / "b").mkdir()
    assert paths(load_config(words)) == ["x", "t/a", "t/c"]
    assert "leaves out t/b, which did not exist when the run in o began" in caplog.text
    assert paths(load_config([*words, "output_dir=other"])) == ["x", "t/a", "t/b", "t/c"]
    (models / "c").rmdir()
    with pytest.raises(UserError, match=r"o began with t/c, which does not exist .* restore it"):
        load_config(words)
    assert paths(load_config([*words, "output_dir=other"])) == ["x", "t/a", "t/b"]


def test_all_runs_of_a_sweep_that_has_begun_keep_its_teachers(models):
    words = ["tasks=[sst2,rte]", "methods=[finetune,mean]", "student=s", "output_dir=o"]
    words = [*words, "teachers=t/*"]
    (first, *_) = make_grid(words).units
    begin(first.config)
    (models / "b").mkdir()
    assert {tuple(paths(unit.config)) for unit in make_grid(words).units} == {("t/a", "t/c")}
    (models / "a").rmdir()
    with pytest.raises(UserError, match="o began with t/a"):
        make_grid(words)


def test_finetune_that_has_begun_keeps_its_encoders(models):
    words = ["sst2", "output_dir=o", "encoders=t/*"]
    begun = load_config(words)
    keep_encoders(Path("o"), [entry.path for entry in begun.encoders])
    (models / "b").mkdir()
    # nothing has begun yet
    assert [entry.path for entry in load_config(words).encoders] == ["t/a", "t/b", "t/c"]
    Path("o/teacher-0").mkdir()
    Path("o/teacher-0/run.json").write_text("{}")
    assert [entry.path for entry in load_config(words).encoders] == ["t/a", "t/c"]
    keep_encoders(Path("o"), ["other"])
    (models / "c").rmdir()
    with pytest.raises(
        UserError, match=r"encoders=t/\*: the run in o began with t/c, which does not exist"
    ):
        load_config(words)


def test_all_tasks_of_a_sweep_that_has_begun_keep_its_encoders(models):
    words = ["tasks=[sst2,rte]", "methods=[finetune,mean]", "student=s", "output_dir=o", "seeds=1"]
    words = [*words, "encoders=[x, t/*]"]

    def starts() -> list[tuple[str, str | None]]:
        made = [unit for unit in make_grid(words).units if unit.method == "teachers"]
        return [(unit.task, unit.config.student.path) for unit in made]

    before = starts()
    assert before == [(task, of) for task in ("sst2", "rte") for of in ("x", "t/a", "t/c")]
    keep_encoders(Path("o"), [str(path) for _, path in before])
    (models / "b").mkdir()
    assert ("rte", "t/b") in starts()  # nothing has begun yet
    first = Path("o/sst2/teachers/teacher-0")
    first.mkdir(parents=True)
    (first / "run.json").write_text("{}")
    assert starts() == before
    keep_encoders(Path("o"), ["other"])
    assert starts() == before
    (models / "c").rmdir()
    with pytest.raises(
        UserError, match=r"encoders=t/\*: the run in o began with t/c, which does not exist"
    ):
        make_grid(words)
