"""Texts to tokens: the rows of an example set as a tokeniser makes them, and as tensors.

`ModelInputs` (models/inputs.py) calls this, and sets what a model is fed.

Shapes: B examples, K text rows per example, L tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sead_dist.data.examples import ExampleSet
from sead_dist.errors import UserError
from sead_dist.runtime.console import counted

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenTable:
    """The tokens of many text rows, one row after the other: row i is ids[offsets[i]:offsets[i+1]].

    types: the segment of each token; None where the tokeniser gives none. choices: K, the text rows
    of an example. pad_id, pad_type: what a padded place holds. cut: the numbers of the text rows
    that lost tokens to the maximum length. side: where the tokeniser pads, left or right.
    """

    ids: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    choices: int
    pad_id: int
    pad_type: int
    cut: np.ndarray
    side: str = "right"

    @property
    def truncated(self) -> int:
        """How many text rows lost tokens."""
        return len(self.cut)

    def cut_of(self, rows: slice = slice(None)) -> tuple[int, int]:
        """(how many text rows lost tokens, how many there are) of the examples in a slice."""
        first, after, _ = rows.indices((len(self.offsets) - 1) // self.choices)
        first, after = first * self.choices, after * self.choices
        return int(((self.cut >= first) & (self.cut < after)).sum()), after - first

    def lengths_B(self) -> np.ndarray:
        """The number of tokens of each example's longest text row."""
        rows = np.diff(self.offsets).reshape(-1, self.choices)
        return rows.max(axis=1) if len(rows) else np.zeros(0, np.int64)

    def pad(
        self, rows_B: np.ndarray, length: int, side: str | None = None
    ) -> "dict[str, torch.Tensor]":
        """Model inputs [B*K, length] of the examples with the numbers rows_B.

        length: at least that of the longest row. side: where to pad; None: as the tokeniser does.
        """
        import torch  # data are read without it

        flat = (rows_B[:, None] * self.choices + np.arange(self.choices)).reshape(-1)
        counts = (self.offsets[flat + 1] - self.offsets[flat])[:, None]
        columns = np.arange(length)[None, :]
        if (side or self.side) == "left":
            columns = columns - (length - counts)
        mask = (columns >= 0) & (columns < counts)
        index = np.where(mask, self.offsets[flat][:, None] + columns, 0)
        inputs = {
            "input_ids": np.where(mask, self.ids[index], self.pad_id).astype(np.int64),
            "attention_mask": mask.astype(np.int64),
        }
        if self.types is not None:
            padded = np.where(mask, self.types[index], self.pad_type)
            inputs["token_type_ids"] = padded.astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in inputs.items()}


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", examples: ExampleSet, max_length: int
) -> TokenTable:
    """Every text row of `examples`, truncated to `max_length` tokens (longest text first).

    Raises UserError for a text without a token, and where `max_length` leaves room for none.
    """
    reject_no_room(tokenizer, examples.texts_b is not None, max_length)
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    cut: list[int] = []
    uses_types = "token_type_ids" in tokenizer.model_input_names
    for start in range(0, len(examples.texts_a), 4096):
        part = slice(start, start + 4096)
        encoded = tokenizer(
            examples.texts_a[part],
            examples.texts_b[part] if examples.texts_b is not None else None,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=uses_types,
            return_attention_mask=False,
        )
        lengths += [len(row) for row in encoded["input_ids"]]
        ids.append(np.array([i for row in encoded["input_ids"] for i in row], dtype=np.int32))
        if uses_types:
            flat = [i for row in encoded["token_type_ids"] for i in row]
            types.append(np.array(flat, dtype=np.int8))
        cut += [start + place for place in cut_rows(tokenizer, encoded, examples, part, max_length)]
    reject_tokenless(examples, lengths)
    return TokenTable(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        types=np.concatenate(types) if types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        choices=examples.choices,
        pad_id=int(tokenizer.pad_token_id),
        pad_type=int(tokenizer.pad_token_type_id),
        cut=np.array(cut, np.int64),
        side=str(tokenizer.padding_side),
    )


def cut_rows(
    tokenizer: "PreTrainedTokenizerBase",
    encoded: "BatchEncoding",
    examples: ExampleSet,
    part: slice,
    max_length: int,
) -> list[int]:
    """The places in `part` of the text rows that lost tokens to `max_length`.

    Tokenisers written in Python do not report that. They are called again without a limit, for the
    rows that have `max_length` tokens.
    """
    if encoded.encodings is not None:
        return [place for place, row in enumerate(encoded.encodings) if row.overflowing]
    full = [place for place, row in enumerate(encoded["input_ids"]) if len(row) >= max_length]
    if not full:
        return []
    texts_a = [examples.texts_a[part][place] for place in full]
    texts_b = examples.texts_b
    others = None if texts_b is None else [texts_b[part][place] for place in full]
    whole = tokenizer(texts_a, others, truncation=False, verbose=False)["input_ids"]
    return [place for place, row in zip(full, whole, strict=True) if len(row) > max_length]


def describe_cuts(counts: Mapping[str, tuple[int, int]], max_length: int) -> str | None:
    """A line on text rows that lost tokens; None where no row did. counts: of each split, as
    `TokenTable.cut_of` gives them."""
    if not any(cut for cut, _ in counts.values()):
        return None
    parts = ", ".join(f"{cut} of {rows} in {split}" for split, (cut, rows) in counts.items())
    return f"text rows cut at {max_length} tokens: {parts}"


def reject_no_room(tokenizer: "PreTrainedTokenizerBase", pairs: bool, max_length: int) -> None:
    """Raises UserError where the tokeniser's own tokens alone fill a row."""
    # in lists, because a second text "" alone would count as none
    own = len(tokenizer([""], [""] if pairs else None)["input_ids"][0])
    if max_length <= own:
        raise UserError(
            f"max_length={max_length} leaves no token for text: this tokeniser adds "
            f"{counted(own, 'token')} to every row; give max_length={own + 1} or more (128 is the "
            "default)"
        )


def reject_tokenless(examples: ExampleSet, lengths: Sequence[int]) -> None:
    """Raises UserError for a text of which the tokeniser makes no token at all."""
    if 0 in lengths:
        row = int(examples.rows_B[lengths.index(0) // examples.choices]) + 1
        raise UserError(
            f"row {row} of {examples.split} has a text without a token, and this tokeniser adds "
            "no special tokens; fill in its text, or remove the row"
        )


def adds_tokens(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether an empty text has tokens too."""
    return len(tokenizer("")["input_ids"]) > 0


def tokenless_row(part: ExampleSet, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The first example with a text row of which `tokenizer` makes no token; None where there is
    none. Texts with a letter or a digit are taken to have tokens."""
    for row, first in enumerate(part.texts_a):
        second = None if part.texts_b is None else part.texts_b[row]
        has_word = re.search(r"[^\W_]", first + (second or "")) is not None
        if not has_word and not tokenizer(first, second)["input_ids"]:
            return row // part.choices
    return None
