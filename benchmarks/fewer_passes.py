"""What a teacher's forward pass would gain from being done otherwise, on this machine's CPU.

Against teachers called one after the other as the package does it: one stacked forward for all
teachers of a shape (`torch.func.stack_module_state` and `vmap`), each teacher compiled
(`torch.compile`; every padded length is a shape of its own, the time of compiling is told apart),
and linear layers in dynamic int8 (`torchao`, as `weights: int8` has them). A way is built into the
package where it gains at least 1.2 times; the largest difference of logits from plain fp32 is
shown, since what changes bits needs a numerics class of its own.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import random_classifier, sst2_folder, texts_of, tokenizer_folder
from outcome_file import common_arguments, set_threads, spread, table, write_result
from torch.func import functional_call, stack_module_state
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sead_dist.teachers.quantize import quantize

SHAPES = (("L2-H128", 4), ("L2-H128", 32), ("L4-H256", 4), ("L6-H384", 4))
LENGTHS = (8, 16, 32, 64)
ROWS = 64

Pass = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def in_turn(models: list[PreTrainedModel]) -> Pass:
    return lambda inputs: torch.stack([model(**inputs).logits for model in models])


def stacked_eager(models: list[PreTrainedModel]) -> Pass:
    """Attention as plain matrix products, which `vmap` has batching rules for."""
    copies = [copy.deepcopy(model) for model in models]
    for model in copies:
        model.set_attn_implementation("eager")
    return stacked(copies)


def stacked(models: list[PreTrainedModel]) -> Pass:
    """One forward of all teachers; their inputs are the same."""
    weights, buffers = stack_module_state(models)
    outline = copy.deepcopy(models[0]).to("meta")

    def one(weights: dict, buffers: dict, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = functional_call(outline, (weights, buffers), (), inputs).logits
        return logits

    all_of_them = torch.vmap(one, in_dims=(0, 0, None))
    return lambda inputs: all_of_them(weights, buffers, inputs)


def compiled(models: list[PreTrainedModel]) -> Pass:
    return in_turn([torch.compile(model, dynamic=False) for model in models])


def in_int8(models: list[PreTrainedModel]) -> Pass:
    """The package's own 8-bit weights."""
    copies = [copy.deepcopy(model) for model in models]
    for model in copies:
        quantize(model)
    return in_turn(copies)


WAYS: dict[str, Callable[[list[PreTrainedModel]], Pass]] = {
    "stacked": stacked,
    "stacked, eager attention": stacked_eager,
    "compiled": compiled,
    "int8": in_int8,
}


def batches(texts: list[str], tokenizer: object) -> list[dict[str, torch.Tensor]]:
    """A batch of each padded length, its last row short, as the package makes them."""
    found = []
    for length in LENGTHS:
        inputs = dict(
            tokenizer(
                texts[:ROWS], padding="max_length", truncation=True, max_length=length,
                return_tensors="pt",
            )
        )  # fmt: skip
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        inputs["attention_mask"][-1, 1:] = 0
        found.append(inputs)
    return found


def seconds(do: Pass, inputs: list[dict[str, torch.Tensor]]) -> float:
    began = time.perf_counter()
    for batch in inputs:
        do(batch)
    return time.perf_counter() - began


@torch.inference_mode()
def one_shape(
    models: list[PreTrainedModel], inputs: list[dict[str, torch.Tensor]], repeat: int
) -> list[dict[str, object]]:
    plain = in_turn(models)
    expected = [plain(batch) for batch in inputs]
    figures: list[dict[str, object]] = []
    for name, way in WAYS.items():
        try:
            with torch.inference_mode(False), torch.no_grad():
                do = way(models)
            first_s = seconds(do, inputs)
            largest = max(
                float((do(batch) - logits).abs().max())
                for batch, logits in zip(inputs, expected, strict=True)
            )
        except Exception as error:  # whatever it is, this way does not go here
            figures.append({"way": name, "failed": str(error).splitlines()[0][:200]})
            continue
        ratios = [seconds(plain, inputs) / seconds(do, inputs) for _ in range(repeat)]
        figures.append({"way": name, "first_s": first_s, "gain": ratios, "difference": largest})
    return figures


def main() -> None:
    parser = common_arguments(__doc__, rows=ROWS, repeat=7)
    args = parser.parse_args()
    shapes = SHAPES[:1] if args.smoke else SHAPES
    set_threads(args.threads)
    raw, rows = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        data = sst2_folder(folder / "data", args.rows)
        words = tokenizer_folder(folder / "tokenizer", data)
        inputs = batches(texts_of(data / "train.tsv"), AutoTokenizer.from_pretrained(words))
        for shape, count in shapes:
            models = [
                AutoModelForSequenceClassification.from_pretrained(
                    random_classifier(folder / f"{shape}-{n}", shape, words, n)
                ).eval()
                for n in range(count)
            ]
            for of in one_shape(models, inputs, 1 if args.smoke else args.repeat):
                raw.append({"shape": shape, "teachers": count, **of})
                row: list[object] = [f"{count} x {shape}", of["way"]]
                if "failed" in of:
                    rows.append([*row, "does not run", "", ""])
                else:
                    rows.append(
                        [*row, spread(of["gain"]), of["first_s"], f"{of['difference']:.1e}"]
                    )
    gains = [statistics.median(of["gain"]) for of in raw if "gain" in of]
    columns = ["teachers", "way", "times as fast", "first turn, s", "largest difference of logits"]
    text = (
        f"fp32, random weights, {ROWS} rows of SST-2 at each of {LENGTHS} tokens, "
        f"{args.threads} thread; {args.repeat} repetitions beside the plain way, medians "
        f"(least-most). The highest gain is {max(gains):.2f} times.\n\n{table(columns, rows)}"
    )
    write_result("fewer_passes", "Other ways to a teacher's forward pass", text, raw, args)


if __name__ == "__main__":
    main()
