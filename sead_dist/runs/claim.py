"""Whose run an output folder holds: nothing of another run is ever written over.

run.json is the claim; a claim without progress (a run that was refused before it had trained)
gives way to a new one. A lock keeps a second process out while one is at work.
"""

import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict  # of Python 3.12, for pydantic

from sead_dist.config.automatic import final_checkpoint
from sead_dist.config.mistakes import as_yaml
from sead_dist.config.names import renamed
from sead_dist.config.registered import LANGUAGE_MODEL, MODEL, PLUGINS, keep_plugins, kept_paths
from sead_dist.config.schema import RunConfig, TeacherConfig, dump_config
from sead_dist.config.yaml_text import read_run_config
from sead_dist.data.splits import RunExamples, load_examples
from sead_dist.data.tasks import load_task
from sead_dist.errors import UserError, refusal
from sead_dist.models.pretrained import locate, weight_files, weights_hash
from sead_dist.models.start import run_start_hash
from sead_dist.runtime.files import files_hash, open_own, sweep_leftovers, written_aside
from sead_dist.runtime.redact import without_secrets
from sead_dist.runtime.run_log import (
    environment,
    is_finished,
    read_as,
    read_metrics,
    write_json,
)
from sead_dist.training.identity import RULES, Identity, refuse_other, rules_of

# what a run leaves before its first checkpoint; a new claim starts without it
EARLY_FILES = (
    *("metrics.jsonl", "log.txt", "progress.json"),
    *("teacher_validation.json", "teacher_manifest.json", "ensemble.json", "learnable.json"),
)

# where data given from Python lie; a name with a dot: what a start that is refused leaves is no
# other run
KEPT_DATA = ".data"

# where a student leaves word for workers of its pool
FOLLOWED = Path(".pool") / "student.json"


def given_teachers(config: RunConfig) -> list[dict[str, Any]]:
    """Teachers as they were written, placement aside, and the kind that all once had."""
    given = [entry.model_dump(mode="json", exclude={"placement"}) for entry in config.teachers]
    return [{k: v for k, v in one.items() if (k, v) != ("kind", MODEL)} for one in given]


def has_progress(run: Path) -> bool:
    """Whether there is anything here that took long to make."""
    if is_finished(run) or any((run / "checkpoints").glob("*-*[0-9]")):
        return True
    return any(record.get("event") == "train" for record in read_metrics(run))


def holds_run(run: Path) -> bool:
    """Whether there is a run in this folder; False where it is new or empty.

    Raises UserError where it holds something else, or is not ours.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"output_dir={run} is a file; give a folder")
    if not run.is_dir():
        return False
    if run.stat().st_uid != os.getuid():
        # what a resume reads from it would be somebody else's
        raise UserError(
            f"output_dir={run} belongs to user {run.stat().st_uid}, and you are {os.getuid()}; "
            "give a folder of your own"
        )
    # names with a dot: the lock, and files aside, of a process killed before its claim
    if all(path.name.startswith(".") for path in run.iterdir()):
        return False
    if not (run / "run.json").is_file():
        raise UserError(
            f"output_dir={run} holds other files and no run; give a new or empty folder"
        )
    return True


def already_finished(config: RunConfig) -> bool:
    """Whether the output folder holds this very run, finished. Reads, never writes, and asks
    nothing of the network: what is on the hub and not on this machine is taken to be as it was.

    Raises UserError where it holds something else.
    """
    run = Path(config.output_dir)
    if not holds_run(run):
        return False
    saved = refuse_other_keys(config)
    if saved is None or not is_finished(run):
        return False
    refuse_other_teachers(config)
    check_model(run)
    task = load_task(config.task)
    data, start, examples = saved.data, saved.start, None
    if config.data.path is not None or config.data.train is not None:  # else they are the hub's
        examples = load_examples(config, task, lambda _line: None)
        data = examples.fingerprint(task)
    with suppress(UserError):  # a start that is gone now is not another one
        start = run_start_hash(config, offline=True)
    refuse_other(run, saved, replace(saved.with_data(data), start=start))
    refuse_other_scoring(config, examples)
    return True


def refuse_other_scoring(config: RunConfig, examples: RunExamples | None) -> None:
    """Raises UserError where the run in the output folder keeps the best of the students that it
    scores, and now would score others. examples: None where a finished run's are not known;
    then what it has chosen counts."""
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
    was, asked = (as_yaml(value) for value in (saved["eval_steps"], config.eval_steps))
    if was != asked:
        raise UserError(
            f"output_dir={run} holds a run that keeps the best of the students that it scores: "
            f"eval_steps was {was}, is {asked}, which scores others; give eval_steps={was} to "
            "resume it, or another output_dir"
        )


def check_model(run: Path) -> None:
    """Raises UserError where the model of a finished run is gone or is not a whole file."""
    try:
        for path in weight_files(locate(str((run / "model").absolute()))):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="numpy"):
                    continue  # a file that is cut off or empty cannot be opened
    except (UserError, SafetensorError, OSError) as error:
        raise UserError(
            f"output_dir={run} holds this run, finished, and its model is gone ({error}); restore "
            f"{run / 'model'}, or give another output_dir to train again"
        ) from error


def drop_training_state(config: RunConfig) -> None:
    """Removes a finished run's checkpoints, unless keep_training_state is true."""
    if not config.keep_training_state:
        shutil.rmtree(Path(config.output_dir) / "checkpoints", ignore_errors=True)


def refuse_other_keys(config: RunConfig) -> Identity | None:
    """Whose run the output folder holds, None where there is no progress. Data are not looked at.

    Raises UserError where its keys are others.
    """
    run = Path(config.output_dir)
    if not (run / "run.json").is_file() or not has_progress(run):
        return None
    saved = Identity.read(run / "run.json")
    rules = rules_of(config)
    if teachers_of(run) != given_teachers(config):  # these are the difference, and are told as such
        own = {name: version for name, version in saved.rules.items() if name not in RULES}
        rules = {**own, **{name: rules[name] for name in RULES}}
    refuse_other(run, saved, replace(saved, config=config.identity(), rules=rules))
    return saved


def teachers_of(run: Path) -> list[dict[str, Any]]:
    """The entries of teachers that the run in this folder was given."""
    given = read_as(list[dict[str, Any]], run / "run.json", "teachers_given")
    return [renamed(entry, "teachers.") for entry in given]


def refuse_other_teachers(config: RunConfig) -> None:
    """Raises UserError where a finished run was given other teachers."""
    run = Path(config.output_dir)
    if teachers_of(run) != given_teachers(config):
        names = ", ".join(str(entry.get("path")) for entry in teachers_of(run)) or "none"
        raise UserError(
            f"output_dir={run} holds a finished run with the teachers {names}; "
            "give another output_dir"
        )
    if not config.taught or not (run / "teacher_manifest.json").is_file():
        return
    manifest = read_as(list[dict[str, Any]], run / "teacher_manifest.json")
    for entry, taught in zip(config.teachers, manifest, strict=False):
        weights = taught.get("weights_sha256")
        if entry.kind not in (MODEL, LANGUAGE_MODEL):
            continue  # a file's content is its teacher, and an endpoint is its first answers
        with suppress(UserError):  # one that is gone now is not another one
            weights = weights_now(entry) or weights
        if weights != taught.get("weights_sha256"):
            raise UserError(
                f"output_dir={run} holds a finished run, and teacher {entry.path} has other "
                "weights now than when it taught; give another output_dir"
            )


def weights_now(entry: TeacherConfig) -> str | None:
    """The hash of a teacher's weights as they are now; None for a GGUF file that is gone. Raises
    UserError where there are none."""
    file = Path(entry.path)
    if file.suffix == ".gguf":
        return files_hash([file]) if file.is_file() else None
    return weights_hash(locate(entry.path, entry.revision, offline=True))


def claim(run: Path, config: RunConfig, identity: Identity) -> None:
    """Write down whose run this folder holds, or compare with what is written.

    Raises UserError when there is progress of another run.
    """
    sweep_leftovers(run)
    record = run / "run.json"
    if record.is_file():
        saved = Identity.read(record)
        if has_progress(run):
            refuse_other(run, saved, identity)
        elif saved.differences(identity):
            refuse_busy_baseline(run)
            for name in (*EARLY_FILES, FOLLOWED):
                (run / name).unlink(missing_ok=True)
            for folder in ("teacher_rows", "baseline", PLUGINS):
                shutil.rmtree(run / folder, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    given = {"identity": asdict(identity), "teachers_given": given_teachers(config)}
    # first: whatever else lies here belongs to a claim
    write_json(record, {**given, "command": [without_secrets(word) for word in sys.argv[1:]]})
    if Path(config.task).is_file():
        with written_aside(run / "task.yaml") as aside:
            shutil.copyfile(config.task, aside)
    else:  # of an earlier try
        (run / "task.yaml").unlink(missing_ok=True)
    keep_plugins(config.plugins, run)
    kept = config.model_copy(update={"plugins": kept_paths(config.plugins, run)})
    with written_aside(run / "config.yaml") as aside:
        aside.write_text(without_secrets(dump_config(kept)), encoding="utf-8")
    write_json(run / "environment.json", environment())


def refuse_busy_baseline(run: Path) -> None:
    """Raises UserError where another process makes the baseline of the run that this folder holds:
    meanwhile it has no lock on the folder itself."""
    if (run / "baseline").is_dir():
        with locked(run / "baseline"):
            pass


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other processes out of this run directory. Raises UserError where one is at work."""
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
def try_lock(path: Path) -> Iterator[bool]:
    """Whether this process has the lock file, which a process that ends in any way gives back.

    Raises UserError or RunError where its folder cannot be made.
    """
    handle = open_lock(path)
    try:
        if not takes(handle, fcntl.LOCK_EX):
            yield False
            return
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield True
    finally:
        os.close(handle)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, made where it is missing. Raises UserError or RunError where its
    folder cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_own(path, os.O_RDWR)
    except OSError as error:
        raise refusal(
            f"output_dir={path.parent} cannot be made: {error.strerror}; give another folder", error
        ) from None


def takes(handle: int, kind: int) -> bool:
    """Whether the lock is this process's now. kind: LOCK_EX alone, LOCK_SH beside others."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Summary(TypedDict, total=False):
    """chosen: what a finished run took for keys that were left to it."""

    chosen: dict[str, Any]


class Followed(TypedDict):
    """The store that a student follows."""

    store: str
    id: str


def say_followed(run: Path, root: Path, store_id: str) -> None:
    """Leave word for workers in the run directory of a student: the store that it follows."""
    path = run / FOLLOWED
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"store": str(root.absolute()), "id": store_id})


def followed_store(run: Path) -> tuple[str, str] | None:
    """(path, id) of the store that the student in `run` follows; None where none has come."""
    try:
        said = read_as(Followed, run / FOLLOWED)
    except UserError:
        if (run / FOLLOWED).exists():
            raise
        return None
    return said["store"], said["id"]


def forget_followed(run: Path) -> None:
    """The word of an earlier student is no longer good."""
    (run / FOLLOWED).unlink(missing_ok=True)
