"""The Python page and the notebook are true: their code runs, offline, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def runs(code, folder):
    (folder / "code.py").write_text(code, "utf-8")
    done = subprocess.run(
        [sys.executable, "code.py"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_pages_snippets_run(tmp_path):
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    said = runs("\n".join(blocks), tmp_path).splitlines()
    # only the page's own lines are printed
    assert len(said) == 3
    assert 0 <= float(said[0]) <= 1
    assert re.fullmatch(r"(positive|negative) [\d.]+", said[1])
    assert said[2] == "unknown key 'epoch'; did you mean 'num_train_epochs'?"


def test_the_pages_links_lead_to_files():
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).is_file(), link


def cells():
    notebook = json.loads((ROOT / "examples" / "distill.ipynb").read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells())


@pytest.mark.slow
def test_the_notebooks_cells_run(tmp_path):
    code = ["".join(cell["source"]) for cell in cells()]
    said = runs("\n".join([*code, "print(len(said), sorted(table))"]), tmp_path)
    assert said.split("\n")[-2] == "2 ['ensemble', 'student', 'teacher-0', 'teacher-1']"
