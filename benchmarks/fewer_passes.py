"""The speed of other ways to a teacher's forward pass, on this machine's CPU.

They are compared with fp32 teachers called one after the other, and with the fastest way that the
package has (`teacher_precision=bf16`). The other ways are one stacked forward for all teachers of a
shape (`torch.func.stack_module_state` and `vmap`), each teacher compiled (`torch.compile`; every
padded length is a graph of its own, and the first turn's seconds are those of compiling), and
linear layers in dynamic int8: with a scale for each token (torchao, and by hand on the same matrix
product) or one for the whole batch (torch.ao). The package cannot have the last one: the prediction
of a row would depend on the other rows of its batch. The package gets a way that is 1.2 times as
fast as every way that it has. The largest differences of logits from fp32 are shown too, since
other bits need a numerics class of their own.
"""

import copy
import time
from collections.abc import Callable, Sequence

import torch
from inputs import laid_out, random_classifier, texts_of
from result_file import common_arguments, set_threads, spread, table, write_result
from torch import nn
from torch.func import functional_call, stack_module_state
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sead_dist.teachers.inference import quantize

SHAPES = (("L2-H128", 4), ("L2-H128", 16), ("L4-H256", 4), ("L6-H384", 4), ("L4-H768", 4))
LENGTHS = (8, 16, 32, 64)
ROWS = 64
# compiling takes seconds for each teacher and length
COMPILED_MOST = 4

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
    # every teacher and length is a graph of its own: none may fall back to the plain way
    torch._dynamo.config.recompile_limit = torch._dynamo.config.cache_size_limit = 10_000
    return in_turn([torch.compile(model, dynamic=False) for model in models])


def in_bf16(models: list[PreTrainedModel]) -> Pass:
    """teacher_precision=bf16, as the package has it."""
    return in_turn([copy.deepcopy(model).bfloat16() for model in models])


def int8_weights(models: list[PreTrainedModel]) -> Pass:
    """weights=int8, as the package has it: they save memory."""
    copies = [copy.deepcopy(model) for model in models]
    for model in copies:
        quantize(model)
    return in_turn(copies)


def int8_of_tokens(models: list[PreTrainedModel]) -> Pass:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    copies = [copy.deepcopy(model) for model in models]
    for model in copies:
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return in_turn(copies)


class Int8Linear(nn.Module):
    """A linear layer whose weights have a scale for each output and whose inputs [.., H] one for
    each token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self.weight = (linear.weight / scale).round().to(torch.int8).t()
        self.scale, self.bias = scale.t().contiguous(), linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        scale = tokens.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        product = torch._int_mm((tokens / scale).round_().to(torch.int8), self.weight)
        out = product.float().mul_(scale).mul_(self.scale).add_(self.bias)
        return out.reshape(*hidden.shape[:-1], -1)


def int8_by_hand(models: list[PreTrainedModel]) -> Pass:
    copies = [copy.deepcopy(model) for model in models]
    for model in copies:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(name, Int8Linear(module))
    return in_turn(copies)


def int8_of_batch(models: list[PreTrainedModel]) -> Pass:
    return in_turn(
        [
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
            for model in models
        ]
    )


WAYS: dict[str, Callable[[list[PreTrainedModel]], Pass]] = {
    "stacked": stacked,
    "stacked, eager attention": stacked_eager,
    "compiled": compiled,
    "bf16 (in the package)": in_bf16,
    "int8 weights (in the package)": int8_weights,
    "int8, a scale for each token: torchao": int8_of_tokens,
    "int8, a scale for each token: by hand": int8_by_hand,
    "int8, a scale for the batch: torch.ao": int8_of_batch,
}


def batches(
    texts: list[str], tokenizer: object, lengths: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """A batch of each padded length, its last row short, as the package makes them."""
    found = []
    for length in lengths:
        inputs = dict(
            tokenizer(
                texts, padding="max_length", truncation=True, max_length=length,
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
        if way is compiled and len(models) > COMPILED_MOST:
            continue
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
    shapes, lengths, rows_of_batch = SHAPES, LENGTHS, ROWS
    if args.smoke:
        shapes, lengths, rows_of_batch = (("L1-H32", 2),), (8,), 8
    set_threads(args.threads)
    raw, rows = [], []
    with laid_out(args) as (folder, data, words):
        texts = texts_of(data / "train.tsv")[:rows_of_batch]
        inputs = batches(texts, AutoTokenizer.from_pretrained(words), lengths)
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
    columns = [
        "teachers",
        "way",
        "times as fast as fp32 in turn",
        "first turn, s",
        "largest difference of logits",
    ]
    text = (
        f"Random weights, {ROWS} rows of SST-2 at each of {LENGTHS} tokens, "
        f"{args.threads} thread; {args.repeat} repetitions beside the plain way, medians "
        f"(least-most).\n\n{table(columns, rows)}"
    )
    write_result("fewer_passes", "Other ways to a teacher's forward pass", text, raw, args)


if __name__ == "__main__":
    main()
