"""What the tests share: a small task, tiny teachers, and runs of the real recipes on them."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from ranks import start
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from sead_dist.cli.grammar import LABELS, grammar_tokenizer, write_grammar_task
from sead_dist.config.load import load_config
from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import ExampleSet, build_examples
from sead_dist.data.order import Split, make_split
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.pretrained import tokenizer_hash
from sead_dist.runtime.distributed import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
TASK = TaskSpec(name="small", kind="classification", text_a="{sentence}", labels=LABELS)
# every architecture names its sizes in its own way
SHAPES = {
    "bert": {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "roberta": {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "albert": {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    "electra": {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "distilbert": {"hidden_dim": 64, "n_layers": 1, "n_heads": 2, "dim": 32},
    # these know no attention but their own
    "deberta-v2": {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "mpnet": {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    # whose attention is more than its linear maps say
    "roformer": {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "convbert": {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_layer": 1, "n_head": 2},
}


def shape(kind: str = "bert", **more) -> dict:
    sizes = dict(SHAPES[kind]) if kind == "distilbert" else {"hidden_size": 32, **SHAPES[kind]}
    if kind in ("electra", "albert", "roformer", "convbert"):
        sizes["embedding_size"] = 32
    return {"model_type": kind, **sizes, "max_position_embeddings": 80, **more}


def build_model(kind: str = "bert", seed: int = 0, labels=LABELS, **more):
    """A sequence classifier with random weights, large enough to tell rows apart."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    vocabulary = len(grammar_tokenizer())
    fields = {"vocab_size": vocabulary, "pad_token_id": 0, "num_labels": len(labels), **names}
    config = AutoConfig.for_model(**shape(kind, initializer_range=0.3, **fields, **more))
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def model_inputs(
    max_length: int = 32, tokenizer: PreTrainedTokenizerBase | None = None
) -> ModelInputs:
    """What a model with this tokeniser (the built-in task's) is fed."""
    tokenizer = tokenizer or grammar_tokenizer()
    return ModelInputs(tokenizer, tokenizer_hash(tokenizer), max_length, tokenizer.padding_side)


def save_teacher(folder: Path, kind: str = "bert", seed: int = 0, labels=LABELS, **more) -> Path:
    model = build_model(kind, seed, labels, **more)
    model.save_pretrained(folder)
    grammar_tokenizer().save_pretrained(folder)
    return folder


def save_random_bert(folder: Path, tokenizer_from, labels) -> Path:
    """A tiny BERT with random weights far from zero, so that examples get unequal answers, with
    these label names (one: a score) and the tokeniser of `tokenizer_from`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up clauses of one to six known words: many lengths, no two equal."""
    random = np.random.default_rng(seed)
    words = "the plot was not very good bad music and but slightly dull great cast".split()
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(random.choice(words, size=random.integers(3, 12)))] = None
    return list(found)


def example_set(texts, labels=None, split: str = "train") -> ExampleSet:
    labels = [LABELS[i % 2] for i in range(len(texts))] if labels is None else labels
    rows = [{"sentence": t, "label": name} for t, name in zip(texts, labels, strict=True)]
    return build_examples(TASK, rows, split)


def small_split(count: int = 21, seed: int = 0, split: str = "train") -> Split:
    return make_split(example_set(sentences(count, seed), split=split), grammar_tokenizer(), 32)


def logits_of(model, texts: list[str]) -> np.ndarray:
    """Each text alone: no padding, no neighbours."""
    tokenizer = grammar_tokenizer()
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).numpy()


def write_task(folder: Path, rows: int = 60, dev: int = 20, unlabelled: int = 20) -> Path:
    """The built-in task's files, few rows."""
    write_grammar_task(folder, 0, rows, dev, unlabelled)
    return folder


def relabel(folder: Path, teacher: Path, flip: float = 0.0) -> None:
    """Make the teacher right by giving every row the label that it would give, but a share."""
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    random = np.random.default_rng(0)
    for name in ("train", "validation"):
        path = folder / f"{name}.tsv"
        texts = [line.split("\t")[0] for line in path.read_text().splitlines()[1:]]
        if name == "train":
            margin = np.subtract(*logits_of(model, texts).T[::-1])
            with torch.no_grad():  # as many rows of one class as of the other
                final = model.classifier
                final.bias[0] += float(np.median(margin))
            model.save_pretrained(teacher)
        own = [model.config.id2label[i] for i in logits_of(model, texts).argmax(1)]
        swap = dict(zip(LABELS, LABELS[::-1], strict=True))
        said = [swap[label] if random.random() < flip else label for label in own]
        lines = [f"{text}\t{label}" for text, label in zip(texts, said, strict=True)]
        path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def student_shape(folder: Path, **more) -> Path:
    path = folder / "student.yaml"
    fields = shape("bert", hidden_size=16, intermediate_size=32, **more)
    path.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    return path


def words(data: Path, teachers, output: Path, store: Path | None = None, **changes) -> list[str]:
    """The command's words of a short run: 54 rows, 7 steps an epoch."""
    student = data / "student.yaml"
    if not student.exists():
        student_shape(data)
    keys = {
        "task": data / "task.yaml",
        "data.path": data,
        "teachers": f"[{','.join(map(str, teachers))}]",
        "student.shape": student,
        "student.tokenizer": data / "tokenizer",
        "store": store or output.parent / "store",
        "output_dir": output,
        "num_train_epochs": 1,
        "augment.copies": "null",
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "teacher_validation": "off",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in keys.items()]


def sweep_words(task: Path, output: Path, *more: str) -> list[str]:
    """A short sweep of three methods and two seeds; `task` is a folder called grammar."""
    shape = task / "student.yaml"
    if not shape.exists():
        student_shape(task)
    return [
        f"tasks=[{task / 'task.yaml'}]",
        "methods=[finetune,mean,single]",
        "seeds=2",
        f"data.path={task.parent}/{{task}}",
        f"encoders=[{shape},{shape}]",
        f"student={shape}",
        f"student.tokenizer={task / 'tokenizer'}",
        "max_steps=4",
        "augment.copies=null",
        "global_batch_size=8",
        "micro_batch_size=4",
        "learning_rate=1e-3",
        "teacher_validation=off",
        "save_steps=1",
        f"store={output / 'store'}",
        f"output_dir={output}",
        *more,
    ]


def config(*given, **changes) -> RunConfig:
    """A run's configuration for tests that build parts by hand."""
    keys = {
        "task": "sst2",
        "output_dir": "unused",
        "augment__copies": "null",
        "global_batch_size": 8,
        "micro_batch_size": 2,
        **changes,
    }
    return load_config([*given, *(f"{k.replace('__', '.')}={v}" for k, v in keys.items())])


def run_distill(world: World, given: list[str]) -> None:
    """The real recipe (for `ranks.run_ranks`)."""
    from sead_dist.runs.distillation import distill

    distill(load_config(given), world)


class Trap:
    """What opens a file for writing where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def command(*given) -> int | None:
    """The command of this line in this process; its exit code, None where it went well."""
    from sead_dist.cli import commands

    args = commands.parser().parse_args(list(map(str, given)))
    return commands.attempt(lambda: args.run(args))


def model_bytes(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def read(path: Path):
    return json.loads(path.read_text())


def records(run: Path, event: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def newest(root: Path) -> int:
    """The last step of which the run in ROOT/run has a checkpoint; 0: none."""
    folders = (root / "run" / "checkpoints").glob("step-*[0-9]")
    return max((int(folder.name.partition("-")[2]) for folder in folders), default=0)


def kill_at(step: int, root: Path, given: list[str]) -> None:
    """Start the run of these words in a process of its own, and kill it when this step is saved."""
    (rank,) = start(1, root / "ranks", run_distill, given)
    end = time.monotonic() + 120
    while newest(root) < step:
        assert rank.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.0005)
    kill(rank.pid)
    rank.join(30)
    assert rank.exitcode == -signal.SIGKILL


def grammar_task(folder: Path) -> TaskSpec:
    return load_task(folder / "task.yaml")


def three_teachers(root: Path) -> list[Path]:
    """One of another kind and order of classes, and one of more layers."""
    swapped = ("positive", "negative")
    return [
        save_teacher(root / "a", seed=0),
        save_teacher(root / "b", "roberta", seed=1, labels=swapped),
        save_teacher(root / "c", seed=2, num_hidden_layers=3),
    ]


def load_teachers(paths, world: World = ALONE, task: TaskSpec = TASK, **changes):
    """The teachers of these folders; a path may be an entry, `{path: DIR, weight: 2}`."""
    from sead_dist.teachers.entries import read_teachers

    given = config(f"teachers=[{','.join(map(str, paths))}]", max_length=32, **changes)
    return read_teachers(given, task, world)


def said_by(teacher, texts) -> np.ndarray:
    """logits_RC of a teacher's classes, two of them, alone on the CPU."""
    from sead_dist.teachers.inference import predict
    from sead_dist.teachers.whole import load_whole

    said_RC = np.zeros((len(texts), 2), np.float32)

    def done(places, logits_RC):
        said_RC[places] = logits_RC

    tokens, model = teacher.inputs.tokens(example_set(texts)), load_whole(teacher, CPU, False, {})
    predict(model, tokens, np.arange(len(texts)), CPU, teacher.cut, done)
    return said_RC


def make_source(teachers, store: Path, run: Path, world: World = ALONE, placements=None):
    from sead_dist.store.store import StoreFolder
    from sead_dist.teachers.placement import place, share_rows
    from sead_dist.teachers.source import StoredSource

    placements = placements or ["colocated"] * len(teachers)
    costs_N = [float(teacher.parameters) for teacher in teachers]
    share_NW = share_rows(teachers, placements, costs_N, world.size, 1 << 40)
    kept = StoreFolder(store)
    return StoredSource(
        teachers, place(teachers, placements, share_NW), world, kept, "small", run, False, False, lambda _what: None
    )  # fmt: skip


def answers_of(source, split: Split, parts) -> list[np.ndarray]:
    """logits_NRC of each of these lists of entries, asked for one after the other."""
    from sead_dist.teachers.base import Request

    requests = (Request(split, np.asarray(entries_R), None, "a test") for entries_R in parts)
    return [source.submit(request).result().logits_NBC.numpy() for request in requests]
