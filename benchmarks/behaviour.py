"""What the package does, kept and compared: the same commands give the same students.

    python benchmarks/behaviour.py keep before.json [CASE ...]     # in one checkout
    python benchmarks/behaviour.py keep after.json [CASE ...]      # in another, or after a change
    python benchmarks/behaviour.py compare before.json after.json
    python benchmarks/behaviour.py --smoke                # one case kept twice and compared

Each case is a few commands on tiny rows and models made on the spot. Of each the file holds the
hash of every model's weights, all scores, and the names of all files. A file that has another name
after a change stands in RENAMED. Hashes are of one machine and one version of the libraries.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inputs import random_classifier, shape_file, small_folder
from result_file import smoke_argument, table

# the name that a file of a run had -> its name today
RENAMED = {
    "examination.json": "teacher_validation.json",
    "transfer.tsv": "unlabeled.tsv",
}
# names that differ from run to run
PASSING = re.compile(r"(^|/)(\.[^/]+|events\.out[^/]*|[^/]*\.lock)(/|$)")
# keys of scores.json and the like whose values are times
CLOCK = re.compile(r"(^|_)(s|ms|seconds|second|time|runtime|date|bytes)$")
PYTHON = (sys.executable, "-m", "sead_dist")
RANKS = (*(sys.executable, "-m", "torch.distributed.run"), "--standalone", "--nproc_per_node")
STEPS = 12
# a student of the labels alone
ALONE = ("teachers=[]", "ensemble=none")


class Bench:
    """A folder with tasks, teachers and a student's shape, and what runs commands in it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(exist_ok=True)
        self.data = small_folder(work / "grammar", 120)
        lines = (self.data / "train.tsv").read_text("utf-8").splitlines()[1:]
        self.texts = [line.split("\t")[0] for line in lines]
        self.shape = shape_file(work / "shape.yaml", "L2-H32")
        self.teachers = [
            random_classifier(work / f"teacher-{seed}", "L1-H64", self.data / "tokenizer", seed)
            for seed in (0, 1)
        ]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name[:10] != "SEAD_DIST_"},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hub")},
            **{f"SEAD_DIST_{name}": str(work / name) for name in ("STORE", "RATES", "HASHES")},
        }

    def words(self, run: str, *more: str) -> list[str]:
        """KEY=VALUE overrides of a short run into the folder `run`; `more` comes last."""
        return [
            *("sst2", f"data.path={self.data}", f"output_dir={self.work / run}"),
            *(f"student.shape={self.shape}", f"student.tokenizer={self.data / 'tokenizer'}"),
            f"teachers=[{','.join(map(str, self.teachers))}]",
            f"store={self.work / f'store-{run}'}",
            *(f"max_steps={STEPS}", "global_batch_size=8", "micro_batch_size=4"),
            *("learning_rate=1e-3", "augment.copies=null", "teacher_validation=off"),
            *more,
        ]

    def start(self, *words: str, ranks: int = 1) -> "subprocess.Popen[str]":
        head = PYTHON if ranks == 1 else (*RANKS, str(ranks), "-m", "sead_dist")
        return subprocess.Popen(
            [*head, *words], env=self.environment, cwd=self.work, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *words: str, ranks: int = 1, code: int = 0) -> None:
        """Raises RuntimeError where the command ends otherwise than with this exit code."""
        process = self.start(*words, ranks=ranks)
        said, _ = process.communicate(timeout=600)
        if process.returncode != code:
            raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{said}")

    def distil(self, run: str, *more: str, ranks: int = 1) -> None:
        self.run("distill", *self.words(run, *more), ranks=ranks)

    def stopped(self, run: str, by: signal.Signals) -> None:
        """A run that gets a signal once it has saved a state, and whose command is given again."""
        words = self.words(run, "save_steps=20", "max_steps=200")
        process = self.start("distill", *words)
        while process.poll() is None and not list((self.work / run).glob("checkpoints/*")):
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, by)
        process.communicate(timeout=600)
        self.run("distill", *words)


Case = Callable[[Bench, str], None]


def own_task(
    bench: Bench, name: str, rows: Sequence[Mapping[str, object]], task: str
) -> tuple[str, str]:
    """The overrides for a task of one's own of these rows, whose YAML file says `task` of it."""
    folder = bench.work / f"{name}-data"
    folder.mkdir()
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    for file in ("train", "val"):
        (folder / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "task.yaml").write_text(f"name: {name}\n{task}\n", encoding="utf-8")
    return f"task={folder / 'task.yaml'}", f"data.path={folder}"


def regression(bench: Bench, name: str) -> None:
    rows = [{"text": text, "label": len(text) % 7 / 2} for text in bench.texts]
    words = own_task(bench, name, rows, 'text_a: "{text}"\nscore_range: [0, 3]')
    bench.distil(name, *words, *ALONE)


def choice(bench: Bench, name: str) -> None:
    folder = bench.work / f"{name}-data"
    folder.mkdir()
    pairs = zip(bench.texts[::2], bench.texts[1::2], strict=True)
    rows = [
        {"premise": f"it was {place}", "choice1": one, "choice2": two, "question": "cause",
         "label": int(len(one) < len(two)), "idx": place}
        for place, (one, two) in enumerate(pairs)
    ]  # fmt: skip
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    for file in ("train", "val"):
        (folder / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    bench.distil(name, "task=copa", f"data.path={folder}", *ALONE)


def routed(bench: Bench, name: str) -> None:
    """Every other row names the other teacher."""
    folder = bench.work / f"{name}-data"
    folder.mkdir()
    for file in ("train.tsv", "validation.tsv"):
        head, *lines = (bench.data / file).read_text("utf-8").splitlines()
        named = [f"{line}\tteacher-{place % 2}" for place, line in enumerate(lines)]
        (folder / file).write_text("\n".join([f"{head}\tasked", *named, ""]), encoding="utf-8")
    bench.distil(name, f"data.path={folder}", "method=routed", "teacher_column=asked")


def pool(bench: Bench, name: str) -> None:
    words = bench.words(name, "placement=pool")
    bench.run("teach", "--worker", "1/1", *words)
    bench.run("distill", *words)


def export(bench: Bench, name: str) -> None:
    bench.distil(name)
    bench.run("export", str(bench.work / name))


def sweep(bench: Bench, name: str) -> None:
    """Two tasks, two methods, two seeds."""
    tasks = [bench.work / f"{name}-data" / each for each in ("one", "two")]
    for task in tasks:
        small_folder(task, 60)
        said = 'kind: classification\ntext_a: "{sentence}"\nlabels: ["0", "1"]\n'
        (task / "task.yaml").write_text(f"name: {task.name}\n{said}", encoding="utf-8")
    own = ("sst2", "data.path", "teachers")
    words = [word for word in bench.words(name) if not word.startswith(own)]
    bench.run(
        "sweep", f"tasks=[{','.join(str(task / 'task.yaml') for task in tasks)}]",
        "methods=[finetune,mean]", "seeds=2", f"data.path={bench.work}/{name}-data/{{task}}",
        f"encoders=[{bench.shape},{bench.shape}]", *words,
    )  # fmt: skip


def with_keys(*more: str, ranks: int = 1) -> Case:
    """A case of one run with these overrides."""
    return lambda bench, name: bench.distil(name, *more, ranks=ranks)


def stopped_by(number: signal.Signals) -> Case:
    """A case of a run that gets a signal when it has saved a state, and is given again."""
    return lambda bench, name: bench.stopped(name, number)


CASES: dict[str, Case] = {
    "one_rank": with_keys(),
    "two_ranks": with_keys(ranks=2),
    "partitioned": with_keys("placement=partitioned", ranks=2),
    "sharded": with_keys("placement=sharded", ranks=2),
    "pool": pool,
    "bf16": with_keys("precision=bf16", "teacher_precision=bf16"),
    "random": with_keys("method=random"),
    "confidence": with_keys("method=confidence"),
    "tinybert": with_keys("method=tinybert"),
    "routed": routed,
    "regression": regression,
    "choice": choice,
    "zero2": with_keys("deepspeed=zero2", ranks=2),
    "killed": stopped_by(signal.SIGKILL),
    # what SLURM sends before it requeues a job; tests/cluster requeue a real one
    "noticed": stopped_by(signal.SIGUSR2),
    "export": export,
    "sweep": sweep,
}


def found_in(folder: Path) -> dict[str, Any]:
    """Hashes of weights, scores and names of files below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in paths}
    names = {name: path for name, path in names.items() if not PASSING.search(name)}
    return {
        "weights": {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in names.items()
            if path.name == "model.safetensors"
        },
        "scores": {
            name: scores(json.loads(path.read_text("utf-8")))
            for name, path in names.items()
            if path.name in ("scores.json", "eval_results.json")
        },
        "files": list(names),
    }


def scores(value: Any) -> Any:
    """The value without times."""
    if isinstance(value, dict):
        return {key: scores(inner) for key, inner in value.items() if not CLOCK.search(key)}
    return [scores(inner) for inner in value] if isinstance(value, list) else value


def keep(names: Sequence[str], work: Path) -> dict[str, Any]:
    """What each of these cases leaves behind."""
    bench, kept = Bench(work), {}
    for name in names:
        CASES[name](bench, name)
        kept[name] = found_in(work / name)
        print(f"{name}: {len(kept[name]['files'])} files", file=sys.stderr, flush=True)
    return kept


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], renamed: Mapping[str, str]
) -> Iterator[list[object]]:
    """[case, file, what] of each difference, in cases that both have."""
    for case in [case for case in before if case in after]:
        old, new = before[case], after[case]
        for what in ("weights", "scores"):
            was = {today(name, renamed): value for name, value in old[what].items()}
            for name in sorted(was.keys() | new[what].keys()):
                if was.get(name) != new[what].get(name):
                    yield [case, name, f"other {what}"]
        names = {today(name, renamed) for name in old["files"]}
        yield from ([case, name, "is gone"] for name in sorted(names - {*new["files"]}))
        yield from ([case, name, "is new"] for name in sorted({*new["files"]} - names))


def today(name: str, renamed: Mapping[str, str]) -> str:
    """A file's name after the changes: of a whole path, or of its last part."""
    folder, _, last = name.rpartition("/")
    return renamed.get(name) or "/".join(filter(None, [folder, renamed.get(last, last)]))


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[object]]:
    """Print what differs; the differences."""
    found = list(differences(before, after, RENAMED))
    cases = len(before.keys() & after.keys())
    print(table(["case", "file", "what"], found or [[f"all {cases}", "all", "the same"]]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    smoke_argument(parser)
    parser.add_argument("verb", nargs="?", choices=["keep", "compare"])
    parser.add_argument("words", nargs="*", metavar="FILE|CASE", help=f"cases: {', '.join(CASES)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if args.smoke:
            kept = [keep(["regression"], work / name) for name in ("one", "two")]
            sys.exit(1 if compare(*kept) else 0)
        if args.verb == "keep" and args.words:
            file, *names = args.words
            text = json.dumps(keep(names or list(CASES), work), indent=1)
            Path(file).write_text(text + "\n", encoding="utf-8")
        elif args.verb == "compare" and len(args.words) == 2:
            before, after = (json.loads(Path(file).read_text("utf-8")) for file in args.words)
            sys.exit(1 if compare(before, after) else 0)
        else:
            parser.error("give --smoke, keep FILE [CASE ...], or compare FILE FILE")


if __name__ == "__main__":
    main()
