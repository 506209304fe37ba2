"""What the store's tests share: ids, a teacher whose logits follow from the ids, other processes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import sead_dist
from sead_dist.runtime.run_log import noted
from sead_dist.store.ids import unique_ids
from sead_dist.store.store import StoreFolder, Table, TeacherKey

EXACT = '{"device":"cpu","dtype":"float32"}'
OTHER = '{"device":"cuda","dtype":"bfloat16"}'


def make_ids(num: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return unique_ids(rng.integers(-(2**63), 2**63 - 1, (num, 2), dtype=np.int64))[0]


def fingerprint(teacher: int) -> str:
    return hashlib.sha256(b"weights of teacher %d" % teacher).hexdigest()


def make_key(teacher: int = 1, numerics: str = EXACT, classes: int = 3) -> TeacherKey:
    return TeacherKey(fingerprint(teacher), numerics, f"teacher-{teacher}", classes)


def logits_of(ids: np.ndarray, key: TeacherKey) -> np.ndarray:
    """float32 [B, C], different for every id, teacher and class."""
    seed = (ids[:, :1] >> 20) + int(key.fingerprint[:4], 16) + 7 * np.arange(key.classes)
    return ((seed % 100_003) / 1000).astype(np.float32)


def open_table(folder: Path, ids: np.ndarray, key: TeacherKey, **more) -> Table:
    names = {"task": "sst2", "split": "train", "run": "run-1", **more}
    return StoreFolder(folder).table(key, ids, **names)


def fill(folder: Path, ids: np.ndarray, key: TeacherKey, entries=None, **more) -> None:
    table = open_table(folder, ids, key, **more)
    entries = np.arange(len(ids)) if entries is None else np.asarray(entries)
    table.write(entries, logits_of(ids[entries], key))


def check_reads(folder: Path, ids: np.ndarray, key: TeacherKey, present=None, **more) -> list[str]:
    """The table has just these entries (None: all), with the right logits; its notices."""
    with noted() as notes:
        check_lookups(folder, ids, key, present, **more)
    return notes


def check_lookups(folder: Path, ids: np.ndarray, key: TeacherKey, present, **more) -> None:
    table = open_table(folder, ids, key, **more)
    expected = np.zeros(len(ids), bool)
    expected[np.arange(len(ids)) if present is None else present] = True
    logits, there = table.lookup(np.arange(len(ids)))
    np.testing.assert_array_equal(there, expected)
    np.testing.assert_array_equal(table.present_U, expected)
    np.testing.assert_array_equal(logits[there], logits_of(ids, key)[there])
    assert np.isnan(logits[~there]).all()


def blocks_of(folder: Path, key: TeacherKey | None = None) -> list[Path]:
    return sorted(folder.glob(f"values/{key.folder if key else '*'}/*.safetensors"))


def format_of(folder: Path) -> int:
    return int(json.loads((folder / "format.json").read_text())["format"])


def make_older(folder: Path) -> None:
    """The number of a store of format 1, which is the same without compacted blocks."""
    (folder / "format.json").write_text(json.dumps({"format": 1}))


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in a store, by its place."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def start(code: str, *args: object) -> subprocess.Popen:
    """Another Python process that runs `code` with these arguments and the names of this file."""
    here, package = Path(__file__).parent, Path(sead_dist.__path__[0]).parent
    path = os.pathsep.join([str(package), str(here), os.environ.get("PYTHONPATH", "")])
    lines = "import sys, time\nfrom pathlib import Path\nfrom store_world import *\n"
    command = [sys.executable, "-c", lines + code, *map(str, args)]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """While inside, `folder` is a disk of this size; the test is skipped where that cannot be."""
    import pytest  # not in the processes of `start`

    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small disk needs root on Linux")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def finish(process: subprocess.Popen, expect: int = 0) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == expect, err
    return out
