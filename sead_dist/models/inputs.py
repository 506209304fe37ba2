"""What a model is fed: `ModelInputs` determines it for students and teachers alike.

Training, teachers, packs, feature losses, `evaluate`, `predict` and the export take tokens, padding
and check rows from it. None of them determines any of these. `inputs_check.py` finds the padding.
`data/tokens.py` turns texts into tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from sead_dist.config.rules import INPUT_RULES
from sead_dist.data.examples import ExampleSet
from sead_dist.data.order import Split, make_split
from sead_dist.data.tokens import TokenTable, tokenize
from sead_dist.errors import UserError
from sead_dist.models.inputs_check import (
    CheckRows,
    Padding,
    fitting_length,
    padded,
    padding_of,
    probe_rows,
    probed_padding,
    probes_alone,
    real_rows,
    reset_attention,
)
from sead_dist.models.pretrained import OFFSET_POSITIONS, position_limit, tokenizer_hash

# most tokens of a row for a model that sets no limit of its own
LONGEST = 512


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """What one model is fed.

    tokenizer: in agreement with the model's config (`settle`). tokenizer_hash: a hash of what the
    tokeniser does to texts. max_length: most tokens of a row, within the model's positions.
    padding: the side on which rows are padded, or "none" where a batch has rows of one length only.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    max_length: int
    padding: Padding

    @property
    def key(self) -> tuple[str, int]:
        """Inputs with equal keys turn a text into equal tokens."""
        return self.tokenizer_hash, self.max_length

    @property
    def pad_id(self) -> int:
        """The token that fills a row up."""
        return int(self.tokenizer.pad_token_id)

    def facts(self) -> tuple[list[Any], list[Any]]:
        """The parts of this that a prediction depends on: (always, only where rows are not padded
        on the right). Padding on the right adds nothing, since version 1 of the rules of input
        padded so too."""
        always: list[Any] = [self.tokenizer_hash, self.max_length]
        if self.padding == "right":
            return always, []
        return always, [{"padding": self.padding, "rules of input": INPUT_RULES}]

    def tokens(self, examples: ExampleSet) -> TokenTable:
        """The tokens of the examples. Raises UserError for a text without a token."""
        return tokenize(self.tokenizer, examples, self.max_length)

    def split(self, examples: ExampleSet) -> Split:
        """The examples with their tokens. Raises UserError for a text without a token."""
        return make_split(examples, self.tokenizer, self.max_length)

    def probe_rows(self, device: torch.device) -> CheckRows:
        """Fixed texts, to check a model that is loaded without data."""
        return probe_rows(self.tokenizer, self.max_length, device)

    def real_rows(
        self, examples: ExampleSet, device: torch.device, tokens: TokenTable | None = None
    ) -> CheckRows:
        """Rows of the run on which a model is checked. tokens: those of all examples, if they exist
        already."""
        return real_rows(self.tokenizer, examples, self.max_length, device, tokens)

    def two_rows(self) -> list[dict[str, torch.Tensor]]:
        """Two fixed texts of different lengths, each in a batch of its own."""
        return probes_alone(self.tokenizer, self.max_length)[:2]

    def together(
        self, rows: Sequence[dict[str, torch.Tensor]], pad_id: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Rows from `two_rows` as one batch. pad_id: the padding id of a model whose ids were
        renumbered; None: the tokeniser's."""
        filler = self.pad_id if pad_id is None else pad_id
        return padded(rows, self.padding, filler, int(self.tokenizer.pad_token_type_id))

    def save(self, folder: Path) -> None:
        """Save the tokeniser as Transformers reads it. It cuts texts to `max_length`."""
        self.tokenizer.model_max_length = self.max_length
        # a teacher with the same tokeniser may have set another length last
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.enable_truncation(self.max_length)
        self.tokenizer.save_pretrained(folder)

    def save_alone(self, folder: Path) -> None:
        """Save the tokeniser with a tokenizer.json that truncates and pads by itself. So the
        package `tokenizers` alone can make the model's inputs."""
        self.tokenizer.save_pretrained(folder)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokeniser written in Python needs Transformers
            return
        alone = Tokenizer.from_str(backend.to_str())
        alone.enable_truncation(self.max_length)
        alone.enable_padding(
            direction=self.padding,
            pad_id=self.tokenizer.pad_token_id,
            pad_type_id=self.tokenizer.pad_token_type_id,
            pad_token=self.tokenizer.pad_token,
        )
        alone.save(str(folder / "tokenizer.json"))


def settle(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Make tokeniser and config agree on the inputs, whatever their files hold.

    A model with segments gets the segment ids of the tokeniser's template. A model that reads its
    last token finds it by the padding id. So the config takes the tokeniser's padding id.
    """
    names = list(tokenizer.model_input_names)
    if (getattr(config, "type_vocab_size", None) or 0) > 1 and "token_type_ids" not in names:
        _set(tokenizer, "model_input_names", [*names, "token_type_ids"])
    # where positions count from the padding id, that id is part of the weights, and stays
    if config.model_type not in OFFSET_POSITIONS:
        config.pad_token_id = tokenizer.pad_token_id


def teacher_inputs(
    tokenizer: PreTrainedTokenizerBase, words: str, config: PretrainedConfig, max_length: int
) -> ModelInputs:
    """The inputs of a teacher with this config, before its weights are read. words: the tokeniser's
    hash. max_length: the length that the key gives."""
    longest = fitting_length(max_length, config)
    return ModelInputs(tokenizer, words, longest, probed_padding(tokenizer, config, longest))


def student_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str,
    examples: ExampleSet | None,
) -> ModelInputs:
    """The inputs of a student, or of a finished model. The side on which rows are padded is found
    by a check of the model itself. It is set in the tokeniser, which is saved with the model.
    examples: those of the run, of which the check takes a few; None where there are none. Raises
    UserError for a model whose logits change under any padding."""
    length = fitting_length(max_length, model.config)
    reset_attention(model)
    if examples is None:
        rows = probe_rows(tokenizer, length, model.device)
    else:
        rows = real_rows(tokenizer, examples, length, model.device)
    was_training, kind = model.training, model.config.model_type
    try:
        # random weights may show a difference that these weights hide
        padding = probed_padding(tokenizer, model.config, max_length)
        if padding != "none":
            padding = padding_of(model.eval(), rows, padding)
        reason = "its logits change with the padding of a batch"
    except UserError as error:
        padding, reason = "none", str(error)
    finally:
        model.train(was_training)
    if padding == "none":
        raise UserError(
            f"{name} is a {kind}, and {reason}, so in training a text would get other logits "
            "than alone; give a model of another kind (BERT, RoBERTa, ELECTRA, DeBERTa)"
        )
    _set(tokenizer, "padding_side", padding)
    return ModelInputs(tokenizer, tokenizer_hash(tokenizer), length, padding)


def own_length(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """The most tokens of a row of a finished model: the tokeniser's limit, within the model's
    positions."""
    own, limit = int(tokenizer.model_max_length), position_limit(config)
    if limit is not None:
        return min(own, limit)
    # a tokeniser without a limit has a very large number instead
    return own if own < VERY_LARGE_INTEGER else LONGEST


def first_position(config: PretrainedConfig) -> int:
    """The position of a row's first token."""
    return int(config.pad_token_id) + 1 if config.model_type in OFFSET_POSITIONS else 0


def _set(tokenizer: PreTrainedTokenizerBase, name: str, value: Any) -> None:
    """Set an attribute of a tokeniser, also in what it saves: it saves the arguments that it was
    made with."""
    setattr(tokenizer, name, value)
    tokenizer.init_kwargs[name] = value
