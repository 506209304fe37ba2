"""Whatever lies in a file, the reader alone answers: with what it read, or with one line.

Over a thousand inputs are made from sound ones by a seeded generator and given to the readers in
this process: none may raise anything but UserError and RunError, and none may take long.
"""

import copy
import gzip
import json
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small import ALONE, TASK, save_teacher

from sead_dist.config.load import load_config
from sead_dist.config.schema import StudentConfig
from sead_dist.data.examples import build_examples
from sead_dist.data.loading import read_rows
from sead_dist.data.tasks import load_task
from sead_dist.errors import RunError, UserError
from sead_dist.models.pretrained import load_model_config, load_tokenizer, locate, weight_files
from sead_dist.models.sequence_classifier import align_classes, label_names, outline
from sead_dist.models.student import check_start
from sead_dist.planning.rates import read_given
from sead_dist.reporting.report import read_predictions
from sead_dist.reporting.run_files import read_run
from sead_dist.runs.claim import has_progress, read_student_store, reject_other_keys
from sead_dist.runs.predicted_rows import predict_file
from sead_dist.runtime.run_log import is_finished, read_metrics, steps_done
from sead_dist.slurm.jobs import progress, registered
from sead_dist.slurm.settings import load_settings
from sead_dist.sweep.grid import make_grid
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.rates import remembered
from sead_dist.training.deepspeed_config import read_file
from sead_dist.training.identity import Identity

SEED = 20261129
# of the clock: a pipe is waited for without computing
LIMIT_S = 20.0
ODD = (
    *(None, True, False, 0, -1, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308),
    *(float("inf"), float("-inf"), float("nan"), "", "a", "0", "\0", "\ud800", "a\nb", "../../x"),
    *("x" * 5000, [], {}, [None], ["a", 1], {"a": 1}, {"": {}}, [[[[]]]], {"0": "a", "2": "b"}),
)
YAML_LINES = (
    *("a: 2020-13-45", "a: 0x_", "a: !!int foo", "a: " + "9" * 5000, "a: 1e999", "a: .nan"),
    *("a: " + "[" * 3000, "a: &x [*x]", "a: !!python/object:os.system x", "? [1, 2]\n: 3", "<<: 1"),
    *("a: !!float x", "a: !!timestamp x", "a: !!binary é", "a: !!set [1]", "a: !!omap 3"),
    *("a: 0b_", "a: 1:99:_", 'a: "\\0"', 'a: "\\ud800"', "a: *b", "\t- x", "%YAML 9.9", "--- \n---"),
    "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
    "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)),
)  # fmt: skip


class TooLongError(BaseException):
    """No reader may take this for a mistake in its file."""


@contextmanager
def within(seconds):
    def stop(_number, _frame):
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Fuzzer:
    """Counts what it tried; `failed` holds a line for each that went wrong."""

    def __init__(self):
        self.random = random.Random(SEED)
        self.tried, self.told, self.failed = 0, 0, []

    def give(self, what, read):
        self.tried += 1
        try:
            with within(LIMIT_S):
                read()
        except (UserError, RunError) as error:
            self.told += 1
            if not str(error).strip():
                self.failed.append(f"{what}: nothing is said")
        except TooLongError:
            self.failed.append(f"{what}: over {LIMIT_S} s")
        except BaseException as error:
            self.failed.append(f"{what}: {type(error).__name__}: {str(error)[:120]}")

    def bytes(self, sound):
        """The bytes of a sound file with some of them changed, taken out or put in."""
        data = bytearray(sound)
        for _ in range(self.random.choice((1, 1, 2, 8))):
            at = self.random.randrange(len(data) + 1)
            how = self.random.randrange(5)
            if how == 0:
                data[at : at + 1] = bytes([self.random.randrange(256)])
            elif how == 1:
                del data[at : at + self.random.choice((1, 4, len(data)))]
            elif how == 2:
                data[at:at] = self.random.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 9000))
            elif how == 3:
                other = self.random.randrange(len(data) + 1)
                data[at:at] = data[other : other + 30]
            else:
                data[at:at] = self.random.choice((b"\n", b'"', b"{", b"]", b": ", b"\t", b"1e999"))
        return bytes(data)

    def value(self, sound):
        """A sound value of JSON's types with something in it taken out or made odd."""
        if isinstance(sound, dict) and sound and self.random.random() < 0.85:
            key = self.random.choice(list(sound))
            if self.random.random() < 0.1:
                return {name: value for name, value in sound.items() if name != key}
            return {**sound, key: self.value(sound[key])}
        if isinstance(sound, list) and sound and self.random.random() < 0.7:
            at = self.random.randrange(len(sound))
            return [*sound[:at], self.value(sound[at]), *sound[at + 1 :]]
        return copy.deepcopy(self.random.choice(ODD))

    def file(self, path, read, times):
        """A sound file of JSON or YAML, changed as bytes or as a value, and read."""
        sound = path.read_bytes()
        value = yaml.safe_load(sound) if path.suffix in (".yaml", ".json") else None
        for number in range(times):
            if isinstance(value, dict | list) and number % 3:
                path.write_bytes(json.dumps(self.value(value)).encode())
            else:
                path.write_bytes(self.bytes(sound))
            self.give(f"{path.name} {number}: {path.read_bytes()[:200]!r}", read)
        path.write_bytes(sound)


@pytest.fixture(scope="module")
def fuzzer():
    return Fuzzer()


def use_model(folder):
    checkpoint = locate(str(folder))
    config = load_model_config(checkpoint, False)
    align_classes(TASK, str(folder), label_names(config), None)
    outline(config)
    load_tokenizer(checkpoint)
    weight_files(checkpoint)


def fuzz_models(fuzzer, words, folder):
    save_teacher(folder)
    config = load_config(words(folder.parent / "out", f"teachers=[{folder}]"))
    task = load_task(config.task)
    for name, times in (("config.json", 60), ("tokenizer_config.json", 30)):
        fuzzer.file(folder / name, lambda: read_teachers(config, task, ALONE), times)
    rows, out = folder.parent / "rows.tsv", folder.parent / "answers.tsv"
    rows.write_text("sentence\nthe plot was good\n")

    def answer():
        out.unlink(missing_ok=True)
        predict_file(str(folder), rows, config.task, out, None)

    for name in ("config.json", "tokenizer_config.json"):
        fuzzer.file(folder / name, answer, 20)
    index = folder / "model.safetensors.index.json"
    for path, times in (
        (folder / "config.json", 120),
        (folder / "tokenizer.json", 60),
        (folder / "tokenizer_config.json", 60),
    ):
        fuzzer.file(path, lambda: use_model(folder), times)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors", "c": "d"}}))
    (folder / "model.safetensors").rename(folder / "d")
    (folder / "b.safetensors").touch()
    fuzzer.file(index, lambda: weight_files(locate(str(folder))), 40)
    index.unlink()
    (folder / "d").rename(folder / "model.safetensors")
    start = StudentConfig(path=str(folder), shape=None, layers=None, tokenizer=None)
    for name, times in (("config.json", 40), ("model.safetensors", 40)):
        fuzzer.file(folder / name, lambda: check_start(start, False), times)


def fuzz_yaml(fuzzer, folder, sound):
    folder.mkdir()
    path = folder / "file.yaml"
    readers = {
        "config": lambda: load_config([str(path), "output_dir=x"]),
        "task": lambda: load_task(path),
        "rates": lambda: read_given(path),
        "slurm": lambda: load_settings(str(path), {}),
        "sweep": lambda: make_grid([str(path), "output_dir=x"]),
    }
    for name, read in readers.items():
        for line in YAML_LINES:
            path.write_text(line)
            fuzzer.give(f"{name}: {line[:60]!r}", read)
        path.write_text(yaml.safe_dump(sound[name]))
        fuzzer.file(path, read, 60)


def use_rows(path):
    build_examples(TASK, read_rows(path, TASK), "train")


def table(columns, metadata):
    return pa.table(columns).replace_schema_metadata({b"huggingface": metadata})


def fuzz_data(fuzzer, folder):
    folder.mkdir()
    rows = [("good", "positive"), ('"very" bad', "negative"), ("so, so", "positive")]
    (folder / "a.tsv").write_text("sentence\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    (folder / "a.csv").write_text('sentence,label\n"a, b",positive\nc,negative\n')
    lines = [json.dumps({"sentence": text, "label": label}) for text, label in rows]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "a.json").write_text(json.dumps([json.loads(line) for line in lines]))
    columns = {"sentence": [text for text, _ in rows], "label": [1, 0, 1]}
    names = {"info": {"features": {"label": {"names": ["negative", "positive"]}}}}
    sound = table(columns, json.dumps(names).encode())
    pq.write_table(sound, folder / "a.parquet")
    with pa.ipc.new_stream(folder / "a.arrow", sound.schema) as stream:
        stream.write_table(sound)
    (folder / "a.tsv.gz").write_bytes(gzip.compress((folder / "a.tsv").read_bytes()))
    for path in sorted(folder.iterdir()):
        fuzzer.file(path, lambda path=path: use_rows(path), 40)
    for number in range(40):
        about = json.dumps(fuzzer.value(names)).encode()
        pq.write_table(table(columns, about), folder / "a.parquet")
        fuzzer.give(f"Parquet metadata {number}: {about}", lambda: use_rows(folder / "a.parquet"))
    for odd in ODD:
        (folder / "a.jsonl").write_text(json.dumps({"sentence": odd, "label": "positive"}))
        fuzzer.give(f"text {str(odd)[:40]!r}", lambda: use_rows(folder / "a.jsonl"))
        (folder / "a.jsonl").write_text(json.dumps({"sentence": "a", "label": odd}))
        fuzzer.give(f"label {str(odd)[:40]!r}", lambda: use_rows(folder / "a.jsonl"))
    for name in ("pipe.jsonl", "pipe.parquet", "pipe.yaml"):
        os.mkfifo(folder / name)
        read = load_task if name.endswith("yaml") else use_rows
        fuzzer.give(name, lambda name=name, read=read: read(folder / name))


def fuzz_runs(fuzzer, finished, config, folder):
    run = folder / "run"
    shutil.copytree(finished, run)
    own = config.model_copy(update={"output_dir": str(run)})
    (run / ".pool").mkdir(exist_ok=True)
    (run / ".pool" / "student.json").write_text(json.dumps({"store": "a", "id": "b"}))
    state = next(run.glob("checkpoints/step-*/state.json"))
    jobs = folder / "jobs"
    jobs.mkdir()
    job = {"name": "a", "job": "1", "folder": str(folder), "runs": [str(run)], "submitted": "2026"}
    (jobs / "one.json").write_text(json.dumps(job))
    readers = (
        ("run.json", lambda: reject_other_keys(own)),
        ("run_summary.json", lambda: is_finished(run)),
        ("metrics.jsonl", lambda: (read_metrics(run), has_progress(run))),
        ("progress.json", lambda: steps_done(run)),
        ("scores.json", lambda: (read_run(run), progress(registered(jobs)[0]))),
        ("metrics.jsonl", lambda: progress(registered(jobs)[0])),
        ("eval_results.json", lambda: read_run(run)),
        ("config.yaml", lambda: read_run(run)),
        (".pool/student.json", lambda: read_student_store(run)),
        (state.relative_to(run), lambda: Identity.read(state)),
        ("../jobs/one.json", lambda: [progress(one) for one in registered(jobs)]),
    )
    for name, read in readers:
        fuzzer.file(run / name, read, 30)
    path = next(run.glob("predictions/*.parquet"))
    fuzzer.file(path, lambda: read_predictions(path), 30)
    rates = folder / "rates.json"
    rates.write_text(json.dumps({"format": 1, "rates": {"a": {"lengths_K": [1], "row_s_K": [1]}}}))
    fuzzer.file(rates, lambda: remembered(rates), 20)
    split = folder / "zero.json"
    split.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}))
    fuzzer.file(split, lambda: read_file(split), 20)


@pytest.mark.slow
def test_a_thousand_odd_files_give_no_traceback_and_no_hang(fuzzer, finished, words, tmp_path):
    began = time.process_time()
    given = words(tmp_path / "out")
    config = load_config(given)
    keys = config.model_dump(mode="json")
    task = yaml.safe_load(Path(config.task).read_text())
    sound = {
        "config": keys,
        "task": task,
        "rates": {"hardware": "a", "forward": {"fp32": 1e12}, "training": {"fp32": 1e12}},
        "slurm": {"partition": "a", "time": "1:00", "nodes": 2},
        "sweep": {
            "tasks": [config.task],
            "methods": ["mean", "labels"],
            "seeds": [0],
            "num_train_epochs": 2,
        },
    }
    fuzz_yaml(fuzzer, tmp_path / "yaml", sound)
    fuzz_data(fuzzer, tmp_path / "data")
    fuzz_models(fuzzer, words, tmp_path / "model")
    fuzz_runs(fuzzer, finished, config, tmp_path)
    spent = time.process_time() - began
    print(f"{fuzzer.tried} inputs, {fuzzer.told} refused, {spent:.0f} s")
    assert not fuzzer.failed, "\n".join([f"{len(fuzzer.failed)} failed", *fuzzer.failed[:60]])
    assert fuzzer.tried >= 1000
    assert fuzzer.told >= fuzzer.tried / 3
    assert spent < 150
