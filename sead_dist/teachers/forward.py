"""One teacher's forward pass, whose result depends on the teacher and the example alone.

A row is padded to a length that is a function of its own token count, and some row of every batch
is shorter than the batch, so that a kernel for unpadded batches is never chosen. The row count of
a length is fixed, and spare rows are computed and dropped, the last of them one token long: the
guard. Where `free_rows_from` finds that on this backend bits do not depend on the row count,
batches are only filled up to that many rows, and have a guard only where no row of theirs is
shorter. (Invariant 3; our own scheme.)

Shapes: R rows of a request, P rows of one batch (or their positions in the request), C the model's
own classes, L tokens, H hidden.
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.data import TokenTable
from sead_dist.models import DTYPES, new_classifier
from sead_dist.teachers.quantize import quantize

SHAPE_TABLE = "shapes-1"
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}
ROWS_LEAST = {"cpu": 16, "cuda": 32}
ROWS_MOST = {"cpu": 64, "cuda": 512}
# row counts tried by the self-check, from the most down: every residue that thread partitions and
# vector widths make
CHECK_ROWS = (63, 47, 39, 33, 32, 31, 29, 27, 25, 23, 22, *range(21, 1, -1))
# it is passed when bits are equal from so many rows on, or from fewer
FREE_ROWS_MOST = 16
CHECK_LENGTHS = (2, 16)


class NotFiniteError(Exception):
    """A teacher's logits for one row are NaN or infinite; `position` says which of the rows."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def padded_length(tokens: np.ndarray) -> np.ndarray:
    """Steps of 2 up to 64 tokens, of 8 beyond."""
    return np.where(tokens <= 64, -(-tokens // 2) * 2, -(-tokens // 8) * 8)


def rows_per_batch(length: int, device: str) -> int:
    """The fixed row count of a padded length on a kind of device."""
    fitting = TOKENS_PER_BATCH[device] // length
    return max(ROWS_LEAST[device], min(ROWS_MOST[device], fitting))


def cut_into_batches(
    lengths_R: np.ndarray, device: str, longest: int
) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, padded length) of each batch, longest first so that memory peaks at the start."""
    padded_R = np.minimum(padded_length(lengths_R), max(longest, 2))
    for length in np.unique(padded_R)[::-1]:
        rows = np.flatnonzero(padded_R == length)
        # one row of every batch is the guard
        room = rows_per_batch(int(length), device) - 1
        for part in np.array_split(rows, -(-len(rows) // room)):
            yield part, int(length)


def fill(inputs: dict[str, torch.Tensor], rows: int, choices: int) -> dict[str, torch.Tensor]:
    """Add spare rows up to `rows` examples; the last is the guard, one token long."""
    count = inputs["input_ids"].shape[0] // choices
    spare = (rows - count) * choices
    filled = {name: torch.cat([t, t[:1].expand(spare, -1)]) for name, t in inputs.items()}
    mask = filled["attention_mask"].clone()
    mask[-choices:, 1:] = 0
    filled["attention_mask"] = mask
    return filled


def batch_inputs(
    tokens: TokenTable,
    rows_P: np.ndarray,
    length: int,
    device: torch.device,
    free_from: int | None,
) -> dict[str, torch.Tensor]:
    """Model inputs of these examples, filled up to the rows that their bits ask for."""
    rows = rows_per_batch(length, device.type)
    inputs = tokens.pad(rows_P, length)
    if free_from is not None:
        guard = int(inputs["attention_mask"].all())
        rows = min(rows, max(free_from, len(rows_P) + guard))
    if rows > len(rows_P):
        inputs = fill(inputs, rows, tokens.choices)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def own_logits(logits: torch.Tensor, part_P: np.ndarray, choices: int) -> np.ndarray:
    """logits_PC of a batch's examples, float32, without the spare rows.

    Raises NotFiniteError.
    """
    count = len(part_P)
    logits_PC = logits[: count * choices].float().reshape(count, -1).cpu()
    finite_P = torch.isfinite(logits_PC).all(dim=1)
    if not bool(finite_P.all()):
        raise NotFiniteError(int(part_P[int((~finite_P).nonzero()[0])]))
    return logits_PC.numpy()


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokens: TokenTable,
    rows_R: np.ndarray,
    device: torch.device,
    longest: int,
    free_from: int | None,
    done: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    """Own-order logits of these examples, handed to `done(positions in rows_R, logits)` batch by
    batch. longest: the model's position limit; free_from: fewest rows of a batch whose bits do
    not depend on the row count, None where only the fixed counts are safe.

    Raises NotFiniteError.
    """
    lengths_R = tokens.lengths_B()[rows_R]
    for part_P, length in cut_into_batches(lengths_R, device.type, longest):
        inputs = batch_inputs(tokens, rows_R[part_P], length, device, free_from)
        done(part_P, own_logits(model(**inputs).logits, part_P, tokens.choices))


def probe_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same widths with one layer and few words: cheap to run, the same kernels."""
    probe = copy.deepcopy(config)
    probe.num_hidden_layers = 1
    if hasattr(probe, "vocab_size"):
        probe.vocab_size = max(128, (getattr(probe, "pad_token_id", 0) or 0) + 1)
    return probe


@torch.inference_mode()
def free_rows_from(
    config: PretrainedConfig, dtype: str, device: torch.device, weights: str | None = None
) -> int | None:
    """Self-check: the fewest rows from which a batch's bits do not depend on how many rows it has,
    on this backend with its present threads; None when they do depend.

    Compares one-layer models of the teacher's widths against the full fixed shape on one thread.
    """
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(1)
    batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = new_classifier(probe_config(config)).to(device, DTYPES[dtype]).eval()
            if weights is not None:
                quantize(model)
        torch.set_num_threads(1)
        for length in CHECK_LENGTHS:
            full = rows_per_batch(length, device.type)
            ids = torch.randint(3, 100, (full, length), generator=generator)
            inputs = fill({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, full, 1)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            batches.append((inputs, model(**inputs).logits))
    except Exception:  # what cannot be cut down, or answers real text only, runs at fixed shapes
        return None
    finally:
        torch.set_num_threads(threads)
    free_from: int | None = None
    for rows in CHECK_ROWS:
        for inputs, expected in batches:
            keep = torch.cat([torch.arange(rows - 1), torch.tensor([len(expected) - 1])]).to(device)
            seen = model(**{name: tensor[keep] for name, tensor in inputs.items()}).logits
            if not torch.equal(seen, expected[keep]):
                return free_from
        free_from = rows if rows <= FREE_ROWS_MOST else None
    return free_from
