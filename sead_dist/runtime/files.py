"""Writing the files of a run, finding a user's folders, and sha256 of large files.

A file of a run is a regular file in the folder that a person gave. It is never written through a
link. The folder itself may be a link, as scratch folders and the hub's cache are. For files that a
person names (`--json FILE`) this differs: a link stays and its target is written, and devices and
pipes are written into.

The bytes of a teacher's weights identify the teacher. 64 teachers of BERT-large's size have 85 GB,
which take one core a minute at every start. So each hash of large files is kept as a small file in
the user's cache, by the files' places, sizes and times. On the file systems named below nobody can
set the time of a change (ctime). So a file that was written since, or another in its place, is read
again. On other file systems no hash is kept.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import psutil

from sead_dist.errors import RunError, UserError

ASIDE = ".aside"
# the end of the name that a folder has while another takes its place
OLDER = f"{ASIDE}-older"
# the folder to which older versions wrote a model
FORMER_ASIDE = "model.tmp"
# how the names of folders begin in which something is tried for a moment; and in older versions
TRIAL, FORMER_TRIAL = ".trial-", ".rehearsal-"


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a regular file, made where it is missing. flags: as for `os.open`.

    Raises UserError where a link, a pipe or a device stands in its place, OSError as `os.open`.
    """
    try:
        # without O_NONBLOCK, opening a pipe that nobody reads would wait
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise _foreign_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _foreign_file(path)
    return handle


def _foreign_file(path: Path) -> UserError:
    return UserError(
        f"{path} is a link, a pipe or a device, and a file of the run is written there; remove it, "
        "or give another folder"
    )


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to. On success the new file takes the place of `path`,
    which may have been a link.

    On any error the file aside is removed and `path` stays as it was.
    """
    # nobody can place a link beforehand at a name that is drawn by chance
    aside = path.with_name(f".{secrets.token_hex(8)}{ASIDE}{path.suffix}")
    try:
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        # an error of a write to an open file does not name the file
        error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(target: Path, replaces: bool = True) -> Iterator[Path]:
    """Yield a new folder beside `target` to write to. On success its files are flushed to the disk,
    and then it gets the name `target`.

    replaces: whether it takes the place of what is there (`put_folder`). If not, what another
    process has put there meanwhile stays, and OSError is raised. On any error the folder aside is
    removed, and `target` stays as it was.
    """
    aside = _beside(target, ASIDE)
    if replaces:
        put_back(target)
    try:
        aside.mkdir()
        yield aside
        sync_folder(aside)
        if replaces:
            put_folder(aside, target)
        else:
            aside.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_folder(folder: Path, target: Path) -> None:
    """Give a folder the name `target`, in the place of what is there, and flush that to the disk.

    This takes two renames. A kill leaves at `target` the new folder, the old one, or nothing (if it
    comes between the renames), and never a part of a folder. Where it leaves nothing, the old
    folder lies beside `target` (`put_back`). After an error the old folder is at `target`. Raises
    OSError.
    """
    put_back(target)
    older = _beside(target, OLDER)
    try:
        if os.path.lexists(target):
            target.rename(older)
        folder.rename(target)
    finally:
        if os.path.lexists(older) and not os.path.lexists(target):
            older.rename(target)
    sync(target.parent)
    _discard(older)


def put_back(target: Path) -> None:
    """Give the old folder its name `target` again, where a process was killed between the two
    renames of `put_folder`. Where `target` exists, remove the old folder. No other process may
    write `target` meanwhile. Raises OSError."""
    for older in target.parent.glob(f".{escape(target.name)}.*{OLDER}"):
        if _name_of(older) != target.name:  # the old folder of NAME.other
            continue
        if os.path.lexists(target):
            _discard(older)
        else:
            older.rename(target)


def _discard(older: Path) -> None:
    """Remove an old folder. It is renamed first, so that no part of it is ever put back."""
    _remove_renamed(older, older.with_name(_name_of(older)))


def remove_folder(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that a kill never leaves a part under its name. What
    a killed removal left beside it is removed too. No other process may write the folder
    meanwhile. Raises OSError."""
    for left in folder.parent.glob(f".{escape(folder.name)}.*{ASIDE}"):
        if _name_of(left) == folder.name:
            _remove(left)
    _remove_renamed(folder, folder)


def _remove_renamed(folder: Path, named: Path) -> None:
    """Remove a folder under a name aside of `named`."""
    aside = _beside(named, ASIDE)
    with suppress(FileNotFoundError):
        folder.rename(aside)
        _remove(aside)


def _name_of(older: Path) -> str:
    """The name that a folder had before it became .NAME.LETTERS.aside-older."""
    return older.name[1:].rsplit(".", 2)[0]


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}{ending}")


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Flush all files of a folder, and their names, to the disk."""
    for path in (*(file for file in folder.rglob("*") if file.is_file()), folder, folder.parent):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_for_person(path: Path) -> Iterator[Path]:
    """As `written_aside`, for a file that a person names. Of a link the target is written. A
    device or pipe is written into."""
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            aside = Path(folder) / path.name
            yield aside
            with aside.open("rb") as source, path.open("ab") as target:
                shutil.copyfileobj(source, target)
        return
    with written_aside(path.resolve()) as aside:
        yield aside


def is_stream(path: Path) -> bool:
    """Whether what is written to `path` goes elsewhere: to a device, a pipe, an open file."""
    return path.absolute().parts[1:2] in (("dev",), ("proc",)) or (
        path.exists() and not path.is_file()
    )


def check_writable(option: str, path: Path) -> None:
    """Raises UserError where no file can be at `path`, RunError where it may not be written, before
    any long work."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file")
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise RunError(f"{option} {path} is not writable; give another")
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise RunError(f"{option} {path}: folder {folder} is not writable; give another")


def sweep_leftovers(run: Path) -> None:
    """Remove what a killed process of this run left half written, and put back the folders that it
    was about to replace. The caller holds the run's lock."""
    checkpoints = run / "checkpoints"
    inside = ("plots", "plugins", "predictions", "model", "model/plots")
    for folder in (run, checkpoints, *(run / name for name in inside)):
        for older in [*folder.glob(f".*{OLDER}")]:
            put_back(folder / _name_of(older))
        for path in [*folder.glob(f".*{ASIDE}*")]:
            _remove(path)
    trials = [path for name in (TRIAL, FORMER_TRIAL) for path in run.glob(f"{name}*")]
    former = (run / FORMER_ASIDE, *checkpoints.glob("*.tmp"))
    for path in (*trials, *former, checkpoints / "trial"):
        shutil.rmtree(path, ignore_errors=True)


# hashes of smaller files are not kept: these are quick to read
LARGE_BYTES = 1 << 24
# a file may change again within one tick of its file system's clock, which may differ from ours
SETTLED_S = 60.0
# writing into the user's cache takes less
OLD_S = 24 * 3600.0
# names aside there, and those of older versions; the folder may hold files of others
LEFTOVER = re.compile(
    rf"\.(.*\.)?[0-9a-f]{{16}}{re.escape(ASIDE)}(\.\w+)?|[0-9a-f]{{64}}\.\d+\.tmp"
)
# file systems that keep the time of a change themselves
CLOCKED = (*("ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay"), *("nfs", "nfs4", "lustre"))


def user_folder(variable: str, below: str, own: str) -> Path:
    """A folder of this user: the one that an XDG variable names, else below the home folder.

    own: how a person can name the folder, for the message. Raises UserError for no home.
    """
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path.home() / below
    except RuntimeError as error:
        raise UserError(f"this user has no home folder; set HOME, or {own}") from error


def cache_place(name: str, own: str, given: str | None = None) -> Path:
    """`given`, else the path in the variable SEAD_DIST_NAME (for rates.json SEAD_DIST_RATES), else
    `name` in the package's folder of the user's cache. own and errors: as for `user_folder`."""
    named = given or os.environ.get(f"SEAD_DIST_{Path(name).stem.upper()}")
    if named:
        return Path(named)
    return user_folder("XDG_CACHE_HOME", ".cache", own) / "sead_dist" / name


def sweep_old(folder: Path) -> None:
    """Remove what a killed process left half written in a folder of the user's cache, a day ago or
    earlier. What is newer may be written now, also by another machine."""
    for path in folder.iterdir():
        with suppress(OSError):
            if LEFTOVER.fullmatch(path.name) and time.time() - path.lstat().st_mtime > OLD_S:
                _remove(path)


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
        sweep_old(known.parent)
        settled = time.time() - max(path.stat().st_ctime for path in paths) > SETTLED_S
        if settled and _state(paths) == before:
            with written_aside(known) as aside:
                aside.write_text(digest, encoding="ascii")
    return digest


def _state(paths: Sequence[Path]) -> list[tuple[str, int, int, int, int, int]]:
    found = []
    for path in paths:
        with path.open("rb") as file:  # opened: NFS then queries the server
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
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
