"""The Python page and the notebook are true: their code runs, offline, in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "distill.ipynb"


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


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if "outputs" in cell]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel_and_shows_bars(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # sockets of files, not ports, and a file's name of at most 107 letters
    with tempfile.TemporaryDirectory() as sockets:
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", sockets)
        file = f"{sockets}/kernel.json"
        manager = AsyncKernelManager(transport="ipc", connection_file=file)
        place = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(
            notebook, km=manager, timeout=500, startup_timeout=300, resources=place
        ).execute()
    data, _, runs, scores, said = (cell.outputs for cell in notebook.cells if "outputs" in cell)
    assert "sentence" in data[-1].data["text/plain"]
    rows = scores[-1].data["text/plain"].splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["teacher-0", "teacher-1", "ensemble", "student"]
    assert len(said[-1].data["text/plain"].splitlines()) == 3
    # a bar for each of the three runs; neither lines nor tables
    assert {(one.output_type, one.get("name")) for one in runs} == {("stream", "stdout")}
    shown = "".join(one.text for one in runs)
    last = [line.rpartition("\r")[2] for line in shown.strip().split("\n")]
    assert sum(line.startswith("training: 100%|") for line in last) == 3, last
    assert all("%|" in line for line in last), last
