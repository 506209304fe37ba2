"""One teacher's forward pass. Its result depends on the teacher and the example alone.

A row is padded to a length that is a function of its own token count. Some row of every batch is
shorter than the batch, so that a kernel for unpadded batches is never chosen. Each length has a
fixed row count. Spare rows fill a batch up to it, and their results are dropped. The last spare row
is one token long and is called the guard.

`free_rows_from` finds whether bits depend on the row count on this backend. Where they do not,
batches are filled only up to the count that it found, and get a guard only where no row of theirs
is shorter. Where `packing.packs_from` finds that the model takes packs, nothing is padded. Where
padding changes a model's logits, a batch has rows of one length and no guard. (Invariant 3; our
own scheme.)

Shapes: R rows of a request, P rows of one batch (or their positions in the request), C the model's
own classes, L tokens, H hidden.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.data.tokens import TokenTable
from sead_dist.errors import UserError
from sead_dist.models.inputs_check import Padding, shallow
from sead_dist.models.pretrained import position_limit
from sead_dist.models.sequence_classifier import DTYPES, by_example, new_classifier
from sead_dist.teachers.packing import SIZES, TOKENS_PER_ROW, cut_into_packs, pack_inputs


@dataclass(frozen=True)
class BatchShapes:
    """The shapes of batches on a kind of device.

    name: part of the numerics class; it changes with whatever determines bits. step: of padded
    lengths up to 64 tokens. tokens: of a batch at most, within `least` and `most` rows. counts: the
    row counts that may replace the full one where bits do not depend on it. any_count: the counts
    between those may do so as well. check_lengths: the lengths that the self-check tries.
    free_most: the self-check fails where bits are equal only from more rows on.
    """

    name: str
    step: int
    tokens: int
    least: int
    most: int
    counts: tuple[int, ...]
    any_count: bool
    check_lengths: tuple[int, ...]
    free_most: int


SHAPES = {
    # every remainder that the splits over threads and vectors can leave
    "cpu": BatchShapes(
        "shapes-1-cpu", 2, 4096, 16, 64,
        (*range(2, 24), 25, 27, 29, 31, 32, 33, 39, 47, 63), True, (2, 16), 16,
    ),
    # kernels are chosen by thresholds of rows, so only the checked counts are used
    "cuda": BatchShapes(
        "shapes-2-cuda", 8, 65536, 32, 512,
        (32, 64, 96, 128, 192, 256, 320, 384, 448), False, (8, 16, 24, 32, 64, 128, 256, 512), 512,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How a teacher's rows are cut into batches.

    longest: the teacher's position limit in tokens. free_rows: fewest rows of a batch whose bits do
    not depend on the row count; None where only the full counts are safe. pack_from: fewest tokens
    of a pack; None where batches are padded. padding: the side, or "none" where only rows of one
    length share a batch.
    """

    longest: int
    free_rows: int | None
    pack_from: int | None = None
    padding: Padding = "right"

    def full_rows(self, lengths: np.ndarray, device: str) -> np.ndarray:
        """The most rows of a batch, for texts of each of these lengths."""
        if self.pack_from is not None:
            return SIZES[-1] // np.maximum(lengths.astype(np.int64), TOKENS_PER_ROW)
        return np.array([rows_per_batch(int(length), device) for length in lengths], np.int64)


class NotFiniteError(Exception):
    """A teacher's logits for one row are NaN or infinite. position: of this row among those
    of the request."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def padded_length(tokens: np.ndarray, device: str) -> np.ndarray:
    """Token counts rounded up: to the device's step up to 64 tokens, to multiples of 8 beyond."""
    step = SHAPES[device].step
    return np.where(tokens <= 64, -(-tokens // step) * step, -(-tokens // 8) * 8)


def rows_per_batch(length: int, device: str) -> int:
    """The full row count of a padded length on a kind of device."""
    shapes = SHAPES[device]
    return max(shapes.least, min(shapes.most, shapes.tokens // length))


def rows_for(count: int, length: int, device: str, free_from: int | None) -> int:
    """The row count of a batch. count: its examples and its guard, if it has one."""
    full, shapes = rows_per_batch(length, device), SHAPES[device]
    if free_from is None:
        return full
    wanted = max(free_from, count)
    if not shapes.any_count:
        wanted = next((rows for rows in shapes.counts if rows >= wanted), full)
    return min(full, wanted)


def cut_into_batches(
    lengths_R: np.ndarray, device: str, longest: int, padding: Padding = "right"
) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, padded length) of each batch. The longest come first, so that memory peaks at the
    start."""
    padded_R = np.minimum(padded_length(lengths_R, device), max(longest, 2))
    if padding == "none":
        padded_R = lengths_R
    for length in np.unique(padded_R)[::-1]:
        rows = np.flatnonzero(padded_R == length)
        # every batch leaves one row free for a guard
        room = rows_per_batch(int(length), device) - 1
        for part in np.array_split(rows, -(-len(rows) // room)):
            yield part, int(length)


def fill(
    inputs: dict[str, torch.Tensor], rows: int, choices: int, padding: Padding = "right"
) -> dict[str, torch.Tensor]:
    """Add spare rows up to `rows` examples. The last one is the guard, one token long, unless
    `padding` is "none"."""
    count = inputs["input_ids"].shape[0] // choices
    spare = (rows - count) * choices
    filled = {name: torch.cat([t, t[:1].expand(spare, -1)]) for name, t in inputs.items()}
    if padding != "none":
        mask = filled["attention_mask"].clone()
        mask[-choices:, slice(0, -1) if padding == "left" else slice(1, None)] = 0
        filled["attention_mask"] = mask
    return filled


def batch_inputs(
    tokens: TokenTable,
    rows_P: np.ndarray,
    length: int,
    device: torch.device,
    cut: Cut,
) -> dict[str, torch.Tensor]:
    """Model inputs of these examples, filled up to the row count that keeps their bits."""
    inputs = tokens.pad(rows_P, length, cut.padding)
    guard = int(inputs["attention_mask"].all()) if cut.padding != "none" else 0
    rows = rows_for(len(rows_P) + guard, length, device.type, cut.free_rows)
    if rows > len(rows_P):
        inputs = fill(inputs, rows, tokens.choices, cut.padding)
    return to_device(inputs, device)


def batches_of(
    tokens: TokenTable,
    rows_R: np.ndarray,
    device: torch.device,
    cut: Cut,
    config: PretrainedConfig,
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """(positions in rows_R, model inputs on the device) of each batch of these examples."""
    if cut.pack_from is not None:
        for part_P, size in cut_into_packs(tokens, rows_R, cut.pack_from):
            pack = pack_inputs(tokens, rows_R[part_P], size, config)
            yield part_P, to_device(pack, device)
        return
    lengths_R = tokens.lengths_B()[rows_R]
    for part_P, length in cut_into_batches(lengths_R, device.type, cut.longest, cut.padding):
        yield part_P, batch_inputs(tokens, rows_R[part_P], length, device, cut)


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same inputs, with tensors on the device.

    A GPU copies them after its earlier work. The host does not wait for a copy from pinned memory.
    """
    on_gpu = device.type == "cuda"
    return {
        name: (value.pin_memory() if on_gpu else value).to(device, non_blocking=on_gpu)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }


def host_copy(logits: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that gives the same logits on the host. A GPU can get more work before it is
    called."""
    if logits.device.type != "cuda":
        return lambda: logits
    copy_of = logits.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def waited() -> torch.Tensor:
        copied.synchronize()
        return copy_of

    return waited


def own_logits(logits: torch.Tensor, part_P: np.ndarray, choices: int) -> np.ndarray:
    """The logits_PC of a batch's examples, float32, without the spare rows.

    Raises NotFiniteError.
    """
    count = len(part_P)
    logits_PC = by_example(logits[: count * choices].float(), choices).cpu()
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
    cut: Cut,
    done: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    """Compute the own-order logits of these examples, batch by batch.

    Each batch is passed to `done(positions in rows_R, logits)` after the next one was started.

    Raises NotFiniteError.
    """
    before: tuple[np.ndarray, Callable[[], torch.Tensor]] | None = None
    for part_P, inputs in batches_of(tokens, rows_R, device, cut, model.config):
        now = part_P, host_copy(model(**inputs).logits)
        if before is not None:
            done(before[0], own_logits(before[1](), before[0], tokens.choices))
        before = now
    if before is not None:
        done(before[0], own_logits(before[1](), before[0], tokens.choices))


def probe_config(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same widths with one layer and few words: cheap to run, with the same
    kernels."""
    probe = shallow(config, layers=1)
    if hasattr(probe, "vocab_size"):
        probe.vocab_size = max(128, (getattr(probe, "pad_token_id", 0) or 0) + 1)
    return probe


@torch.inference_mode()
def free_rows_from(
    config: PretrainedConfig, dtype: str, device: torch.device, weights: str | None = None
) -> int | None:
    """Self-check: the fewest rows from which a batch's bits do not depend on its row count.

    The number holds for this backend with its present number of threads. None: bits do depend on
    it. A one-layer model of the teacher's widths is compared with itself at the full fixed shape on
    one thread.
    """
    threads, shapes = torch.get_num_threads(), SHAPES[device.type]
    longest = position_limit(config) or 1 << 30
    generator = torch.Generator().manual_seed(1)
    batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = new_classifier(probe_config(config)).to(device, DTYPES[dtype]).eval()
            if weights is not None:
                quantize(model)
        torch.set_num_threads(1)
        for length in (each for each in shapes.check_lengths if each <= longest):
            full = rows_per_batch(length, device.type)
            ids = torch.randint(3, 100, (full, length), generator=generator)
            inputs = fill({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, full, 1)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            batches.append((inputs, model(**inputs).logits))
    except Exception:  # a model that cannot be made small, or needs real text, runs at fixed shapes
        return None
    finally:
        torch.set_num_threads(threads)
    free_from: int | None = None
    if not batches:
        return None
    for rows in reversed(shapes.counts):
        for inputs, expected in batches:
            if rows >= len(expected):
                continue
            keep = torch.cat([torch.arange(rows - 1), torch.tensor([len(expected) - 1])]).to(device)
            seen = model(**{name: tensor[keep] for name, tensor in inputs.items()}).logits
            if not torch.equal(seen, expected[keep]):
                return free_from
        free_from = rows if rows <= shapes.free_most else None
    return free_from


def check_quantize(teacher: str) -> None:
    """Raises UserError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"teacher {teacher}: quantization=int8 needs torchao, which is not installed; "
            "pip install 'sead-dist[quantize]', or leave quantization out"
        )


def quantize(model: PreTrainedModel) -> None:
    """Keep the weights of all linear layers in int8 with a scale for each output row, in place.

    Embeddings, norms, biases and arithmetic keep their dtype. This needs torchao (the extra
    `quantize`).
    """
    # imported here: Transformers imports torchao too where it is installed, which takes over a
    # second
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
