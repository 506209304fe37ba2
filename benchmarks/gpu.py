"""The teachers' pass on a GPU against its matrix products, and what other ways to it would gain.

A pass is the package's `predict` over rows of SST-2 as they are (short) and joined (long), in bf16
with random weights. The ceiling is the rate of one large bf16 product on random data; operations
are those of the rows' own tokens, so padding and spare rows count against us. Beside it, over the
same rows: the same batches made beforehand and queued at once (queued), the same through CUDA
graphs of each shape (graphs), and packed into rows of tokens without padding, with attention over
unequal lengths (packed). At three lengths: each teacher compiled, and four teachers stacked. Last,
a student's epoch over an empty store with the teachers' forwards in a stream of their own, and in
the student's.
"""

import copy
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from inputs import LABELS, alone, laid_out, random_classifier, run_config, shape_file, texts_of
from outcome_file import (
    common_arguments,
    device_argument,
    set_threads,
    spread,
    table,
    write_result,
)
from torch.func import functional_call, stack_module_state
from transformers import AttentionInterface, AutoTokenizer, PreTrainedModel

from sead_dist.checkpoint import TrainState
from sead_dist.data import Split, make_split
from sead_dist.distributed import StopFlag
from sead_dist.evaluate import EvalResult
from sead_dist.examples import build_examples
from sead_dist.models import load_classifier
from sead_dist.parts import build
from sead_dist.pretrained import locate
from sead_dist.rates import operations
from sead_dist.recipes import make_trainer, prepare_teachers
from sead_dist.tasks import load_task
from sead_dist.teachers.forward import (
    SHAPES,
    batch_inputs,
    cut_into_batches,
    free_rows_from,
    padded_length,
    predict,
    rows_per_batch,
)

TEACHERS = ("L2-H128", "L6-H384", "L12-H768", "L24-H1024")
LONGEST = 128
LENGTHS = (16, 128)
# compiling takes many seconds for each shape and length
COMPILED = ("L12-H768",)
PACK_TOKENS = 65536
STACKED = 4
MORE_ROWS = (*SHAPES["cuda"].counts, 512, 640, 768, 1024, 1280, 1536)


@dataclass
class Pass:
    """A teacher, the rows to forward, and what the package's self-check allows."""

    model: PreTrainedModel
    split: Split
    free_from: int | None
    device: torch.device

    @property
    def rows_R(self) -> np.ndarray:
        return np.arange(len(self.split))

    def batches(self) -> list[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        lengths_R = self.split.tokens.lengths_B()
        parts = cut_into_batches(lengths_R, self.device.type, LONGEST)
        return [
            (part, batch_inputs(self.split.tokens, part, length, self.device, self.free_from))
            for part, length in parts
        ]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Answer = Callable[[], torch.Tensor]


def ours(of: Pass) -> Answer:
    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2)

        def keep(part: np.ndarray, logits: np.ndarray) -> None:
            logits_RC[torch.from_numpy(part)] = torch.from_numpy(logits)

        predict(of.model, of.split.tokens, of.rows_R, of.device, LONGEST, of.free_from, keep)
        return logits_RC

    return do


def with_shapes(**changes: object) -> Callable[[Pass], Answer]:
    """The same with other batches."""

    def way(of: Pass) -> Answer:
        kind = of.device.type
        own, other = SHAPES[kind], replace(SHAPES[kind], **changes)
        SHAPES[kind] = other
        free_from = free_rows_from(of.model.config, "bf16", of.device)
        SHAPES[kind] = own
        answer = ours(replace(of, free_from=free_from))

        def do() -> torch.Tensor:
            SHAPES[kind] = other
            try:
                return answer()
            finally:
                SHAPES[kind] = own

        return do

    return way


def one_at_a_time(of: Pass) -> Answer:
    """Each batch is waited for before the next is made."""

    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2)
        lengths_R, tokens = of.split.tokens.lengths_B(), of.split.tokens
        for part, length in cut_into_batches(lengths_R, of.device.type, LONGEST):
            inputs = batch_inputs(tokens, part, length, of.device, of.free_from)
            logits_RC[torch.from_numpy(part)] = of.model(**inputs).logits[: len(part)].float().cpu()
        return logits_RC

    return do


def queued(of: Pass) -> Answer:
    batches = of.batches()

    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2, device=of.device)
        for part, inputs in batches:
            logits_RC[torch.from_numpy(part)] = of.model(**inputs).logits[: len(part)].float()
        return logits_RC.cpu()

    return do


def graphs(of: Pass) -> Answer:
    """A graph of each shape; capturing is not counted."""
    batches = of.batches()
    known: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, dict, torch.Tensor]] = {}
    pool = torch.cuda.graph_pool_handle()
    for _, inputs in batches:
        shape = tuple(inputs["input_ids"].shape)
        if shape not in known:
            static = {name: tensor.clone() for name, tensor in inputs.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                of.model(**static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = of.model(**static).logits
            known[shape] = graph, static, logits

    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2, device=of.device)
        for part, inputs in batches:
            graph, static, logits = known[tuple(inputs["input_ids"].shape)]
            for name, tensor in inputs.items():
                static[name].copy_(tensor)
            graph.replay()
            logits_RC[torch.from_numpy(part)] = logits[: len(part)].float()
        return logits_RC.cpu()

    return do


def attention_of_packs(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    most: int = 0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention within rows that lie one after the other in [1, heads, T, head]."""
    from torch.nn.attention.varlen import varlen_attn

    parts = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    return varlen_attn(*parts, offsets, offsets, most, most)[None], None


def packed(of: Pass) -> Answer:
    """Rows one after the other, without padding; the longest first."""
    AttentionInterface.register("packs", attention_of_packs)
    model = copy.deepcopy(of.model)
    model.set_attn_implementation("packs")
    tokens, lengths_R = of.split.tokens, of.split.tokens.lengths_B()
    order_R = np.argsort(-lengths_R, kind="stable")
    ends_R = np.cumsum(lengths_R[order_R])
    packs = []
    for number in range(int(ends_R[-1] // PACK_TOKENS) + 1):
        part = order_R[(ends_R - 1) // PACK_TOKENS == number]
        if len(part) == 0:
            continue
        padded = tokens.pad(part, int(lengths_R[part].max()))
        kept = padded["attention_mask"].bool()
        offsets = np.concatenate([[0], np.cumsum(lengths_R[part])]).astype(np.int32)
        places = torch.arange(kept.shape[1]).expand_as(kept)[kept][None]
        packs.append(
            (
                torch.from_numpy(part),
                padded["input_ids"][kept][None].to(of.device),
                places.to(of.device),
                torch.from_numpy(offsets).to(of.device),
                int(lengths_R[part].max()),
            )
        )

    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2, device=of.device)
        for part, ids, places, offsets, most in packs:
            hidden = model.bert(
                input_ids=ids, position_ids=places, offsets=offsets, most=most
            ).last_hidden_state[0, offsets[:-1].long()]
            pooled = model.bert.pooler(hidden[:, None])
            logits_RC[part] = model.classifier(pooled).float()
        return logits_RC.cpu()

    return do


WAYS: dict[str, Callable[[Pass], Answer]] = {
    "ours": ours,
    "full row counts": lambda of: ours(replace(of, free_from=None)),
    "steps of 2 tokens": with_shapes(step=2),
    "up to 2048 rows": with_shapes(most=2048, counts=MORE_ROWS),
    "one batch at a time": one_at_a_time,
    "queued": queued,
    "graphs": graphs,
    "packed": packed,
}


def seconds(do: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    do()
    wait()
    return time.perf_counter() - began


def product_rate(size: int, repeat: int, device: torch.device) -> float:
    """Operations per second of size x size bf16 products on random data."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = [seconds(lambda: left @ right) for _ in range(repeat + 3)][3:]
    return 2 * size**3 / statistics.median(times)


@torch.inference_mode()
def all_ways(of: Pass, repeat: int) -> list[dict[str, object]]:
    """Interleaved turns of every way that goes here."""
    reference = ours(of)()
    found: dict[str, dict[str, object]] = {}
    doing: dict[str, Answer] = {}
    for name, way in WAYS.items():
        try:
            began = time.perf_counter()
            do = way(of)
            difference = float((do() - reference).abs().max())
            made_s = time.perf_counter() - began
            found[name] = {"way": name, "made_s": made_s, "difference": difference, "s": []}
            doing[name] = do
        except Exception as error:  # whatever it is, this way does not go here
            found[name] = {"way": name, "failed": str(error).splitlines()[0][:200]}
    for _ in range(repeat):
        for name, do in doing.items():
            found[name]["s"].append(seconds(do))  # type: ignore[attr-defined]
    return list(found.values())


def in_turn(models: list[PreTrainedModel], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [model(**inputs).logits for model in models]


@torch.inference_mode()
def at_lengths(of: Pass, repeat: int) -> list[dict[str, object]]:
    """One teacher compiled, and several stacked, at a few lengths."""
    torch._dynamo.config.recompile_limit = 1000
    found = []
    several = [copy.deepcopy(of.model) for _ in range(STACKED)]
    with torch.inference_mode(False), torch.no_grad():
        weights, buffers = stack_module_state(several)
    outline = copy.deepcopy(of.model).to("meta")

    def one(weights: dict, buffers: dict, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(outline, (weights, buffers), (), inputs).logits

    stacked = torch.vmap(one, in_dims=(0, 0, None))
    compiled = torch.compile(of.model, dynamic=False)
    for length in LENGTHS:
        rows = rows_per_batch(length, of.device.type)
        ids = torch.randint(3, of.model.config.vocab_size, (rows, length), device=of.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][-1, 1:] = 0
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "compiled": (partial(of.model, **inputs), partial(compiled, **inputs)),
            f"{STACKED} stacked": (
                partial(in_turn, several, inputs),
                partial(stacked, weights, buffers, inputs),
            ),
        }
        for name, (plain, other) in pairs.items():
            try:
                made_s = seconds(other)
                ratios = [seconds(plain) / seconds(other) for _ in range(repeat + 2)][2:]
                found.append({"way": name, "length": length, "made_s": made_s, "gain": ratios})
            except Exception as error:
                failed = str(error).splitlines()[0][:200]
                found.append({"way": name, "length": length, "failed": failed})
    return found


def load(folder: Path, device: torch.device) -> PreTrainedModel:
    model = load_classifier(locate(str(folder)), "bf16").to(device)
    return model.eval().requires_grad_(False)


def split_of(texts: list[str], words: Path) -> Split:
    task = load_task("sst2")
    rows = [{"sentence": text, "label": LABELS[1]} for text in texts]
    examples = build_examples(task, rows, "train")
    return make_split(examples, AutoTokenizer.from_pretrained(words), LONGEST)


def epoch_seconds(words: dict[str, object], device: str, streams: int) -> float:
    """One epoch of the training loop, teachers computing."""
    with ExitStack() as stack:
        parts = build(run_config(words), alone(device), stack, StopFlag())
        assert parts.source is not None
        if streams == 1:
            parts.source.stream = None
        ended: list[float] = []

        def end_of_epoch(step: int) -> EvalResult:
            wait()
            ended.append(time.perf_counter())
            nothing = np.zeros((0, 2), np.float32)
            return EvalResult("sst2", "selection", step, 0, {"accuracy": 0.0}, 0.0, 1.0, nothing)

        trainer = replace(make_trainer(parts, prepare_teachers(parts)), select=end_of_epoch)
        wait()
        began = time.perf_counter()
        trainer.run(TrainState())
        return ended[0] - began


def two_streams(
    work: Path, data: Path, tokenizer: Path, args: Namespace, student: str, teacher: str
) -> list[dict[str, float]]:
    found, batch = [], 8 if args.smoke else 64
    for turn in range(args.repeat + 1):
        taken = {}
        for streams in (1, 2) if turn % 2 else (2, 1):
            folder = Path(tempfile.mkdtemp(dir=work))
            words: dict[str, object] = {
                "data.path": data,
                "student.shape": shape_file(work / f"{student}.yaml", student),
                "student.tokenizer": tokenizer,
                "teachers": [random_classifier(work / teacher, teacher, tokenizer, 1)],
                "teacher_precision": "bf16",
                "precision": "bf16",
                "epochs": 1,
                "micro_batch": batch,
                "global_batch": batch,
                "gate": "off",
                "checkpoint.every_steps": 0,
                "store": folder / "store",
                "output_dir": folder / "run",
            }
            taken[str(streams)] = epoch_seconds(words, args.device, streams)
        if turn > 0:  # the first wakes up kernels and memory
            found.append(taken)
    return found


def main() -> None:
    parser = common_arguments(__doc__, rows=4096, repeat=5)
    device_argument(parser)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch.cuda sees no GPU on this machine")
    size = 8192
    if args.smoke:
        args.rows, args.repeat, args.teachers, size = 60, 1, ["L2-H128"], 256
    set_threads(args.threads, args.device)
    device = alone(args.device).device
    raw: dict[str, object] = {}
    with laid_out(args.work, args.rows) as (work, data, tokenizer):
        ceiling = product_rate(size, 20, device)
        texts = texts_of(data / "train.tsv")
        joined = [" ".join(texts[n : n + 6]) for n in range(len(texts) - 5)]
        rows, others = [], []
        for shape in args.teachers:
            model = load(random_classifier(work / shape, shape, tokenizer, 1), device)
            free_from = free_rows_from(model.config, "bf16", device)
            for kind, split in (
                ("short", split_of(texts, tokenizer)),
                ("long", split_of(joined, tokenizer)),
            ):
                lengths_R = split.tokens.lengths_B()
                work_done = sum(
                    int(count) * operations(model.config, int(length), False)
                    for length, count in zip(*np.unique(lengths_R, return_counts=True), strict=True)
                )
                padding = float(padded_length(lengths_R, device.type).sum() / lengths_R.sum())
                for one in all_ways(Pass(model, split, free_from, device), args.repeat):
                    raw[f"{shape} {kind} {one['way']}"] = {
                        **one, "free_from": free_from, "padding": padding, "operations": work_done,
                    }  # fmt: skip
                    if "failed" in one:
                        rows.append([shape, kind, one["way"], "does not run", "", "", ""])
                        print(rows[-1], one["failed"], flush=True)
                        continue
                    taken = statistics.median(one["s"])
                    mine = raw[f"{shape} {kind} ours"]["s"]
                    gain = [ours / its for ours, its in zip(mine, one["s"], strict=True)]
                    share = work_done / taken / ceiling
                    rows.append(
                        [shape, kind, one["way"], len(split) / taken, share, spread(gain),
                         f"{one['difference']:.1e}"]
                    )  # fmt: skip
                    print(rows[-1], f"made in {one['made_s']:.1f} s", flush=True)
                print(f"{shape} {kind}: free from {free_from} rows", flush=True)
        pairs = [("L2-H128", "L2-H128") if args.smoke else ("L6-H384", "L12-H768")]
        streams = []
        for student, teacher in pairs:
            turns = two_streams(work, data, tokenizer, args, student, teacher)
            raw[f"streams {student} {teacher}"] = turns
            medians = [statistics.median(turn[key] for turn in turns) for key in ("1", "2")]
            ratios = [turn["1"] / turn["2"] for turn in turns]
            streams.append([f"{student} of {teacher}", *medians, spread(ratios)])
            print(streams[-1], flush=True)
        for shape in args.teachers if args.smoke else COMPILED:
            model = load(random_classifier(work / shape, shape, tokenizer, 1), device)
            for one in at_lengths(
                Pass(model, split_of(texts[:8], tokenizer), 1, device), args.repeat
            ):
                raw[f"{shape} {one['way']} {one['length']}"] = one
                gain_text = "does not run" if "failed" in one else spread(one["gain"])
                others.append([shape, one["way"], one["length"], gain_text, one.get("made_s", "")])
                print(others[-1], one.get("failed", ""), flush=True)
    raw["ceiling"] = ceiling
    text = "\n\n".join(
        [
            f"{args.rows} rows of SST-2 (short) and as many of six joined (long), bf16, random "
            f"weights, {args.repeat} interleaved turns, medians (least-most). The ceiling, a "
            f"product of {size} x {size} matrices: {ceiling / 1e12:.0f} TFLOP/s.",
            table(
                ["teacher", "rows", "way", "examples/s", "of the ceiling", "times ours",
                 "largest difference"],
                rows,
            ),
            "At fixed lengths, against the plain forward of the same batch:",
            table(["teacher", "way", "tokens", "times as fast", "first turn, s"], others),
            "A student's epoch over an empty store, teachers computing:",
            table(["student", "one stream, s", "two streams, s", "one / two"], streams),
        ]
    )  # fmt: skip
    write_result("gpu", "The teachers' pass on a GPU", text, raw, args)


if __name__ == "__main__":
    main()
