"""A large file's hash is read once, and again whenever the file may be another."""

import hashlib
import os
import time
from types import SimpleNamespace

import pytest

from sead_dist.runtime import files as hashes

CLOCKED = hashes._clocked
OLD = time.time() - 3600


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """How often bytes were read, with every file large and its changes long ago."""
    monkeypatch.setattr(hashes, "LARGE_BYTES", 1)
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)
    monkeypatch.setattr(hashes, "_clocked", lambda _paths: True)
    monkeypatch.setenv("SEAD_DIST_HASHES", str(tmp_path / "cache"))
    real, count = hashes._read, []
    monkeypatch.setattr(hashes, "_read", lambda paths: count.append(1) or real(paths))
    return count


def test_what_did_not_change_is_read_once(tmp_path, reads):
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_bytes(b"one")
    paths[1].write_bytes(b"two")
    expected = hashlib.sha256(b"onetwo").hexdigest()
    assert [hashes.files_hash(paths) for _ in range(3)] == [expected] * 3
    assert len(reads) == 1
    # the parts of another checkpoint, though one of them is the same
    assert hashes.files_hash(paths[:1]) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 2
    assert all(len(path.name) == 64 for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("how", ["in place", "another in its place"])
def test_a_file_of_the_same_size_and_time_that_changed_is_read_again(tmp_path, reads, how):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, (OLD, OLD))
    assert hashes.files_hash([path]) == hashlib.sha256(b"one").hexdigest()
    time.sleep(0.05)  # a tick of the file system's clock
    if how == "in place":
        path.write_bytes(b"two")
    else:
        (tmp_path / "new").write_bytes(b"two")
        os.replace(tmp_path / "new", path)
    os.utime(path, (OLD, OLD))
    assert hashes.files_hash([path]) == hashlib.sha256(b"two").hexdigest()


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_S", 60.0)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert hashes.files_hash([path]) == hashes.files_hash([path])
    assert len(reads) == 2
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, reads, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    real = hashes._read

    def slowly(paths):
        found = real(paths)
        path.write_bytes(b"longer")
        return found

    monkeypatch.setattr(hashes, "_read", slowly)
    hashes.files_hash([path])
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_cannot_be_remembered_or_is_spoilt_is_read(tmp_path, reads, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    expected = hashes.files_hash([path])
    (known,) = (tmp_path / "cache").iterdir()
    for spoilt in (b"", b"abc", b"\xff" * 64):
        known.write_bytes(spoilt)
        assert hashes.files_hash([path]) == expected
    (tmp_path / "a file").touch()
    monkeypatch.setenv("SEAD_DIST_HASHES", str(tmp_path / "a file" / "below"))
    assert hashes.files_hash([path]) == expected


def test_nothing_is_remembered_of_file_systems_with_times_of_their_own(
    tmp_path, reads, monkeypatch
):
    (tmp_path / "far").mkdir()
    path = tmp_path / "far" / "weights"
    parts = [SimpleNamespace(mountpoint="/", fstype="ext4")]
    parts.append(SimpleNamespace(mountpoint=str(tmp_path / "far"), fstype="fuse.sshfs"))
    monkeypatch.setattr(hashes.psutil, "disk_partitions", lambda all: parts)
    monkeypatch.setattr(hashes, "_clocked", CLOCKED)
    near = tmp_path / "near"
    near.write_bytes(b"one")
    hashes.files_hash([near])
    hashes.files_hash([near])
    assert len(reads) == 1
    reads.clear()
    path.write_bytes(b"one")
    hashes.files_hash([path])
    hashes.files_hash([path])
    assert len(reads) == 2

    def hidden(all):
        raise PermissionError("mounts are hidden here")

    monkeypatch.setattr(hashes.psutil, "disk_partitions", hidden)
    hashes.files_hash([near])
    assert len(reads) == 3


def test_small_files_are_always_read(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(hashes, "LARGE_BYTES", 4)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    hashes.files_hash([path])
    hashes.files_hash([path])
    assert len(reads) == 2
    assert not (tmp_path / "cache").exists()
