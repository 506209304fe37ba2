"""Checks that a model gives a text the same logits in our batches as alone.

To rounding, a prediction equals the model's output for that text alone and unpadded (invariant 3).
The padding that keeps this is found by a trial on fixed texts, with a small model of the same kind
and random weights. So the padding is known before weights and data are read. It is the same in
every process and at every resume. Some kinds give other logits under any padding (MobileBERT's
trigrams, FNet's Fourier transform, convolutions over tokens). Their batches hold rows of one length
only.

A second check runs each model's own weights on some rows of the run. It may reject a model, but it
never changes a teacher's padding.

Shapes: B examples, R text rows, L tokens, C classes.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sead_dist.data.examples import ExampleSet, subset
from sead_dist.data.tokens import TokenTable, tokenize
from sead_dist.errors import UserError
from sead_dist.models.pretrained import position_limit
from sead_dist.models.sequence_classifier import new_classifier

Padding = Literal["right", "left", "none"]
# how far the logits of a row alone and in a batch may differ by rounding, as a share of the largest
# logit
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# the least difference that is allowed: a logit near 0 is a sum of larger parts, whose rounding
# stays
LEAST = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}
# fields of a model's config that hold the ids of special tokens
MARKS = ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")
KEPT_IDS = 1000
# most tokens of a probe: it must exceed the length above which a kind changes its attention
# (BigBird: 704 tokens)
LONGEST_PROBE = 2048
# rows that are tokenised to find the shortest and the longest, where a split has no tokens yet
LOOKED_AT = 1000


@dataclass(frozen=True)
class CheckRows:
    """Text rows on which a model is checked, on its device.

    alone: each row in a batch of its own, as plain Transformers makes it. together: the batches in
    which we run these rows, by padding. With "none" each example has a batch that holds it twice.
    """

    alone: list[dict[str, torch.Tensor]]
    together: Callable[[Padding], list[dict[str, torch.Tensor]]]


def rows_alone(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    others: Sequence[str] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Each text (or pair of texts) as a batch of its own, without padding, as plain Transformers
    makes it."""
    rows = []
    for place, text in enumerate(texts):
        pair = (text,) if others is None else (text, others[place])
        one = tokenizer(*pair, truncation=True, max_length=max_length, return_tensors="pt")
        one = {name: tensor for name, tensor in one.items() if isinstance(tensor, torch.Tensor)}
        rows.append({"attention_mask": torch.ones_like(one["input_ids"]), **one})
    return rows


def probe_rows(
    tokenizer: PreTrainedTokenizerBase, max_length: int, device: torch.device
) -> CheckRows:
    """Fixed texts of different lengths, for a model that is loaded without data."""
    alone = _on(device, probes_alone(tokenizer, max_length))
    pads = int(tokenizer.pad_token_id), int(tokenizer.pad_token_type_id)

    def together(padding: Padding) -> list[dict[str, torch.Tensor]]:
        if padding == "none":
            return [padded([row, row], "right", *pads) for row in alone]
        return [padded(alone, padding, *pads)]

    return CheckRows(alone, together)


def real_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSet,
    max_length: int,
    device: torch.device,
    tokens: TokenTable | None = None,
) -> CheckRows:
    """The shortest, a middle and the longest example. The choice follows from the examples alone.
    tokens: those of all examples, by this tokeniser and length. Without them only LOOKED_AT
    examples are compared, evenly spread over all."""
    if tokens is None:
        count = len(examples)
        examples = subset(examples, np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int))
        tokens = tokenize(tokenizer, examples, max_length)
    table, lengths_B = tokens, tokens.lengths_B()
    order_B = np.argsort(lengths_B, kind="stable")
    chosen = np.array(list(dict.fromkeys(order_B[[0, len(order_B) // 2, -1]].tolist())))
    few = subset(examples, chosen)
    alone = _on(device, rows_alone(tokenizer, few.texts_a, max_length, few.texts_b))

    def together(padding: Padding) -> list[dict[str, torch.Tensor]]:
        parts = [np.repeat(row, 2) for row in chosen] if padding == "none" else [chosen]
        return _on(device, [table.pad(p, int(lengths_B[p].max()), padding) for p in parts])

    return CheckRows(alone, together)


def _on(
    device: torch.device, batches: Sequence[dict[str, torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor.to(device) for name, tensor in one.items()} for one in batches]


def padded(
    rows: Sequence[dict[str, torch.Tensor]], side: str, pad_id: int, pad_type: int
) -> dict[str, torch.Tensor]:
    """These rows as one batch, each padded on `side` to the longest."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    fillers = {"input_ids": pad_id, "token_type_ids": pad_type}
    batch = {}
    for name in rows[0]:
        parts = []
        for row in rows:
            more = longest - row[name].shape[1]
            ends = (more, 0) if side == "left" else (0, more)
            parts.append(torch.nn.functional.pad(row[name], ends, value=fillers.get(name, 0)))
        batch[name] = torch.cat(parts)
    return batch


def reset_attention(model: PreTrainedModel) -> None:
    """Make a model set the attention of its config before every forward. BigBird changes its
    attention after a short batch and does not change it back."""
    body = getattr(model, model.base_model_prefix, model)
    asked = getattr(model.config, "attention_type", None)
    if asked is None or not hasattr(body, "set_attention_type"):
        return

    def reset(*_: object) -> None:
        if body.attention_type != asked:
            # the setter is called only for a change
            body.set_attention_type(asked)

    body.register_forward_pre_hook(reset)


def _logits_of(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([model(**batch).logits.float() for batch in batches])


def _logits_together(model: PreTrainedModel, rows: CheckRows, padding: Padding) -> torch.Tensor:
    """The logits of each row in our batches, in the order of `rows.alone`."""
    batches = rows.together(padding)
    if padding != "none":
        return _logits_of(model, batches)
    # the second half of each batch is the copy
    parts = [model(**batch).logits.float() for batch in batches]
    return torch.cat([part[: len(part) // 2] for part in parts])


def _far(one_RC: torch.Tensor, alone_RC: torch.Tensor, dtype: torch.dtype) -> bool:
    most = max(float(alone_RC.abs().max()) * TOLERANCE.get(dtype, 1e-3), LEAST.get(dtype, 1e-5))
    return not bool((one_RC - alone_RC).abs().max() <= most)


# not inference_mode: FSDP reads version counters
@torch.no_grad()
def padding_of(model: PreTrainedModel, rows: CheckRows, first: str) -> Padding:
    """The padding under which the model gives each row the same logits as alone. `first` is tried
    first, then the other side. "none" where neither side does. Raises UserError where the logits
    depend on earlier forwards."""
    dtype = next(model.parameters()).dtype
    alone_RC = _logits_of(model, rows.alone)
    if not bool(torch.isfinite(alone_RC).all()):
        return "left" if first == "left" else "right"  # reported elsewhere
    if _far(_logits_of(model, rows.alone[::-1]).flip(0), alone_RC, dtype):
        raise UserError("its logits for a text depend on the texts before it")
    sides: list[Padding] = ["right", "left"] if first == "right" else ["left", "right"]
    for side in sides:
        if not _far(_logits_together(model, rows, side), alone_RC, dtype):
            return side
    return "none"


def probes_alone(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, torch.Tensor]]:
    """Rows of one word, of one sentence, and of a quarter, a half and all of `max_length` tokens
    (LONGEST_PROBE at most). Some kinds compute long texts in another way than short ones."""
    words = "the film is a warm , funny and moving story of two old friends .".split()
    length = min(max_length, LONGEST_PROBE)
    rows = rows_alone(tokenizer, [words[1], " ".join(words)], length)
    long = " ".join(words * (length // 8 + 1))
    for part in (length // 4, length // 2, length):
        rows += rows_alone(tokenizer, [long], max(part, min(length, 8)))
    return rows


def dense(
    rows: Sequence[dict[str, torch.Tensor]], config: PretrainedConfig, pad_id: int
) -> tuple[list[dict[str, torch.Tensor]], PretrainedConfig]:
    """The rows and the config with a small vocabulary. Large ids get new numbers in both. Random
    embeddings for a whole vocabulary take long to draw."""
    marks = {name: mark for name in MARKS if isinstance(mark := getattr(config, name, None), int)}
    seen = {pad_id, *marks.values()}
    for row in rows:
        seen.update(row["input_ids"].flatten().tolist())
    renamed = {old: KEPT_IDS + n for n, old in enumerate(sorted(i for i in seen if i >= KEPT_IDS))}
    small = copy.deepcopy(config)
    small.vocab_size = KEPT_IDS + len(renamed)
    for name, mark in marks.items():
        setattr(small, name, renamed.get(mark, mark))
    fewer = [
        {**row, "input_ids": row["input_ids"].clone().apply_(lambda old: renamed.get(old, old))}
        for row in rows
    ]
    return fewer, small


def shallow(config: PretrainedConfig, layers: int = 2) -> PretrainedConfig:
    """The config with at most `layers` layers, where this kind of model lets their number
    change."""
    small = copy.deepcopy(config)
    with suppress(NotImplementedError, AttributeError):  # Funnel counts its layers in blocks
        small.num_hidden_layers = min(
            layers, int(getattr(config, "num_hidden_layers", layers) or layers)
        )
    return small


def enlarge_weights(model: PreTrainedModel) -> None:
    """Scale random weights up: then different texts get clearly different logits. Fill the padding
    token's embedding: it is 0 in a new model, and need not be 0 in a trained one."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_()


@torch.no_grad()
def check_teacher(model: PreTrainedModel, rows: CheckRows, padding: Padding, name: str) -> None:
    """Check that a teacher gives these rows the same logits in our batches as alone. It computes as
    in the run: in its dtype, in 8 bits, or split over ranks. All forwards come before the first
    error: so every rank runs equally many.

    Raises UserError where the logits differ.
    """
    dtype, kind = next(model.parameters()).dtype, model.config.model_type
    alone_RC = _logits_of(model, rows.alone)
    again_RC = _logits_of(model, rows.alone[::-1]).flip(0)
    ours_RC = _logits_together(model, rows, padding)
    if not bool(torch.isfinite(alone_RC).all()):
        return  # reported with the row when the run computes it
    if _far(again_RC, alone_RC, dtype):
        raise UserError(
            f"teacher {name}, a {kind}: its logits for a text depend on the texts before it; leave "
            "the teacher out"
        )
    if _far(ours_RC, alone_RC, dtype):
        how = "of texts of one length" if padding == "none" else f"padded on the {padding}"
        raise UserError(
            f"teacher {name} gives a text other logits in a batch {how} than alone, and a {kind} "
            "should give the same; leave the teacher out, or give it the tokeniser that it was "
            "trained with"
        )


def probed_padding(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, max_length: int
) -> Padding:
    """The padding of a kind of model, found on a shallow model with random weights. So it is known
    before any weights are read. A kind that cannot be tried in this way is padded on its
    tokeniser's side."""
    first = tokenizer.padding_side
    try:
        small = shallow(config)
        rows = probes_alone(tokenizer, fitting_length(max_length, config))
        pad_id = int(tokenizer.pad_token_id)
        if getattr(config, "vocab_size", None) is not None:
            rows, small = dense(rows, small, pad_id)
            pad_id = int(small.pad_token_id) if small.pad_token_id is not None else pad_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = new_classifier(small).eval()
            with torch.no_grad():
                enlarge_weights(model)
        reset_attention(model)
        pads = pad_id, int(tokenizer.pad_token_type_id)
        return padding_of(model, CheckRows(rows, lambda side: [padded(rows, side, *pads)]), first)
    except Exception:  # such a model is checked when it is loaded
        return "left" if first == "left" else "right"


def fitting_length(asked: int, config: PretrainedConfig) -> int:
    """`asked` tokens, or fewer where the model's positions end before."""
    return min(asked, position_limit(config) or asked)
