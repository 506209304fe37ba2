"""Batches without padding, for teachers in half precision on a GPU.

Such a batch is called a pack. Its text rows lie one after the other in one row of tokens. Attention
stays within each text row (PyTorch's kernel for unequal lengths). A pack has one of a few sizes in
tokens, and its number of text rows follows from its size. Spare rows fill it up. The self-check
`packs_from` finds whether a model can take packs here, and from which size on a row's bits do not
depend on the other rows. (Invariant 3; our own scheme.)

Shapes: R rows of a request, P rows of one pack (or their positions in the request), K text rows of
an example, S text rows of a pack with its spare ones, T tokens of a pack, H hidden, D of a head.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.data.tokens import TokenTable
from sead_dist.errors import UserError
from sead_dist.models.inputs import first_position
from sead_dist.models.pretrained import position_limit
from sead_dist.models.sequence_classifier import DTYPES, new_classifier

NAME = "packs-1"
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# a pack has at most one text row for so many tokens
TOKENS_PER_ROW = 8
SPARE_TOKENS = 64
# for each kind of model the module that uses only the first token of a text
FIRST_TOKEN = {
    "bert": "bert.pooler",
    "roberta": "classifier",
    "xlm-roberta": "classifier",
    "electra": "classifier",
}
ATTENTION = "sead_dist_packs"
CHECK_ROWS = 48
# scale of the check's weights, times 1/sqrt(H): large enough for attention to change the logits
CHECK_GAIN = 2.8
# packed logits may differ from padded ones by rounding: by less than this part of their spread
ROUNDING = 0.1


def attend_within_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    most: int = 0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [1, heads, T, D] within the text rows that begin at `offsets`.

    The signature is the one that Transformers calls. most: tokens of the longest text row. Raises
    ValueError without `offsets`, and for a scaling that the kernel does not have.
    """
    from torch.nn.attention.varlen import varlen_attn

    usual = query.shape[-1] ** -0.5
    if offsets is None or not math.isclose(scaling or usual, usual):
        raise ValueError("attention that packs have no kernel for")
    query_THD, key_THD, value_THD = (
        tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)
    )
    attended = varlen_attn(query_THD, key_THD, value_THD, offsets, offsets, most, most)
    assert isinstance(attended, torch.Tensor)
    return attended[None], None


def use_packs(model: PreTrainedModel) -> PreTrainedModel:
    """Change the model in place so that it takes packs and gives logits [S, C].

    Raises the errors of this version of Transformers where the model cannot be changed so.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend_within_rows)
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:  # Transformers may only log a warning
        raise ValueError(f"{type(model).__name__} has an attention of its own")
    offsets: list[torch.Tensor] = []

    def keep_offsets(_: torch.nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        offsets[:] = [inputs["offsets"]]

    def first_tokens(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_1TH = args[0]
        # rows without tokens begin after the last token, and get that one
        first_S = offsets[0][:-1].long().clamp(max=hidden_1TH.shape[1] - 1)
        return (hidden_1TH[0, first_S][:, None], *args[1:])

    model.register_forward_pre_hook(keep_offsets, with_kwargs=True)
    reads_first = model.get_submodule(FIRST_TOKEN[model.config.model_type])
    reads_first.register_forward_pre_hook(first_tokens)
    return model


def size_for(tokens: int, rows: int, free_from: int) -> int:
    """The size in tokens of a pack for so many tokens and text rows. Spare rows take the rest."""
    wanted = max(free_from, tokens, rows * TOKENS_PER_ROW)
    return next(size for size in SIZES if size >= wanted)


def cut_into_packs(
    tokens: TokenTable, rows_R: np.ndarray, free_from: int
) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, size in tokens) of each pack. Rows with the most tokens come first."""
    counts_R = _text_tokens(tokens).sum(axis=1)[rows_R]
    order_R = np.argsort(-counts_R, kind="stable")
    ends_R = np.cumsum(counts_R[order_R])
    room = SIZES[-1] // TOKENS_PER_ROW // tokens.choices
    start = 0
    while start < len(order_R):
        before = int(ends_R[start - 1]) if start else 0
        stop = int(np.searchsorted(ends_R, before + SIZES[-1], "right"))
        stop = min(max(stop, start + 1), start + room)
        used = int(ends_R[stop - 1]) - before
        yield order_R[start:stop], size_for(used, (stop - start) * tokens.choices, free_from)
        start = stop


def _text_tokens(tokens: TokenTable) -> np.ndarray:
    """Tokens of each text row [R, K]."""
    return np.diff(tokens.offsets).reshape(-1, tokens.choices)


def pack_inputs(
    tokens: TokenTable, rows_P: np.ndarray, size: int, config: PretrainedConfig
) -> dict[str, Any]:
    """Inputs of a model that takes packs: the text rows of these examples, then spare rows up to
    `size` tokens.

    `offsets` has the same length for all packs of this size.
    """
    counts_F = _text_tokens(tokens)[rows_P].reshape(-1)
    limit = min(SPARE_TOKENS, position_limit(config) or SPARE_TOKENS)
    left = size - int(counts_F.sum())
    spare = np.full(-(-left // limit), limit)
    spare[-1:] -= limit * len(spare) - left
    counts_S = np.concatenate([counts_F, spare])
    ends_S = np.cumsum(counts_S)
    inside_T = np.arange(size) - np.repeat(ends_S - counts_S, counts_S)
    own = int(counts_F.sum())
    flat = (rows_P[:, None] * tokens.choices + np.arange(tokens.choices)).reshape(-1)
    index = np.repeat(tokens.offsets[flat], counts_F) + inside_T[:own]
    ids_T = np.full(size, tokens.pad_id, np.int64)
    ids_T[:own] = tokens.ids[index]
    # rows without tokens fill up the number of rows
    most_rows = size // TOKENS_PER_ROW + -(-size // limit)
    offsets = np.full(most_rows + 1, size, np.int32)
    offsets[0] = 0
    offsets[1 : len(ends_S) + 1] = ends_S
    types_T = np.zeros(size, np.int64)
    if tokens.types is not None:
        types_T[:own] = tokens.types[index]
    return {
        "input_ids": torch.from_numpy(ids_T)[None],
        "position_ids": torch.from_numpy(inside_T + first_position(config))[None],
        "offsets": torch.from_numpy(offsets),
        "token_type_ids": torch.from_numpy(types_T)[None],
        "most": int(counts_S.max()),
    }


def probe_rows(longest: int) -> TokenTable:
    """Made-up text rows of many lengths. One of them has 512 tokens, or as many as the model
    reads."""
    random = np.random.Generator(np.random.PCG64(1))
    counts = random.integers(2, max(3, min(64, longest) + 1), CHECK_ROWS)
    counts[CHECK_ROWS // 2] = min(512, longest)
    return TokenTable(
        ids=random.integers(3, 100, int(counts.sum())).astype(np.int32),
        types=None,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        choices=1,
        pad_id=0,
        pad_type=0,
        cut=np.zeros(0, np.int64),
    )


def packs_from(probe: PretrainedConfig, dtype: str, device: torch.device) -> int | None:
    """The fewest tokens of a pack from which a row's bits do not depend on the pack's size, on the
    row's place or on the other rows. A small model of the teacher's widths is tried.

    None where there are no packs: another device than a GPU, fp32, another kind of model, an older
    PyTorch or Transformers, or logits that differ from those of padded batches.

    Raises UserError where the GPU has no memory left for the check. To go on with padded batches
    would give another numerics class.
    """
    if device.type != "cuda" or dtype not in ("bf16", "fp16"):
        return None
    own_code = getattr(probe, "auto_map", None) or getattr(probe, "is_decoder", False)
    if probe.model_type not in FIRST_TOKEN or own_code:
        return None
    return self_check(probe, dtype, device)


@torch.inference_mode()
def self_check(probe: PretrainedConfig, dtype: str, device: torch.device) -> int | None:
    """As `packs_from`, for a device and dtype that have the kernel."""
    probe = copy.deepcopy(probe)
    probe.initializer_range = CHECK_GAIN / math.sqrt(probe.hidden_size)
    tokens = probe_rows(position_limit(probe) or 64)
    everyone = np.arange(CHECK_ROWS)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = new_classifier(probe).to(device, DTYPES[dtype]).eval()
        padded = tokens.pad(everyone, int(tokens.lengths_B().max()))
        plain = model(**{name: tensor.to(device) for name, tensor in padded.items()}).logits.float()
        use_packs(model)
        expected = _packed_logits(model, tokens, everyone, SIZES[-1], device)
        if not bool((expected.float() - plain).abs().mean() <= ROUNDING * plain.std()):
            return None
        free_from: int | None = None
        for size in reversed(SIZES):
            for rows in _trial_packs(tokens, size):
                said = _packed_logits(model, tokens, rows, size, device)
                if not torch.equal(said, expected[torch.from_numpy(rows).to(device)]):
                    return free_from
            free_from = size
        return free_from
    except torch.OutOfMemoryError:
        raise UserError(
            f"{device} has too little free memory to check how teachers compute on it; end what "
            "uses it (nvidia-smi lists that), or run on another GPU"
        ) from None
    except Exception:  # a model that cannot take packs gets padded batches
        return None


def _trial_packs(tokens: TokenTable, size: int) -> Iterator[np.ndarray]:
    """Rows for packs of this size: as many as fit in, in two orders, and a few."""
    counts = np.diff(tokens.offsets)
    everyone = np.arange(len(counts))
    for order in (everyone, everyone[::-1]):
        rows = np.resize(order, size // TOKENS_PER_ROW)
        yield rows[: int(np.searchsorted(np.cumsum(counts[rows]), size, "right"))].copy()
    yield everyone[:1]
    yield everyone[5:12]


def _packed_logits(
    model: PreTrainedModel, tokens: TokenTable, rows_P: np.ndarray, size: int, device: torch.device
) -> torch.Tensor:
    inputs = pack_inputs(tokens, rows_P, size, model.config)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value.to(device)
    logits: torch.Tensor = model(**inputs).logits
    return logits[: len(rows_P)]
