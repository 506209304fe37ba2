"""The systems that ours is compared with, on the same job: a bare loop, and TextBrewer.

Shapes: R rows, C classes, L tokens.
"""

import contextlib
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEACHER_ROWS = 64


@dataclass(frozen=True)
class Setting:
    """One job. data: the task's folder, for ours; train: the very rows that ours trains on."""

    data: Path
    train: Path
    teachers: list[Path]
    student: Path
    precision: str
    epochs: int
    seed: int
    folder: Path
    batch: int = 32
    max_length: int = 64
    learning_rate: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    temperature: float = 2.0
    alpha: float = 0.5


def rows_of(path: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of a TSV with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [row[0] for row in rows], [int(row[1]) for row in rows]


def load(folder: Path, precision: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=DTYPES[precision]
    )
    return model


def optimizer_and_schedule(
    model: PreTrainedModel, setting: Setting, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": setting.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=setting.learning_rate)
    warmup = round(setting.warmup * steps)
    return optimizer, get_linear_schedule_with_warmup(optimizer, warmup, steps)


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def pad(
    rows: list[list[int]], which_R: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """The rows, padded to the longest of them. One text a row: all token types are 0."""
    length = max(len(rows[row]) for row in which_R)
    ids_RL = np.full((len(which_R), length), tokenizer.pad_token_id, np.int64)
    mask_RL = np.zeros((len(which_R), length), np.int64)
    for at, row in enumerate(which_R):
        ids_RL[at, : len(rows[row])] = rows[row]
        mask_RL[at, : len(rows[row])] = 1
    return {"input_ids": torch.from_numpy(ids_RL), "attention_mask": torch.from_numpy(mask_RL)}


@torch.inference_mode()
def teacher_logits(
    setting: Setting, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """The teachers' mean logits_RC, each teacher and row forwarded once, batches by length."""
    by_length_R = np.argsort([-len(row) for row in rows], kind="stable")
    total_RC = torch.zeros(len(rows), 2)
    for folder in setting.teachers:
        model = load(folder, setting.precision).eval()
        for start in range(0, len(rows), TEACHER_ROWS):
            which_R = by_length_R[start : start + TEACHER_ROWS]
            logits = model(**pad(rows, which_R, tokenizer)).logits.float()
            total_RC[torch.from_numpy(which_R)] += logits
    return total_RC / len(setting.teachers)


def random_batches(rows: int, size: int, epoch_seed: int) -> Iterator[np.ndarray]:
    """Every row once, in batches that are random samples; the last may be smaller."""
    order = np.random.default_rng(epoch_seed).permutation(rows)
    for start in range(0, rows, size):
        yield order[start : start + size]


def run_bare(setting: Setting) -> dict[str, float]:
    """Each teacher prediction once, then training in random batches, each padded to its longest
    row."""
    began = time.perf_counter()
    texts, gold = rows_of(setting.train)
    tokenizer = AutoTokenizer.from_pretrained(setting.teachers[0])
    rows = tokenizer(texts, truncation=True, max_length=setting.max_length)["input_ids"]
    labels = torch.tensor(gold)
    logits_RC = teacher_logits(setting, rows, tokenizer)
    targets_RC = torch.softmax(logits_RC / setting.temperature, -1)
    torch.manual_seed(setting.seed)
    model = load(setting.student, "fp32").train()
    steps = setting.epochs * -(-len(rows) // setting.batch)
    optimizer, schedule = optimizer_and_schedule(model, setting, steps)
    for epoch in range(setting.epochs):
        seed = 1000 * setting.seed + epoch
        for which_R in random_batches(len(rows), setting.batch, seed):
            at = torch.from_numpy(which_R)
            with autocast(setting.precision):
                student_RC = model(**pad(rows, which_R, tokenizer)).logits.float()
            log_q_RC = F.log_softmax(student_RC / setting.temperature, -1)
            soft = F.kl_div(log_q_RC, targets_RC[at], reduction="batchmean")
            soft = soft * setting.temperature**2
            hard = F.cross_entropy(student_RC, labels[at])
            loss = setting.alpha * soft + (1 - setting.alpha) * hard
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(setting.folder / "model")
    return {"seconds": time.perf_counter() - began}


def run_textbrewer(setting: Setting, cache: bool) -> dict[str, float]:
    """TextBrewer as its documentation shows it, with batches padded to their longest row.

    Its kd loss is the cross-entropy to the soft targets without T^2: the same gradient as ours
    with kd_loss_weight = alpha T^2. It supports fp16 through Apex alone; for bf16 the student's
    forward runs under autocast, as Accelerate does it.
    """
    # imported here, so that the other systems run without it
    from textbrewer import DistillationConfig, MultiTeacherDistiller, TrainingConfig

    began = time.perf_counter()
    texts, labels = rows_of(setting.train)
    tokenizer = AutoTokenizer.from_pretrained(setting.teachers[0])
    rows = tokenizer(texts, truncation=True, max_length=setting.max_length)["input_ids"]

    def collate(which: list[int]) -> dict[str, torch.Tensor]:
        batch = pad(rows, np.array(which), tokenizer)
        return {**batch, "labels": torch.tensor([labels[row] for row in which])}

    torch.manual_seed(setting.seed)
    loader = DataLoader(
        range(len(rows)), setting.batch, shuffle=True, collate_fn=collate
    )  # fmt: skip
    teachers = [load(folder, setting.precision) for folder in setting.teachers]
    student = load(setting.student, "fp32")
    student.forward = _under_autocast(student.forward, setting.precision)
    steps = setting.epochs * len(loader)
    optimizer, _ = optimizer_and_schedule(student, setting, steps)
    distiller = MultiTeacherDistiller(
        TrainingConfig(
            output_dir=str(setting.folder), device="cpu", ckpt_epoch_frequency=setting.epochs
        ),
        DistillationConfig(
            temperature=setting.temperature,
            kd_loss_type="ce",
            kd_loss_weight=setting.alpha * setting.temperature**2,
            hard_label_weight=1 - setting.alpha,
            is_caching_logits=cache,
        ),
        teachers,
        student,
        adaptor_T=lambda _batch, outputs: {"logits": outputs.logits.float()},
        adaptor_S=lambda _batch, outputs: {
            "logits": outputs.logits.float(),
            "losses": outputs.loss,
        },
    )
    with distiller:
        distiller.train(
            optimizer,
            loader,
            num_epochs=setting.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={
                "num_warmup_steps": round(setting.warmup * steps),
                "num_training_steps": steps,
            },
            max_grad_norm=setting.max_grad_norm,
        )
    seconds = time.perf_counter() - began
    del student.forward
    student.save_pretrained(setting.folder / "model")
    return {"seconds": seconds}


def _under_autocast(forward: Callable[..., Any], precision: str) -> Callable[..., Any]:
    def run(*inputs: Any, **keywords: Any) -> Any:
        with autocast(precision):
            return forward(*inputs, **keywords)

    return run


@torch.inference_mode()
def score(folder: Path, words: Path, selection: Path, max_length: int) -> float:
    """Accuracy of saved weights on the selection split, in fp32. words: the tokeniser's folder."""
    texts, labels = rows_of(selection)
    tokenizer = AutoTokenizer.from_pretrained(words)
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    model = load(folder, "fp32").eval()
    right = 0
    for start in range(0, len(rows), TEACHER_ROWS):
        which_R = np.arange(start, min(start + TEACHER_ROWS, len(rows)))
        answers = model(**pad(rows, which_R, tokenizer)).logits.argmax(-1).tolist()
        right += sum(a == labels[row] for a, row in zip(answers, which_R, strict=True))
    return right / len(rows)
