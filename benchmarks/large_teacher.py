"""A large bf16 teacher beside a small student: peak memory and step time, with and without offload.

The teacher is a BERT of 1.2 billion parameters with new weights (`--layers 40 --hidden 2560` makes
3.2 billion). A step is the teacher's logits of one batch and the student's forward, backward and
update. On one GPU the teacher is whole or offloaded; `torchrun --nproc_per_node N` adds the teacher
sharded over N. There is no target.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from inputs import LABELS, run_config
from result_file import common_arguments, table, write_result
from transformers import BertConfig

from sead_dist.cli.grammar import grammar_tokenizer, write_grammar_task
from sead_dist.data.examples import build_examples
from sead_dist.data.loading import split_chunks
from sead_dist.data.order import Split, make_split
from sead_dist.data.tasks import load_task
from sead_dist.models.sequence_classifier import new_classifier
from sead_dist.runtime.distributed import World, barrier, gather_objects, join_world, leave_world
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.inference import Cut, predict
from sead_dist.teachers.sharding import build_sharded, predict_together
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.whole import load_whole

GIB = 2**30


def bert(layers: int, hidden: int) -> BertConfig:
    return BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden, id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )  # fmt: skip


def save_teacher(folder: Path, layers: int, hidden: int) -> None:
    torch.manual_seed(0)
    new_classifier(bert(layers, hidden), dtype="bf16").save_pretrained(folder)
    grammar_tokenizer().save_pretrained(folder)


def long_rows(folder: Path, rows: int) -> Split:
    """Rows of the built-in task, eight joined to one: about 80 tokens each."""
    write_grammar_task(folder, 0, rows, 10, 10)
    task = load_task("sst2")
    chunks = split_chunks(task, "train", folder, None, None, False, None)
    texts = [row["sentence"] for rows in chunks for row in rows]
    joined = [
        {"sentence": " ".join(texts[n : n + 8]), "label": "positive"}
        for n in range(0, len(texts) - 7)
    ]
    return make_split(build_examples(task, joined, "train"), grammar_tokenizer(), 128)


def measure(
    teacher: Teacher, variant: str, split: Split, world: World, steps: int
) -> dict[str, float]:
    """Median seconds of a step, and the most bytes that this rank's GPU held."""
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    if variant == "whole":
        model = load_whole(teacher, world.device, False, {})
    else:
        model = build_sharded(teacher, world, False)
    student = new_classifier(bert(2, 128)).to(world.device)
    optimizer = torch.optim.AdamW(student.parameters())
    size = min(64, len(split))
    limits: tuple[Cut, Callable[[np.ndarray, np.ndarray], None]]
    limits = (teacher.cut, lambda _part, _logits: None)
    seconds = []
    for step in range(steps + 1):
        rows_B = (np.arange(size) + step * size) % len(split)
        began = time.perf_counter()
        if variant == "whole":
            predict(model, split.tokens, rows_B, world.device, *limits)
        else:
            predict_together(model, split.tokens, rows_B, world, *limits)
        inputs = split.tokens.pad(rows_B, int(split.tokens.lengths_B()[rows_B].max()))
        loss = student(**{k: v.to(world.device) for k, v in inputs.items()}).logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(world.device) if cuda else 0
    # the first step warms up
    return {"step_s": statistics.median(seconds[1:]), "peak_bytes": float(peak)}


def main() -> None:
    parser = common_arguments(__doc__, rows=2000, repeat=20)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.layers, args.hidden = 100, 2, 2, 64
    world = join_world()
    with tempfile.TemporaryDirectory() as temporary:
        work = gather_objects(world, args.work or Path(temporary))[0]
        folder = work / "teacher"
        if world.is_main and not (folder / "config.json").is_file():
            save_teacher(folder, args.layers, args.hidden)
        barrier(world)
        # every rank makes the same rows
        split = long_rows(work / f"data-{world.rank}", args.rows)
        variants = ["whole", "sharded", "offload"] if world.size > 1 else ["whole", "offload"]
        raw = {}
        for variant in variants:
            entry = f"{{path: {folder}, dtype: bf16, offload: {str(variant == 'offload').lower()}}}"
            words = {"teachers": [entry], "output_dir": work / "run", "max_length": 128}
            (teacher,) = read_teachers(run_config(words), load_task("sst2"), world)
            raw[variant] = measure(teacher, variant, split, world, args.repeat)
        barrier(world)
    if world.is_main:
        device = torch.cuda.get_device_name(world.device) if torch.cuda.is_available() else "CPU"
        rows = [[n, 1000 * one["step_s"], one["peak_bytes"] / GIB] for n, one in raw.items()]
        text = (
            f"{teacher.parameters / 1e6:,.0f} M parameters without embeddings, bf16, "
            f"{world.size} x {device}, batches of 64 rows of about 80 tokens.\n\n"
            + table(["teacher", "step, ms", "peak memory of rank 0, GiB (0: no GPU)"], rows)
        )
        write_result("large_teacher", "A large teacher beside a small student", text, raw, args)
    leave_world(world)


if __name__ == "__main__":
    main()
