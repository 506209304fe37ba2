"""Whether a model answers in our batches what it answers to each text alone.

A prediction equals what the model says of that text alone, unpadded, to rounding (invariant 3).
Which padding keeps that is found by trying it, on fixed texts and a small model of the kind: so it
is known before weights and data are read, and is the same in every process and at every resume.
Models that no padding leaves alone (MobileBERT's trigrams, FNet's Fourier transform, convolutions
over tokens) get rows of one length together. What is found so is then held against each model's own
weights and some rows of the run, which refuses a model and never changes a teacher's padding.

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
from sead_dist.models.pretrained import fitting_length
from sead_dist.models.sequence_classifier import new_classifier

Padding = Literal["right", "left", "none"]
# a model's own answer to a text, and the one it gives in a batch, differ by rounding alone
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# and at least by this: scores near 0 are sums of parts that are not, whose rounding stays
LEAST = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}
# the ids of marks in a model's config
MARKS = ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")
KEPT_IDS = 1000
# a probe has to be longer than what a kind looks at as a whole (BigBird: 704 tokens), and no more
LONGEST_PROBE = 2048
# of a split that is not tokenised yet, the rows among which the shortest and longest are looked for
LOOKED_AT = 1000


@dataclass(frozen=True)
class CheckRows:
    """Text rows that a model is tried on, on its device. alone: as plain Transformers makes each, a
    batch of its own; together: by padding, the batches in which we ask them. Where rows are not
    padded, each example has a batch with a second copy of it."""

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
    """Fixed texts of unlike lengths, for a model that is loaded without data."""
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
    """The shortest, a middle and the longest example: of all where `tokens` (all examples', of this
    tokeniser and length) are given, else of rows evenly spread over the examples. The choice
    follows from the examples alone."""
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
    """These rows as one batch, padded on a side to the longest."""
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
    """Before every forward a model that changes its attention after a short batch, and never back
    (BigBird), gets the attention of its config again."""
    body = getattr(model, model.base_model_prefix, model)
    asked = getattr(model.config, "attention_type", None)
    if asked is None or not hasattr(body, "set_attention_type"):
        return

    def reset(*_: object) -> None:
        if body.attention_type != asked:
            # its own switch refuses to be called for what it takes to be its setting
            body.set_attention_type(asked)

    body.register_forward_pre_hook(reset)


def _said(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([model(**batch).logits.float() for batch in batches])


def _said_together(model: PreTrainedModel, rows: CheckRows, padding: Padding) -> torch.Tensor:
    """The logits of each row in our batches, as those of the rows alone."""
    batches = rows.together(padding)
    if padding != "none":
        return _said(model, batches)
    # of each batch the second half is the copy
    parts = [model(**batch).logits.float() for batch in batches]
    return torch.cat([part[: len(part) // 2] for part in parts])


def _far(one_RC: torch.Tensor, alone_RC: torch.Tensor, dtype: torch.dtype) -> bool:
    most = max(float(alone_RC.abs().max()) * TOLERANCE.get(dtype, 1e-3), LEAST.get(dtype, 1e-5))
    return not bool((one_RC - alone_RC).abs().max() <= most)


# not inference_mode: FSDP reads version counters
@torch.no_grad()
def padding_of(model: PreTrainedModel, rows: CheckRows, first: str) -> Padding:
    """Which padding leaves the model's answers as they are for each row alone: that of `first`, of
    the other side, or none. Raises UserError where they depend on the order of asking."""
    dtype = next(model.parameters()).dtype
    alone_RC = _said(model, rows.alone)
    if not bool(torch.isfinite(alone_RC).all()):
        return "left" if first == "left" else "right"  # what gives no numbers is told elsewhere
    if _far(_said(model, rows.alone[::-1]).flip(0), alone_RC, dtype):
        raise UserError("its answers depend on what it was asked before")
    sides: list[Padding] = ["right", "left"] if first == "right" else ["left", "right"]
    for side in sides:
        if not _far(_said_together(model, rows, side), alone_RC, dtype):
            return side
    return "none"


def probes_alone(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, torch.Tensor]]:
    """Rows of a word, of some, and of a quarter, a half and all of the tokens that a row may have:
    some kinds look at texts from a certain length on in another way."""
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
    """The same rows and config with few ids, the large ones renamed in both: random embeddings of a
    whole vocabulary take long to draw."""
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
    """The same with at most so many layers, where a kind can have fewer than it has."""
    small = copy.deepcopy(config)
    with suppress(NotImplementedError, AttributeError):  # Funnel counts its layers in blocks
        small.num_hidden_layers = min(
            layers, int(getattr(config, "num_hidden_layers", layers) or layers)
        )
    return small


def make_tell_apart(model: PreTrainedModel) -> None:
    """Random weights that answer texts unlike, and a padding token that is seen where it is looked
    at: new embeddings have nothing there, trained ones may."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_()


@torch.no_grad()
def check_teacher(model: PreTrainedModel, rows: CheckRows, padding: Padding, name: str) -> None:
    """A teacher as it computes (in its dtype, in 8 bits, split over ranks) answers these rows in
    our batches as it answers each alone. All its forwards come first, as many on every rank.

    Raises UserError where it does not.
    """
    dtype, kind = next(model.parameters()).dtype, model.config.model_type
    alone_RC = _said(model, rows.alone)
    again_RC = _said(model, rows.alone[::-1]).flip(0)
    ours_RC = _said_together(model, rows, padding)
    if not bool(torch.isfinite(alone_RC).all()):
        return  # told where it is asked, with the row
    if _far(again_RC, alone_RC, dtype):
        raise UserError(
            f"teacher {name}, a {kind}: its answers depend on what it was asked before; "
            "leave it out"
        )
    if _far(ours_RC, alone_RC, dtype):
        how = "of texts of its length" if padding == "none" else f"padded on the {padding}"
        raise UserError(
            f"teacher {name} answers a text in a batch {how} otherwise than that text alone, "
            f"though a {kind} should not; leave it out, and check that its tokeniser is the one "
            "that it was trained with"
        )


def probed_padding(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, max_length: int
) -> Padding:
    """The padding of a kind of model, found on a shallow one with random weights, so that it is
    known before any weights are read. What cannot be tried so is padded as its tokeniser does."""
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
                make_tell_apart(model)
        reset_attention(model)
        pads = pad_id, int(tokenizer.pad_token_type_id)
        return padding_of(model, CheckRows(rows, lambda side: [padded(rows, side, *pads)]), first)
    except Exception:  # what cannot be cut down is looked at when it is loaded
        return "left" if first == "left" else "right"
