"""README and pages are true: their shell lines run as written but shorter, one after the other in one
folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# in this order: a page's lines may use what the README's lines left behind
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in ("runs", "store", "sweeps")))
# what the test puts in the place of the README's own folders
VARIABLES = ("DATA", "ENCODER", "STUDENT", "TICKETS")


def blocks(language, *pages):
    fence = re.compile(rf"^```{language}\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    return [block for page in pages for block in fence.findall(page.read_text("utf-8"))]


def set_variables(script, values):
    """Lines NAME=... of the script with our values; each name must be there."""
    for name, value in values.items():
        script, count = re.subn(rf"^{name}=.*$", f"{name}={value}", script, flags=re.MULTILINE)
        assert count == 1, f"{name} is set {count} times"
    return script


def shortened(script):
    """Every line that trains, with fewer steps and no copies: the automatic 1,500 steps of nine
    students would take ten minutes."""
    trains = re.compile(
        r"^((?:torchrun .*-m sead_dist |sead-dist )(?:distill|finetune|sweep) (?:.*\\\n)*[^#\n]*)",
        flags=re.MULTILINE,
    )
    short, count = trains.subn(r"\1 max_steps=30 augment.copies=null", script)
    assert count == 6, f"{count} lines train"
    return short


def write_tickets(folder):
    """Files of the README's own task, in the columns that its YAML names. No text occurs twice:
    rows that share one are held out together."""
    folder.mkdir()
    kinds = {"billing": "wrong invoice", "outage": "server down", "other": "a question"}
    rows = [
        f"{subject} {number}\tplease help with {team} {number}\t{team}"
        for number in range(20)
        for team, subject in kinds.items()
    ]
    for name, some in (("train", rows), ("validation", rows[:12])):
        lines = "\n".join(["subject\tbody\tteam", *some])
        (folder / f"{name}.tsv").write_text(lines + "\n", "utf-8")


@pytest.fixture(scope="module")
def worked(grammar, teachers, tmp_path_factory):
    """A folder in which all shell lines ran, and what they printed. The built-in task stands in for
    SST-2 (it has the same columns), a tiny model for the hub's."""
    folder = tmp_path_factory.mktemp("readme")
    write_tickets(folder / "tickets")
    for text in blocks("yaml", *PAGES):
        name = re.match(r"# (\S+\.yaml)\n", text)
        assert name is not None, "a YAML block must begin with its file's name"
        (folder / name[1]).write_text(text, "utf-8")
    lines = [line for block in blocks("sh", *PAGES) for line in block.splitlines()]
    makes = [line for line in lines if line.startswith("make ")]
    assert [line.split()[1] for line in makes] == ["demo", "test"]
    script = "\n".join(line for line in lines if line not in makes)
    values = dict(zip(VARIABLES, [grammar, teachers[0], teachers[1], "tickets"], strict=True))
    (folder / "lines.sh").write_text(shortened(set_variables(script, values)), "utf-8")
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "-euxo", "pipefail", "lines.sh"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        timeout=540,
        check=False,
    )
    return folder, done


def test_every_page_with_shell_lines_is_run():
    """Lines that need what a test has not (a cluster, what `make demo` left) are `console`."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]
    assert [page for page in pages if blocks("sh", page) and page not in PAGES] == []


@pytest.mark.slow
def test_every_shell_line_runs(worked):
    folder, done = worked
    assert done.returncode == 0, done.stderr[-4000:]
    finished = {path.parent.name for path in folder.rglob("run_summary.json")}
    teachers = {"teacher-0", "teacher-1", "teacher-2"}
    assert finished == {*teachers, "student", "quick", "two-ranks", "seed-0", "seed-1"}
    assert (folder / "sweep" / "report" / "report.html").is_file()
    assert (folder / "router" / "teacher-0" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_predictions_of_new_rows_are_written(worked):
    folder, _ = worked
    lines = (folder / "labelled.tsv").read_text("utf-8").splitlines()
    assert lines[0].split("\t")[0] == "sentence"
    assert "predicted_label" in lines[0].split("\t")
    assert [line.split("\t")[0] for line in lines[1:]] == [
        "a warm and funny film",
        "flat , dull and far too long",
    ]


@pytest.mark.slow
def test_python_blocks_run(worked, monkeypatch, capsys):
    folder, _ = worked
    monkeypatch.chdir(folder)
    text = "\n".join(blocks("python", README))
    # as the shell lines that train; six rows to choose by may find a good teacher bad
    quick = 'max_steps=2, augment={"copies": None}, teacher_validation="off"'
    text, count = re.subn(r'output_dir="small"', rf"\g<0>, {quick}", text)
    assert count == 1
    exec(compile(text, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"^[01]\.\d+$", said, flags=re.MULTILINE)
    assert (folder / "small" / "model" / "model.safetensors").is_file()
    assert re.search(r"'label': '(positive|negative)'", said)
    assert re.search(r"^(positive|negative)$", said, flags=re.MULTILINE)


@pytest.mark.slow
def test_named_files_of_the_run_folder_are_there(worked):
    folder, _ = worked
    section = (
        (ROOT / "docs" / "runs.md")
        .read_text("utf-8")
        .split("## The run directory")[1]
        .split("\n## ")[0]
    )
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 10
    # a run without plugins has none, a finished one has no checkpoints, and of so few steps a
    # baseline would take more than a tenth (tests/runs/test_learnable.py shows that one is made)
    for name in {*names} - {"plugins/", "checkpoints/", "baseline/"}:
        name = name.replace("<split>", "validation").rstrip("/")
        assert (folder / "student" / name).exists(), name
