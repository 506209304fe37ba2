"""sha256 of large files, remembered for as long as they stay as they are.

Who a teacher is follows from the bytes of its weights, and 64 of BERT-large's size have 85 GB: a
minute of one core at every start. What is remembered is a small file each in the user's cache, by
the files' places, sizes and times. On the file systems named below nobody can set the time of a
change (ctime), so a file that was written since, or another in its place, is read again; on others
nothing is remembered.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from sead_dist.errors import UserError

# what is quick to read is not remembered
LARGE_BYTES = 1 << 24
# a file may change again within one tick of its file system's clock, which may differ from ours
SETTLED_S = 60.0
# file systems that keep the time of a change themselves
CLOCKED = (*("ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay"), *("nfs", "nfs4", "lustre"))


def user_folder(variable: str, below: str, own: str) -> Path:
    """A folder of this user: where an XDG variable says, else below the home folder.

    own: how the person can name the folder that is asked for. Raises UserError for no home.
    """
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path.home() / below
    except RuntimeError as error:
        raise UserError(f"this user has no home folder; set HOME, or {own}") from error


def cache_place(name: str, own: str, given: str | None = None) -> Path:
    """`given`, else where SEAD_DIST_NAME says (of rates.json SEAD_DIST_RATES), else `name` in the
    package's folder of the user's cache. own: as for `user_folder`, whose errors it raises."""
    named = given or os.environ.get(f"SEAD_DIST_{Path(name).stem.upper()}")
    if named:
        return Path(named)
    return user_folder("XDG_CACHE_HOME", ".cache", own) / "sead_dist" / name


def files_hash(paths: Sequence[Path]) -> str:
    """sha256 over the bytes of these files, one after the other."""
    before = _state(paths)
    if sum(size for *_, size, _, _ in before) < LARGE_BYTES or not _clocked(paths):
        return _read(paths)
    key = hashlib.sha256(json.dumps(before).encode()).hexdigest()
    known = cache_place("hashes", "SEAD_DIST_HASHES=DIR") / key
    with suppress(OSError, UnicodeDecodeError):
        text = known.read_text(encoding="ascii")
        if len(text) == hashlib.sha256().digest_size * 2:
            return text
    digest = _read(paths)
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        aside = known.with_name(f"{key}.{os.getpid()}.tmp")
        aside.write_text(digest, encoding="ascii")
        settled = time.time() - max(path.stat().st_ctime for path in paths) > SETTLED_S
        if settled and _state(paths) == before:
            os.replace(aside, known)
        aside.unlink(missing_ok=True)
    return digest


def _state(paths: Sequence[Path]) -> list[tuple[str, int, int, int, int, int]]:
    found = []
    for path in paths:
        with path.open("rb") as file:  # opened: NFS then asks the server
            about = os.fstat(file.fileno())
        facts = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        found.append((str(path.resolve()), *facts))
    return found


def _clocked(paths: Sequence[Path]) -> bool:
    """Whether all lie on file systems that keep the time of a change themselves."""
    try:
        types = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    except OSError:  # a container may hide its mounts
        return False
    homes = [[str(folder) for folder in path.resolve().parents] for path in paths]
    nearest = [next((types[one] for one in home if one in types), None) for home in homes]
    return all(kind in CLOCKED for kind in nearest)


def _read(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
