"""What several tests share: a small built-in task, quick teachers, and ways to run the product.

Everything lies in pytest's temporary folders; the hub is never asked, the user's store never used.
"""

import fcntl
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from forked import run_command

# before huggingface_hub is imported, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"
# before torch is: tests compare runs of this process, bit for bit, with runs of one thread
os.environ.setdefault("OMP_NUM_THREADS", "1")

Distil = Callable[..., Path]
RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
# The files that take longest come first, so that workers which share the files end together.
LONGEST = (
    *("test_benchmarks", "test_sweep", "test_sweep_rounds", "test_pool", "test_bad_input"),
    *("test_launchers", "test_file_teachers", "test_deepspeed", "test_resume", "test_methods"),
    *("test_stopping", "test_plugins", "test_feature_loss_runs", "test_invariants"),
    *("test_without_gold", "test_text_and_copies", "test_reproduce", "test_lost_ranks"),
    *("test_plan", "test_starts", "test_training", "test_export", "test_sharded", "test_python"),
)
LAUNCHER = "torch.distributed.run --standalone --nproc_per_node"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_configure() -> None:
    """The collector rests while modules are imported: it would take a third of that time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What is imported stays: without this the collector spends a quarter of the tests on it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The default store of this session's runs; their measured rates and remembered hashes
    lie beside it."""
    from self_checks import KEPT_IN

    folder = tmp_path_factory.mktemp("store") / "default"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEAD_DIST_STORE", str(folder))
        patch.setenv("SEAD_DIST_RATES", str(folder.with_name("rates.json")))
        patch.setenv("SEAD_DIST_HASHES", str(folder.with_name("hashes")))
        patch.setenv("SEAD_DIST_REPAIRED", str(folder.with_name("repaired")))
        patch.setenv(KEPT_IN, str(folder.with_name("tried")))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def spared() -> Iterator[None]:
    """What the runs of this process need not do again; `warm.py` does it for forked ones."""
    import self_checks
    from pictures import keep_blanks

    with pytest.MonkeyPatch.context() as patch:
        keep_blanks(patch)
        self_checks.make_once(patch)
        yield


@pytest.fixture
def whole_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn as a person's run draws them."""
    from pictures import draw_pictures

    draw_pictures(monkeypatch)


@pytest.fixture
def all_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run tries all that a person's run tries before its first step."""
    from self_checks import KEPT_IN

    monkeypatch.delenv(KEPT_IN)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, made by the first of this run's workers that asks for it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' own folders lie in it
    folder, done = root / f"made-{name}", root / f"made-{name}.done"
    with (root / f"made-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in task, small: 400 training rows, 100 dev rows, 200 unlabelled rows; and in the
    same folder `shape.yaml`, a student's shape."""
    import yaml

    from sead_dist.cli.grammar import write_grammar_task

    def make(folder: Path) -> None:
        write_grammar_task(folder, 0, 400, 100, 200, label_noise=0.0)
        (folder / "shape.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")

    return made_once(tmp_path_factory, "grammar", make)


def small_task(
    tmp_path_factory: pytest.TempPathFactory, name: str, *kind: str, **changes: int
) -> tuple[Path, list[Path]]:
    """(the built-in task of 60 rows with a student's shape, in a folder called grammar; two
    teachers, untrained: a BERT of one layer, and one of this kind or with these changes). To be
    read: a test that changes them makes its own."""
    from small import save_teacher, student_shape, write_task

    def make(folder: Path) -> None:
        student_shape(write_task(folder / "grammar"))
        save_teacher(folder / "a")
        save_teacher(folder / "b", *kind, seed=1, **changes)

    root = made_once(tmp_path_factory, name, make)
    return root / "grammar", [root / "a", root / "b"]


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """`small_task` with teachers of one and of two layers."""
    return small_task(tmp_path_factory, "tiny", num_hidden_layers=2)


@pytest.fixture(scope="session")
def two_kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """`small_task` with a BERT and a RoBERTa as teachers."""
    return small_task(tmp_path_factory, "two-kinds", "roberta")


@pytest.fixture(scope="session")
def two_alike(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """`small_task` with two BERTs of one shape as teachers."""
    return small_task(tmp_path_factory, "two-alike")


@pytest.fixture(scope="session")
def tiny_data(tiny_task: tuple[Path, list[Path]]) -> Path:
    """The folder of `tiny_task`'s files."""
    return tiny_task[0]


@pytest.fixture(scope="session")
def one_teacher(tiny_task: tuple[Path, list[Path]]) -> tuple[Path, list[Path]]:
    """`tiny_task` with the first of its teachers."""
    return tiny_task[0], tiny_task[1][:1]


def train_teacher(task: Path, folder: Path, seed: int, labels: Sequence[str], steps: int) -> None:
    """A tiny BERT taught the training rows of `task`, with these label names, in its class order."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    rows = [line.split("\t") for line in (task / "train.tsv").read_text("utf-8").splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(task / "tokenizer")
    inputs = tokenizer([row[0] for row in rows], padding=True, return_tensors="pt")
    order = list(labels) if "positive" in labels else ["negative", "positive"]
    targets_B = torch.tensor([order.index(row[1]) for row in rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            **TINY,
            vocab_size=len(tokenizer),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        model = BertForSequenceClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            rows_R = torch.randint(len(rows), (64,))
            batch = {name: tensor[rows_R] for name, tensor in inputs.items()}
            loss = torch.nn.functional.cross_entropy(model(**batch).logits, targets_B[rows_R])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def teachers(grammar: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two teachers of the built-in task that pass their validation; the second one names its
    classes in the other order."""

    def make(root: Path) -> None:
        train_teacher(grammar, root / "a", 0, ["negative", "positive"], 60)
        train_teacher(grammar, root / "b", 1, ["positive", "negative"], 60)

    root = made_once(tmp_path_factory, "teachers", make)
    return [root / "a", root / "b"]


@pytest.fixture(scope="session")
def words(grammar: Path, teachers: list[Path]) -> Callable[..., list[str]]:
    """`words(output_dir, "key=value", ...)`: a small distillation, later words winning."""

    def make(output_dir: Path, *more: str) -> list[str]:
        return [
            f"task={grammar / 'task.yaml'}",
            f"data.path={grammar}",
            f"teachers=[{teachers[0]},{teachers[1]}]",
            f"student.shape={grammar / 'shape.yaml'}",
            f"output_dir={output_dir}",
            "num_train_epochs=1",
            "learning_rate=5e-3",
            "augment.copies=null",
            *more,
        ]

    return make


@pytest.fixture
def shown() -> Iterator[None]:
    """What the package tells is printed, as by a command."""
    from sead_dist.cli.exits import lines_shown

    with lines_shown():
        yield


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The lines that the package tells during the test. They go nowhere else."""
    from sead_dist.runtime.run_log import noted

    with noted() as lines:
        yield lines


@pytest.fixture(scope="session")
def distil() -> Distil:
    """Run `distill` in this process, alone on the CPU, as the command does; the run directory.
    Raises what it raises. command: the words that the run records."""

    def run(words: Sequence[str], command: tuple[str, ...] = ()) -> Path:
        import torch

        from sead_dist.cli.exits import lines_shown
        from sead_dist.config.load import load_config
        from sead_dist.runs.distillation import distill
        from sead_dist.runtime.distributed import World

        with lines_shown():
            world = World(0, 1, torch.device("cpu"), command=command or ("distill", *words))
            return distill(load_config(words), world)

    return run


@pytest.fixture(scope="session")
def finished(
    words: Callable[..., list[str]], distil: Distil, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run directory, made once; tests only read it."""
    more = ("num_train_epochs=6", "keep_training_state=true")
    return distil(words(tmp_path_factory.mktemp("runs") / "finished", *more))


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> RunCli:
    """`cli("evaluate", OUT, ..., ranks=2, cwd=DIR)`: the command in a forked process, or on several
    ranks. launched: in a process of its own, or several ones under torchrun."""
    folder = tmp_path_factory.mktemp("said")

    def run(
        *args: object,
        ranks: int = 1,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        launched: bool = False,
        stdin: Path | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        words = [str(arg) for arg in args]
        whole = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(env or {})}
        if not launched:
            return run_command(words, ranks, cwd or Path.cwd(), whole, folder, stdin)
        start = [sys.executable, "-m"]
        if ranks > 1:
            start += [*LAUNCHER.split(), str(ranks), "-m"]
        return subprocess.run(
            [*start, "sead_dist", *words],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=whole,
            timeout=300,
            check=False,
        )

    return run
