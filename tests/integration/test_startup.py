"""The command line starts quickly: what is heavy is imported only where it is used."""

import json
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["--version"], ["distill", "--help"], ["store", "rm", "--help"]),
        *(["submit", "--help"], ["jobs", "--help"]),
    ],
)
def test_help_imports_nothing_heavy(words):
    done = subprocess.run(
        [sys.executable, "-c", DUMP, *words], capture_output=True, text=True, check=True
    )
    said, imported = done.stdout.rstrip().rsplit("\n", 1)
    assert "sead-dist" in said
    assert HEAVY & set(json.loads(imported)) == set()


def test_a_mistyped_command_is_refused_before_anything_heavy_is_imported():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sead_dist", "destill"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "invalid choice: 'destill'" in done.stderr
    imported = {
        line.rsplit("|", 1)[1].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "argparse" in imported
    assert HEAVY & imported == set()
