"""The speed of compiled and of stacked teachers on a GPU, at fixed shapes.

The plain bf16 forward of a padded batch, at two lengths, is compared with a compiled teacher
(`torch.compile`), and with one forward for several teachers of one shape (`stack_module_state` and
`vmap`).
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from gpu import load, seconds
from inputs import alone, laid_out, random_classifier
from result_file import (
    common_arguments,
    device_argument,
    set_threads,
    spread,
    table,
    write_result,
)
from torch.func import functional_call, stack_module_state
from transformers import PreTrainedModel

from sead_dist.teachers.inference import rows_per_batch

LENGTHS = (16, 128)
STACKED = 4


def in_turn(models: list[PreTrainedModel], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [model(**inputs).logits for model in models]


@torch.inference_mode()
def at_length(
    model: PreTrainedModel, length: int, device: torch.device, repeat: int
) -> list[dict[str, object]]:
    """Gains of both ways over plain forwards of a batch of this length."""
    several = [copy.deepcopy(model) for _ in range(STACKED)]
    with torch.inference_mode(False), torch.no_grad():
        weights, buffers = stack_module_state(several)
    outline = copy.deepcopy(model).to("meta")

    def one(weights: dict, buffers: dict, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(outline, (weights, buffers), (), inputs).logits

    ids = torch.randint(
        3, model.config.vocab_size, (rows_per_batch(length, device.type), length), device=device
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][-1, 1:] = 0
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        f"{STACKED} stacked": (
            partial(in_turn, several, inputs),
            partial(torch.vmap(one, in_dims=(0, 0, None)), weights, buffers, inputs),
        ),
        "compiled": (
            partial(model, **inputs),
            partial(torch.compile(model, dynamic=False), **inputs),
        ),
    }
    found: list[dict[str, object]] = []
    for name, (plain, other) in ways.items():
        try:
            first_s = seconds(other)
            gain = [seconds(plain) / seconds(other) for _ in range(repeat + 2)][2:]
            found.append({"way": name, "first_s": first_s, "gain": gain})
        except Exception as error:  # whatever it is, this way does not go here
            found.append({"way": name, "failed": str(error).splitlines()[0][:200]})
    return found


def main() -> None:
    parser = common_arguments(__doc__, rows=100, repeat=5)
    device_argument(parser)
    parser.add_argument("--teachers", nargs="+", default=["L2-H128", "L12-H768"])
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.teachers = 20, 1, ["L1-H32"]
    set_threads(args.threads, args.device)
    device = alone(args.device).device
    raw, rows = [], []
    with laid_out(args) as (work, _, tokenizer):
        for shape, length in product(args.teachers, LENGTHS[:1] if args.smoke else LENGTHS):
            model = load(random_classifier(work / shape, shape, tokenizer, 1), device)
            for one in at_length(model, length, device, args.repeat):
                raw.append({"teacher": shape, "tokens": length, **one})
                gain = "does not run" if "failed" in one else spread(one["gain"])
                rows.append([shape, one["way"], length, gain, one.get("first_s", "")])
                print(rows[-1], one.get("failed", ""), flush=True)
    text = "bf16, random weights, medians (least-most).\n\n" + table(
        ["teacher", "way", "tokens", "times as fast as plain", "first turn, s"], rows
    )
    write_result("gpu_fixed_shapes", "Compiled and stacked teachers on a GPU", text, raw, args)


if __name__ == "__main__":
    main()
