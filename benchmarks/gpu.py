"""The teachers' pass on a GPU against its matrix products, and the speed of other ways to it.

A pass is the package's `predict` over rows of SST-2 as they are (short) and joined (long), in bf16
with random weights. It runs in packs, where the self-check allows them, and padded. The ceiling is
the rate of one large bf16 product on random data. Only operations for the rows' own tokens are
counted, so padding and spare rows lower the rate. Other ways are packs that were made before and
queued at once, and padded batches: in finer steps of length, with their full row counts, each
waited for before the next is made, and through CUDA graphs of each shape.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import LABELS, alone, laid_out, random_classifier, texts_of
from result_file import (
    common_arguments,
    device_argument,
    set_threads,
    spread,
    table,
    write_result,
)
from transformers import AutoTokenizer, PreTrainedModel

from sead_dist.data.examples import build_examples
from sead_dist.data.order import Split, make_split
from sead_dist.data.tasks import load_task
from sead_dist.models.pretrained import locate
from sead_dist.models.sequence_classifier import load_classifier
from sead_dist.teachers.inference import SHAPES, Cut, batches_of, padded_length, predict
from sead_dist.teachers.packing import use_packs
from sead_dist.teachers.rates import operations
from sead_dist.teachers.teacher import cut_of

TEACHERS = ("L2-H128", "L6-H384", "L12-H768", "L24-H1024")
LONGEST = 128


@dataclass
class Pass:
    """A teacher, the rows to forward, and what the package's self-check allows."""

    model: PreTrainedModel
    split: Split
    cut: Cut
    device: torch.device

    @property
    def rows_R(self) -> np.ndarray:
        return np.arange(len(self.split))

    def batches(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        tokens, config = self.split.tokens, self.model.config
        return batches_of(tokens, self.rows_R, self.device, self.cut, config)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Answer = Callable[[], torch.Tensor]


def ours(of: Pass) -> Answer:
    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2)

        def keep(part: np.ndarray, logits: np.ndarray) -> None:
            logits_RC[torch.from_numpy(part)] = torch.from_numpy(logits)

        predict(of.model, of.split.tokens, of.rows_R, of.device, of.cut, keep)
        return logits_RC

    return do


def at_full_counts(of: Pass) -> Answer:
    return ours(replace(of, cut=replace(of.cut, free_rows=None)))


def in_steps_of_2(of: Pass) -> Answer:
    """The same with padded lengths in steps of 2 tokens, as on a CPU."""
    kind = of.device.type
    own, other = SHAPES[kind], replace(SHAPES[kind], step=2)
    answer = ours(of)

    def do() -> torch.Tensor:
        SHAPES[kind] = other
        try:
            return answer()
        finally:
            SHAPES[kind] = own

    return do


def one_at_a_time(of: Pass) -> Answer:
    """Each batch is waited for before the next is made."""

    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2)
        for part, inputs in of.batches():
            logits_RC[torch.from_numpy(part)] = of.model(**inputs).logits[: len(part)].float().cpu()
        return logits_RC

    return do


def queued(of: Pass) -> Answer:
    batches = list(of.batches())

    def do() -> torch.Tensor:
        logits_RC = torch.zeros(len(of.split), 2, device=of.device)
        for part, inputs in batches:
            logits_RC[torch.from_numpy(part)] = of.model(**inputs).logits[: len(part)].float()
        return logits_RC.cpu()

    return do


def graphs(of: Pass) -> Answer:
    """A graph of each shape; capturing is not counted."""
    batches = list(of.batches())
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


def packs(of: Pass) -> Pass:
    """The same with a model that takes packs, where the package's self-check allows them."""
    cut = cut_of(of.model.config, "bf16", of.device, None)
    if cut.pack_from is None:
        raise ValueError("the self-check allows no packs here")
    return replace(of, model=use_packs(copy.deepcopy(of.model)), cut=cut)


WAYS: dict[str, Callable[[Pass], Answer]] = {
    "packs": lambda of: ours(packs(of)),
    "packs, queued": lambda of: queued(packs(of)),
    "padded": ours,
    "padded, steps of 2 tokens": in_steps_of_2,
    "padded, full row counts": at_full_counts,
    "padded, one at a time": one_at_a_time,
    "padded, graphs": graphs,
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
    """Interleaved turns of every way that runs on this machine."""
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


def load(folder: Path, device: torch.device) -> PreTrainedModel:
    model = load_classifier(locate(str(folder)), "bf16").to(device)
    return model.eval().requires_grad_(False)


def split_of(texts: list[str], words: Path) -> Split:
    task = load_task("sst2")
    rows = [{"sentence": text, "label": LABELS[1]} for text in texts]
    examples = build_examples(task, rows, "train")
    return make_split(examples, AutoTokenizer.from_pretrained(words), LONGEST)


def figures(one: dict[str, Any], plain: dict[str, Any], count: int) -> list[object]:
    """Examples/s, times the padded way, largest difference."""
    if "failed" in one:
        return ["does not run", "", "", ""]
    gain = [before / now for before, now in zip(plain["s"], one["s"], strict=True)]
    return [count / statistics.median(one["s"]), spread(gain), f"{one['difference']:.1e}"]


def main() -> None:
    parser = common_arguments(__doc__, rows=4096, repeat=5)
    device_argument(parser)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS))
    args = parser.parse_args()
    size = 8192
    if args.smoke:
        args.rows, args.repeat, args.teachers, size = 12, 1, ["L1-H64"], 256
    set_threads(args.threads, args.device)
    device = alone(args.device).device
    raw: dict[str, object] = {}
    with laid_out(args) as (work, data, tokenizer):
        ceiling = product_rate(size, 20, device)
        texts = texts_of(data / "train.tsv")
        joined = [" ".join(texts[n : n + 6]) for n in range(len(texts) - 5)]
        rows = []
        for shape in args.teachers:
            model = load(random_classifier(work / shape, shape, tokenizer, 1), device)
            cut = replace(cut_of(model.config, "bf16", device, None), pack_from=None)
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
                found = all_ways(Pass(model, split, cut, device), args.repeat)
                plain = next(one for one in found if one["way"] == "padded")
                for one in found:
                    raw[f"{shape} {kind} {one['way']}"] = {
                        **one, "free_rows": cut.free_rows, "padding": padding,
                        "operations": work_done,
                    }  # fmt: skip
                    rows.append([shape, kind, one["way"], *figures(one, plain, len(split))])
                    if "s" in one:
                        share = work_done / statistics.median(one["s"]) / ceiling
                        rows[-1].insert(4, share)
                    # a machine that is lent may be taken back before the end
                    print(rows[-1], one.get("failed", ""), flush=True)
    raw["ceiling"] = ceiling
    text = "\n\n".join(
        [
            f"{args.rows} rows of SST-2 (short) and as many of six joined (long), bf16, random "
            f"weights, {args.repeat} interleaved turns, medians (least-most). The ceiling, a "
            f"product of {size} x {size} matrices: {ceiling / 1e12:.0f} TFLOP/s.",
            table(
                ["teacher", "rows", "way", "examples/s", "of the ceiling", "times padded",
                 "largest difference"],
                rows,
            ),
        ]
    )  # fmt: skip
    write_result("gpu", "The teachers' pass on a GPU", text, raw, args)


if __name__ == "__main__":
    main()
