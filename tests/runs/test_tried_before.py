"""What would break only at the end of a run is tried before its first step."""

import shutil
from pathlib import Path

import pytest
import yaml
from small import ALONE, words

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.reporting import report
from sead_dist.runs.distillation import distill

pytestmark = pytest.mark.usefixtures("all_tried")


@pytest.fixture
def task(tiny_task):
    return tiny_task[0], tiny_task[1][0]


def run(given):
    return distill(load_config(given), ALONE, show_table=False, console=False)


def test_a_report_that_cannot_be_written_ends_the_run_before_its_first_step(
    tmp_path, task, monkeypatch
):
    data, teacher = task

    def breaks(panels, metric):
        raise ValueError("what only a plot would say")

    monkeypatch.setattr(report, "plot_scores", breaks)
    with pytest.raises(UserError, match="tried on 2 rows before training, cannot be written: Val"):
        run(words(data, [teacher], tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not list((tmp_path / "run").glob(".trial-*"))
    monkeypatch.undo()
    run(words(data, [teacher], tmp_path / "run"))  # the folder is as new


def test_a_teachers_name_is_no_formula_in_a_plot(tmp_path, task):
    data, teacher = task
    given = words(data, [], tmp_path / "run", max_steps=1)
    folder = run([*given, f"teachers=[{{path: {teacher}, name: $a_$b_{{}}, weight: 1}}]"])
    assert (folder / "plots" / "scores.png").is_file()
    assert "$a_$b_{}" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("output_dir=a\nb", "output_dir='a.nb': expected a text without line ends"),
        ("output_dir=a\udcffb", "expected a text without line ends or other control characters"),
        ("teachers=[{path: a, name: a\x07}]", "teachers.0.name='a.x07': expected a text"),
        (f"teachers=[{{path: a, name: {'x' * 300}}}]", "should have at most 200 characters"),
    ],
)
def test_a_name_that_no_file_or_plot_takes_is_refused_where_it_is_given(word, said):
    with pytest.raises(UserError, match=said):
        load_config(["task=sst2", "output_dir=run", word])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ".."}, "name is '..'"),
        ({"name": "é" * 60}, "it names files"),
        ({"splits": {"train": ["train"], "../../x": ["validation"]}}, "splits has '../../x'"),
        ({"splits": {"train": ["train"], "..": ["validation"]}}, "splits has '..'"),
        ({"splits": {"train": ["train"], "selection": ["validation"]}}, "splits has 'selection'"),
    ],
)
def test_a_task_whose_names_lead_out_of_the_run_folder_is_refused(tmp_path, task, changes, said):
    data = Path(shutil.copytree(task[0], tmp_path / "data"))
    own = yaml.safe_load((data / "task.yaml").read_text())
    (data / "task.yaml").write_text(yaml.safe_dump({**own, **changes}))
    with pytest.raises(UserError, match="it names files"):
        run(words(data, [], tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_path_in_yaml_that_begins_with_the_home_sign_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "own.yaml").write_text(
        "task: sst2\noutput_dir: ~/run\nstudent: ~/start\nteachers: [{path: ~/a}, ~/b]\n"
        "store: {path: ~/store}\n"
    )
    config = load_config([str(tmp_path / "own.yaml")])
    home = str(tmp_path / "home")
    assert config.output_dir == f"{home}/run"
    assert config.student.path == f"{home}/start"
    assert [entry.path for entry in config.teachers] == [f"{home}/a", f"{home}/b"]
    assert config.store.path == f"{home}/store"
