"""Which run an output folder holds. Nothing of another run with progress is overwritten.

run.json records the run (the claim). A claim without progress is replaced by a new one. A run that
was rejected before it trained leaves such a claim. A lock excludes a second process while one
writes.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from sead_dist.config.automatic import final_checkpoint
from sead_dist.config.mistakes import as_yaml
from sead_dist.config.names import renamed
from sead_dist.config.registered import LANGUAGE_MODEL, MODEL, PLUGINS, kept_paths, sources
from sead_dist.config.schema import RunConfig, TeacherConfig
from sead_dist.config.yaml_text import dump_config, read_run_config
from sead_dist.data.splits import RunExamples, load_examples
from sead_dist.data.tasks import load_task
from sead_dist.errors import UserError, rejection
from sead_dist.models.pretrained import locate, weight_files, weights_hash
from sead_dist.models.start import run_start_hash
from sead_dist.runtime.files import files_hash, open_own, sweep_leftovers, written_aside
from sead_dist.runtime.redact import without_secrets
from sead_dist.runtime.run_log import (
    environment,
    is_finished,
    noted,
    read_as,
    read_if_written,
    read_metrics,
    write_json,
)
from sead_dist.training.identity import RULES, Identity, reject_other, rules_of

# files that a run writes before its first checkpoint; the claim of another run removes them
EARLY_FILES = (
    *("metrics.jsonl", "log.txt", "progress.json"),
    *("teacher_validation.json", "teacher_manifest.json", "ensemble.json", "learnable.json"),
)

# The folder of data that are given from Python. Its name begins with a dot, so `holds_run` ignores
# it: a start that was rejected may leave it.
KEPT_DATA = ".data"

# the record of the store that a pool's student reads; the workers need it
STUDENT_STORE = Path(".pool") / "student.json"


def given_teachers(config: RunConfig) -> list[dict[str, Any]]:
    """The entries of teachers as they were given, without placement.

    The kind MODEL is left out, since runs of older versions have no kind.
    """
    given = [entry.model_dump(mode="json", exclude={"placement"}) for entry in config.teachers]
    return [{k: v for k, v in one.items() if (k, v) != ("kind", MODEL)} for one in given]


def has_progress(run: Path) -> bool:
    """Whether the run is finished, has a checkpoint, or has logged a training step."""
    if is_finished(run) or any((run / "checkpoints").glob("*-*[0-9]")):
        return True
    return any(record.get("event") == "train" for record in read_metrics(run))


def holds_run(run: Path) -> bool:
    """Whether there is a run in this folder; False where it is new or empty.

    Raises UserError where it holds something else, or belongs to another user.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"output_dir={run} is a file; give a folder")
    if not run.is_dir():
        return False
    if run.stat().st_uid != os.getuid():
        # a resume would read files that another user wrote
        raise UserError(
            f"output_dir={run} belongs to user {run.stat().st_uid}, and you are {os.getuid()}; "
            "give a folder of your own"
        )
    # Names that begin with a dot are the lock and unfinished files. A process that was killed
    # before its claim leaves them.
    if all(path.name.startswith(".") for path in run.iterdir()):
        return False
    if not (run / "run.json").is_file():
        raise UserError(
            f"output_dir={run} holds other files and no run; give a new or empty folder"
        )
    return True


def already_finished(config: RunConfig) -> bool:
    """Whether the output folder holds this run, finished.

    Writes nothing and does not use the network. Files that are on the hub and not on this machine
    count as unchanged. Raises UserError where the folder holds another run or something else, and
    where the model of this run cannot be read.
    """
    run = Path(config.output_dir)
    if not holds_run(run):
        return False
    saved = reject_other_keys(config)
    if saved is None or not is_finished(run):
        return False
    reject_other_teachers(config)
    check_model(run)
    task = load_task(config.task)
    data, start, examples = saved.data, saved.start, None
    # data of the hub are not read
    if config.data.path is not None or config.data.train is not None:
        with noted():
            examples = load_examples(config, task)
        data = examples.fingerprint(task)
    with suppress(UserError):  # a start whose files are gone does not count as changed
        start = run_start_hash(config, offline=True)
    reject_other(run, saved, replace(saved.with_data(data), start=start))
    reject_other_scoring(config, examples)
    return True


def reject_other_scoring(config: RunConfig, examples: RunExamples | None) -> None:
    """Raises UserError where a run that keeps its best student would now score it at other steps.

    examples: None where they are not known, as for a finished run. Then the final checkpoint that
    the run recorded counts.
    """
    run = Path(config.output_dir)
    if not (run / "config.yaml").is_file() or not has_progress(run):
        return
    if examples is not None:
        keeps = final_checkpoint(config, examples.rows_to_choose_by)
    else:
        chosen = read_as(Summary, run / "run_summary.json").get("chosen", {})
        keeps = chosen.get("final_checkpoint", final_checkpoint(config, 0))
    if keeps != "best":
        return
    saved = read_run_config(run)
    if "eval_steps" not in saved:
        return
    before, now = as_yaml(saved["eval_steps"]), as_yaml(config.eval_steps)
    if before != now:
        raise UserError(
            f"output_dir={run} holds a run that keeps the best of the students that it scores: "
            f"eval_steps was {before}, is {now}, with which other students are scored; give "
            f"eval_steps={before} to resume it, or another output_dir"
        )


def check_model(run: Path) -> None:
    """Raises UserError where the model of a finished run is gone or is not a whole file."""
    try:
        for path in weight_files(locate(str((run / "model").absolute()))):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="numpy"):
                    pass  # opening a truncated or empty file raises
    except (UserError, SafetensorError, OSError) as error:
        raise UserError(
            f"output_dir={run} holds this run, finished, but its model cannot be read ({error}); "
            f"restore {run / 'model'}, or give another output_dir to train again"
        ) from error


def drop_training_state(config: RunConfig) -> None:
    """Remove a finished run's checkpoints, unless keep_training_state is true."""
    if not config.keep_training_state:
        shutil.rmtree(Path(config.output_dir) / "checkpoints", ignore_errors=True)


def reject_other_keys(config: RunConfig) -> Identity | None:
    """Raises UserError where the run in the output folder has other keys than `config`.

    Returns the identity of that run; None where there is no run, or one without progress. Data are
    not compared.
    """
    run = Path(config.output_dir)
    if not (run / "run.json").is_file() or not has_progress(run):
        return None
    saved = Identity.read(run / "run.json")
    rules = rules_of(config)
    # With other teachers their own rules differ too. These are left out of the comparison, so that
    # the error names the teachers.
    if teachers_of(run) != given_teachers(config):
        own = {name: version for name, version in saved.rules.items() if name not in RULES}
        rules = {**own, **{name: rules[name] for name in RULES}}
    reject_other(run, saved, replace(saved, config=config.identity(), rules=rules))
    return saved


def teachers_of(run: Path) -> list[dict[str, Any]]:
    """The entries of teachers that were given to the run in this folder."""
    given = read_as(list[dict[str, Any]], run / "run.json", "teachers_given")
    return [renamed(entry, "teachers.") for entry in given]


def reject_other_teachers(config: RunConfig) -> None:
    """Raises UserError where a finished run has other teachers, or teachers with other weights."""
    run = Path(config.output_dir)
    if teachers_of(run) != given_teachers(config):
        names = ", ".join(str(entry.get("path")) for entry in teachers_of(run)) or "none"
        raise UserError(
            f"output_dir={run} holds a finished run with other teachers ({names}); "
            "give another output_dir"
        )
    if not config.taught or not (run / "teacher_manifest.json").is_file():
        return
    manifest = read_as(list[dict[str, Any]], run / "teacher_manifest.json")
    for entry, taught in zip(config.teachers, manifest, strict=False):
        weights = taught.get("weights_sha256")
        if entry.kind not in (MODEL, LANGUAGE_MODEL):
            continue  # only these kinds have weights
        with suppress(UserError):  # a teacher whose files are gone does not count as changed
            weights = weights_now(entry) or weights
        if weights != taught.get("weights_sha256"):
            raise UserError(
                f"output_dir={run} holds a finished run, and the weights of teacher {entry.path} "
                "have changed since; give another output_dir"
            )


def weights_now(entry: TeacherConfig) -> str | None:
    """The present hash of a teacher's weights; None for a GGUF file that does not exist.

    Raises UserError where the weights of a teacher without a GGUF file are not on this machine.
    """
    file = Path(entry.path)
    if file.suffix == ".gguf":
        return files_hash([file]) if file.is_file() else None
    return weights_hash(locate(entry.path, entry.revision, offline=True))


def claim(run: Path, config: RunConfig, identity: Identity, command: Sequence[str]) -> None:
    """Record that this folder holds the run of `config`. The caller holds the run's lock.

    command: the words of the command line; none for a call from Python. Where another run without
    progress is recorded, its early files are removed. Raises UserError where there is progress of
    another run.
    """
    sweep_leftovers(run)
    record = run / "run.json"
    if record.is_file():
        saved = Identity.read(record)
        if has_progress(run):
            reject_other(run, saved, identity)
        elif saved.differences(identity):
            reject_busy_baseline(run)
            for name in (*EARLY_FILES, STUDENT_STORE):
                (run / name).unlink(missing_ok=True)
            for folder in ("teacher_rows", "baseline", PLUGINS):
                shutil.rmtree(run / folder, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    given = {"identity": asdict(identity), "teachers_given": given_teachers(config)}
    # run.json is written first, so that every other file in the folder belongs to a claim
    # a call from Python has no words, and the run's configuration has what the call gave
    words = command or ("distill", str(run / "config.yaml"))
    line = [without_secrets(word) for word in words]
    write_json(record, {**given, "command": line, "from_python": not command})
    if Path(config.task).is_file():
        with written_aside(run / "task.yaml") as aside:
            shutil.copyfile(config.task, aside)
    else:  # an earlier claim may have left one
        (run / "task.yaml").unlink(missing_ok=True)
    keep_plugins(config.plugins, run)
    kept = config.model_copy(update={"plugins": kept_paths(config.plugins, run)})
    with written_aside(run / "config.yaml") as aside:
        aside.write_text(without_secrets(dump_config(kept)), encoding="utf-8")
    write_json(run / "environment.json", environment())


def keep_plugins(paths: Sequence[str], run: Path) -> None:
    """Keep what was run of these plugins in the run directory."""
    for kept, source in zip(map(Path, kept_paths(paths, run)), sources(paths), strict=True):
        if kept.is_symlink() or not kept.is_file() or kept.read_bytes() != source:
            kept.parent.mkdir(exist_ok=True)
            with written_aside(kept) as aside:
                aside.write_bytes(source)


def reject_busy_baseline(run: Path) -> None:
    """Raises UserError where another process makes the baseline of the run in this folder.

    Such a process holds the lock of RUN/baseline, and not the lock of RUN.
    """
    if (run / "baseline").is_dir():
        with locked(run / "baseline"):
            pass


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of this run directory while inside. Raises UserError where another process
    holds it."""
    path = run / ".lock"
    with try_lock(path) as taken:
        if not taken:
            holder = path.read_text(encoding="utf-8").strip() or "another process"
            raise UserError(
                f"output_dir={run} is being written by {holder}; wait for it, stop it, or give "
                "another output_dir"
            )
        yield


@contextmanager
def try_lock(path: Path, key: str = "output_dir") -> Iterator[bool]:
    """Yield whether this process holds the lock of this file.

    The lock is free again after the block, and when the process ends in any way. key: the one that
    names the folder of the file, for the error. Raises UserError or RunError where this folder
    cannot be made.
    """
    handle = open_lock(path, key)
    try:
        if not takes(handle, fcntl.LOCK_EX):
            yield False
            return
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield True
    finally:
        os.close(handle)


def open_lock(path: Path, key: str = "output_dir") -> int:
    """The descriptor of a lock file, which is made where it is missing.

    key and errors: as for `try_lock`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_own(path, os.O_RDWR)
    except OSError as error:
        raise rejection(
            f"{key}={path.parent} cannot be made: {error.strerror}; give another folder", error
        ) from None


def takes(handle: int, kind: int) -> bool:
    """Try to take the lock of an open file, without waiting. Whether this process now holds it.

    kind: LOCK_EX (exclusive) or LOCK_SH (shared).
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Summary(TypedDict, total=False):
    """The part of run_summary.json that is read here. chosen: the values that a finished run chose
    for keys that were null or auto."""

    chosen: dict[str, Any]


class StudentStore(TypedDict):
    """The record STUDENT_STORE: the folder and the id of the store that a student reads."""

    store: str
    id: str


def write_student_store(run: Path, root: Path, store_id: str) -> None:
    """Write into a student's run directory which store it reads. The pool's workers read this."""
    path = run / STUDENT_STORE
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"store": str(root.absolute()), "id": store_id})


def read_student_store(run: Path) -> tuple[str, str] | None:
    """(path, id) of the store that the student in `run` reads; None before it has written this.

    Raises UserError where the record cannot be read.
    """
    record = read_if_written(StudentStore, run / STUDENT_STORE)
    return None if record is None else (record["store"], record["id"])


def remove_student_store(run: Path) -> None:
    """Remove what an earlier student wrote about its store."""
    (run / STUDENT_STORE).unlink(missing_ok=True)
