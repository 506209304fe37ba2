"""The command line starts quickly: what is heavy is imported only where it is used."""

import gc
import json
import subprocess
import sys

import pytest

from sead_dist.cli.commands import importing

HEAVY = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "scipy",
    "sklearn",
    "submitit",
    "tokenizers",
    "torch",
    "transformers",
}
# what the process has imported by the time that it would leave
DUMP = """
import json, sys
from sead_dist.cli import commands as cli
try:
    cli.main(sys.argv[1:])
except SystemExit as exit:
    assert not exit.code, exit.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported_by(code, *words):
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    said, imported = done.stdout.rstrip().rsplit("\n", 1)
    return said, set(json.loads(imported))


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["--version"], ["distill", "--help"], ["store", "rm", "--help"]),
        *(["submit", "--help"], ["jobs", "--help"]),
    ],
)
def test_help_imports_nothing_heavy(words):
    said, imported = imported_by(DUMP, *words)
    assert "sead-dist" in said
    assert HEAVY & imported == set()


def test_a_finished_runs_command_is_answered_without_torch(finished, words):
    said, imported = imported_by(DUMP, "distill", *words(finished, "num_train_epochs=6"))
    assert "holds this run, finished: nothing to do" in said
    assert "numpy" in imported
    slow = {"torch", "transformers", "accelerate", "datasets", "pandas", "sklearn", "matplotlib"}
    assert slow & imported == set()


def test_accuracy_is_computed_without_scikit_learn_and_scipy():
    score = """
import numpy as np
from sead_dist.data.metrics import CLASSIFICATION
print(CLASSIFICATION["accuracy"](np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])))
"""
    said, imported = imported_by("import json, sys" + score + DUMP.splitlines()[-1])
    assert said == "0.75"
    assert {"scipy", "sklearn", "pandas"} & imported == set()


def test_intervals_are_computed_without_scipy_stats():
    """A start imports them, and `scipy.stats` takes a quarter of a second."""
    code = "import sead_dist.data.significance, sys; print('scipy.stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_collector_rests_while_heavy_modules_are_imported():
    frozen = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
        with pytest.raises(ImportError), importing():
            import sead_dist.not_there  # noqa: F401
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_mistyped_command_is_refused_before_anything_heavy_is_imported():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sead_dist", "destill"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    said = "sead-dist: 'destill' is not a command; did you mean 'distill'?; see 'sead-dist --help'"
    assert said in done.stderr.splitlines()
    assert "usage:" not in done.stderr
    imported = {
        line.rsplit("|", 1)[1].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "argparse" in imported
    assert HEAVY & imported == set()
