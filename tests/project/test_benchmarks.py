"""Every benchmark runs: each with `--smoke`, tiny and offline, as a person starts it.

A benchmark is a file of benchmarks/ that can be started, which its last lines say; the other files
hold what several share. A new benchmark without `--smoke` fails here.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
RESULTS = FOLDER.parent / "docs" / "results"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.py"))}
SCRIPTS = [name for name, text in TEXTS.items() if 'if __name__ == "__main__":' in text]
ON_GPUS = [name for name in SCRIPTS if "device_argument(parser)" in TEXTS[name]]
PEERS = {"three_systems.py": "textbrewer"}
AT_ONCE = 2


def run_smoke(name: str, work: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """One that sees neither real data nor what a person has in the folder where it starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("SEAD_DIST_DATA", None)
    environment["TMPDIR"] = str(work)
    return subprocess.run(
        [sys.executable, str(FOLDER / name), "--smoke", *more],
        env=environment, cwd=work, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def lacking(name: str) -> str | None:
    peer = PEERS.get(name)
    if peer is None or importlib.util.find_spec(peer) is not None:
        return None
    return f"{peer} is not installed: make peers puts it beside the environment"


def kept_files() -> dict[Path, int]:
    """Where benchmarks write their results."""
    return {
        path: path.stat().st_mtime_ns
        for folder in (FOLDER, RESULTS)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def smokes(request, tmp_path_factory) -> Iterator[dict[str, "Future[subprocess.CompletedProcess]"]]:
    """Those that the chosen tests ask for, two at a time: most of each is the start of Python."""
    chosen = [item.callspec.params["smoke_of"] for item in request.session.items
              if hasattr(item, "callspec") and "smoke_of" in item.callspec.params]  # fmt: skip
    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = {
            name: pool.submit(run_smoke, name, tmp_path_factory.mktemp(Path(name).stem))
            for name in chosen
            if lacking(name) is None
        }
        yield started
        for future in started.values():
            future.cancel()


@pytest.fixture(scope="module")
def kept_before() -> dict[Path, int]:
    return kept_files()


@pytest.mark.slow
@pytest.mark.parametrize("smoke_of", SCRIPTS)
def test_the_smoke_of_a_benchmark_ends_well_and_writes_no_result(smoke_of, kept_before, smokes):
    reason = lacking(smoke_of)
    if reason:  # .ci/run says that everything must run
        (pytest.fail if os.environ.get("SEAD_DIST_NEED_PEERS") == "1" else pytest.skip)(reason)
    done = smokes[smoke_of].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\| ?:?---", done.stdout), "it shows no table: " + done.stdout
    assert kept_files() == kept_before


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("name", ON_GPUS)
def test_the_smoke_of_a_benchmark_runs_on_a_gpu(name, tmp_path):
    done = run_smoke(name, tmp_path, "--device", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_list_of_benchmarks_names_every_one():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"| `{name}" not in listed] == []
