"""The folder of a prediction store: its parts, its format, writing into it, locks and holds.

STORE/format.json                 {"format": 2}
STORE/keys/<hash>.safetensors     key blocks: the sorted unique example ids of one example set
STORE/values/<teacher>/           teacher.json, and the value blocks of one teacher key
STORE/tmp/                        files being written; the writer of an old one is dead
STORE/quarantine/                 files found bad, never read again
STORE/live/                       a locked file (a hold) for each run that uses the store now
STORE/leases/                     work items that a pool computes now (teachers/pool.py)
STORE/store.lock                  shared: a block is added; exclusive: unused files are removed
STORE/compact.lock                held by the one compaction or removal that runs
"""

import errno
import fcntl
import json
import os
import reprlib
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from sead_dist.errors import RunError, UserError, reason, rejection
from sead_dist.runtime.files import cache_place, open_own, sync

# Format 1 is the same without compacted blocks. A store of format 1 is read as it is, and gets the
# new number when it is opened for writing. A version that reads only format 1 would treat compacted
# blocks as bad ones.
FORMAT, OLDER_FORMAT = 2, 1
FOLDERS = ("keys", "values", "tmp", "quarantine", "live", "leases")
# claims: the former name of leases; nothing in it is read
OWN_NAMES = {*FOLDERS, "claims", "format.json", "store.lock", "compact.lock", "id"}
BLOCK_SUFFIX = ".safetensors"
# A temporary file that has not grown for this long belongs to a dead writer.
DEAD_WRITER_S = 3600.0

REMEDIES = {
    errno.ENOSPC: "free space there (sead-dist store rm, store compact) or give another store=DIR",
    errno.EDQUOT: "free space within the quota there or give another store=DIR",
    errno.EFBIG: "raise the limit on file size (ulimit -f) or give another store=DIR",
    errno.EROFS: "mount it for writing or give another store=DIR",
    errno.EACCES: "get permission to write there or give another store=DIR",
    errno.EPERM: "get permission to write there or give another store=DIR",
}


class BusyError(Exception):
    """Another process holds the lock."""


class Layout:
    """The paths of the store at `root`. `create` and `existing` check the store and return this."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys, self.values, self.tmp = root / "keys", root / "values", root / "tmp"
        self.quarantine, self.holds = root / "quarantine", root / "live"
        self.leases = root / "leases"

    def key_path(self, key_hash: str) -> Path:
        """The path of the key block with this hash."""
        return self.keys / f"{key_hash}{BLOCK_SUFFIX}"

    @contextmanager
    def lock(self, name: str, *, exclusive: bool, wait: bool = True) -> Iterator[None]:
        """Hold the lock file `name` while inside.

        Raises BusyError where `wait` is False and another process holds it, and RunError where the
        file cannot be opened or the file system has no locks.
        """
        mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            file = os.fdopen(open_own(self.root / name, os.O_WRONLY | os.O_APPEND), "a")
        except OSError as error:
            raise unwritable(self.root, name, error) from error
        with file:
            try:
                fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(name) from None
            except OSError as error:
                raise RunError(
                    f"the file system of the prediction store {self.root} has no file locks "
                    f"({error.strerror}); give another store=DIR, on a file system that has them"
                ) from error
            try:
                yield
            finally:
                # Unlocked explicitly: a child process forked meanwhile shares the open file and
                # would keep the lock.
                fcntl.flock(file, fcntl.LOCK_UN)


def store_folder(given: str | None) -> Path:
    """The folder of the store: `given`, else SEAD_DIST_STORE, else a folder in the user's cache."""
    return cache_place("store", "store=DIR", given)


def reject_foreign(root: Path) -> None:
    """Raises UserError where `root` is a file or a folder of something else, and RunError where it
    cannot be read. Writes nothing."""
    if root.exists() and not root.is_dir():
        raise UserError(f"store={root} is a file; give a folder (a missing one is made)")
    try:
        found = set(os.listdir(root)) if root.is_dir() else set()
    except OSError as error:
        raise RunError(f"store={root} cannot be read ({error}); give another store=DIR") from error
    # a run that checks whether all its nodes share the folder writes a hidden file there
    # (runtime/distributed.py)
    foreign = sorted(name for name in found - OWN_NAMES if not name.startswith("."))
    if foreign and not (root / "format.json").exists():
        raise UserError(
            f"store={root} holds other things ({foreign[0]!r}) and no format.json, so it is "
            "not a prediction store; give an empty or a new folder"
        )


def create(root: Path) -> Layout:
    """Open the store at `root` for writing. A missing one is made, and one of the older format gets
    the newest number.

    Raises UserError where `root` is a file, a folder of something else or of another format, and
    UserError or RunError (as `errors.rejection` chooses) where it is not writable.
    """
    layout = Layout(root)
    try:
        reject_foreign(root)
        root.mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            (root / name).mkdir(exist_ok=True)
        probe = layout.tmp / unique_name("probe")
        probe.write_text("writable")
        probe.unlink()
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "give another store=DIR")
        raise rejection(
            f"store={root} is not writable ({error.strerror}); {remedy}", error
        ) from error
    if (root / "format.json").exists():
        _read_format(layout)
    with layout.lock("store.lock", exclusive=False):
        pass  # raises where the file system has no locks
    update_format(layout)
    return layout


def existing(root: Path) -> Layout:
    """The store at `root`. Raises UserError where there is none, or one of another format. Writes
    nothing."""
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise UserError(f"store={root} {kind}; give the folder of a prediction store")
    if not (root / "format.json").exists():
        raise UserError(
            f"store={root} has no format.json, so it is not a prediction store; give the folder "
            "that the key `store` of a run names"
        )
    layout = Layout(root)
    _read_format(layout)
    return layout


def update_format(layout: Layout) -> None:
    """Give a new store, or one of the older format, the number of the newest format.

    Only the number differs: the blocks are the same in both. One rename changes it. So a kill
    leaves the old number or the new one, and a reader finds one of them, with the same rows. Raises
    RunError.
    """
    path = layout.root / "format.json"
    if path.exists() and _read_format(layout) == FORMAT:
        return
    with layout.lock("store.lock", exclusive=True):
        # checked again under the lock: a later version may have raised it further
        if not path.exists() or _read_format(layout) < FORMAT:
            write_aside(layout, path, [json.dumps({"format": FORMAT}).encode()])


def _read_format(layout: Layout) -> int:
    """The store's format. Raises UserError for one that this version does not read."""
    path = layout.root / "format.json"
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        line = f"{path} cannot be read: {reason(error)}; correct that, or give another store=DIR"
        raise rejection(line, error) from error
    try:
        found = json.loads(text)["format"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} does not give the store's format: it holds {reprlib.repr(text)}; expected "
            f'{{"format": {FORMAT}}}; write this into it where this version or an older one made '
            "the store, else give another store=DIR"
        ) from error
    if found not in (OLDER_FORMAT, FORMAT):
        raise UserError(
            f"the prediction store {layout.root} has format {found}, this version reads formats "
            f"{OLDER_FORMAT} and {FORMAT}; give another store=DIR, or use the version of sead_dist "
            "that wrote it"
        )
    return int(found)


def unique_name(stem: str) -> str:
    """A name that no other process makes."""
    return f"{stem}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:12]}"


def unwritable(root: Path, name: str, error: OSError) -> RunError:
    """The error for a store that cannot be written. name: the file or folder inside it."""
    remedy = REMEDIES.get(error.errno or 0, "check that folder or give another store=DIR")
    return RunError(
        f"the prediction store {root} cannot be written ({name}: {error.strerror}); {remedy}"
    )


def unreadable(path: Path, error: OSError) -> RunError:
    """The error for a file in the store that cannot be read."""
    return RunError(
        f"{path} in the prediction store cannot be read ({error.strerror}); correct that, or give "
        "another store=DIR"
    )


def write_aside(layout: Layout, path: Path, chunks: Iterable[Any]) -> None:
    """Write the buffers `chunks` one after the other to `path`, whole or not at all. Raises
    RunError."""
    with aside(layout, path.name) as (file, keep):
        for chunk in chunks:
            file.write(chunk)
        keep(path)


@contextmanager
def aside(layout: Layout, name: str) -> Iterator[tuple[BinaryIO, Callable[[Path], None]]]:
    """Yield (a new file in tmp/ to write to, a function of a path, which flushes the file to disk
    and moves it there).

    If that function is not called, the file is removed. Raises RunError (disk full, read-only, no
    permission). This differs from `written_aside` (runtime/files.py): a block's path follows from
    its content, its file may be mapped meanwhile, and it lies in tmp/, from which `compact` removes
    old files.
    """
    path = layout.tmp / unique_name(name)

    def keep(target: Path) -> None:
        file.flush()
        os.fsync(file.fileno())
        os.replace(path, target)
        sync(target.parent)

    try:
        with open(path, "x+b") as file:
            try:
                yield file, keep
            finally:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(layout.root, name, error) from error


def make_folder(layout: Layout, folder: Path) -> None:
    """Make a folder inside the store. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
    except OSError as error:
        raise unwritable(layout.root, folder.name, error) from error


def set_aside(layout: Layout, path: Path) -> Path | None:
    """Move a bad file to quarantine/. Returns its new path, or None where it could not be moved."""
    target = layout.quarantine / unique_name(path.name)
    try:
        os.replace(path, target)
    except OSError:
        return None
    return target


def old_temporaries(layout: Layout) -> list[Path]:
    """Files in tmp/ whose writers are dead: they have not grown for DEAD_WRITER_S, by the clock of
    their file system."""
    probe = layout.tmp / unique_name("clock")
    found: list[Path] = []
    with suppress(OSError):
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        for path in sorted(layout.tmp.iterdir()):
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime > DEAD_WRITER_S:
                    found.append(path)
    return found


@dataclass(frozen=True)
class Hold:
    """A run that uses the store now, from its file in live/. teachers: patterns of folder names
    under values/."""

    host: str
    pid: int
    run: str
    teachers: tuple[str, ...]

    def covers(self, teacher: str) -> bool:
        """Whether the run uses this folder under values/."""
        return any(fnmatchcase(teacher, pattern) for pattern in self.teachers)


@contextmanager
def hold(layout: Layout, run: str, teachers: Sequence[str]) -> Iterator[None]:
    """Mark the teacher folders as used by `run` while inside, at most until this process ends.

    teachers: patterns of folder names under values/. The file is locked before it gets its name.
    So no process finds it unlocked while this one lives. It stays open and locked, unlike a file
    that `aside` writes. Raises RunError where it cannot be written.
    """
    name = unique_name("run") + ".json"
    about = {"host": socket.gethostname(), "pid": os.getpid(), "run": run}
    text = json.dumps({**about, "teachers": sorted(set(teachers)), "since": time.time()})
    first_path, path = layout.tmp / name, layout.holds / name
    try:
        file = open(first_path, "x")  # noqa: SIM115 (open while held)
        file.write(text)
        file.flush()
    except OSError as error:
        raise unwritable(layout.root, name, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            # A removal that has begun ends first. A later one finds this file.
            with layout.lock("store.lock", exclusive=False):
                os.replace(first_path, path)
            yield
        finally:
            for left in (first_path, path):
                with suppress(OSError):
                    left.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)


def find_holds(layout: Layout) -> tuple[list[Hold], list[Path]]:
    """(the holds of runs that use the store now, the files of runs that have ended)."""
    holds: list[Hold] = []
    stale: list[Path] = []
    for path in sorted(layout.holds.glob("*.json")):
        try:
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    holds.append(_read_hold(file.read()))
                else:
                    fcntl.flock(file, fcntl.LOCK_UN)
                    stale.append(path)
        except FileNotFoundError:
            continue
        except OSError:
            # The facts of a run are unknown if this process may not open its file. Then all teacher
            # folders count as used.
            holds.append(_read_hold(""))
    return holds, stale


def _read_hold(text: str) -> Hold:
    try:
        about = json.loads(text)
        teachers = tuple(about["teachers"])
        return Hold(about["host"], about["pid"], about["run"], teachers)
    except (ValueError, LookupError, TypeError, RecursionError):
        return Hold("?", 0, "?", ("*",))
