"""A causal language model that Transformers loads, as a teacher. Its score of a class is how
probable it makes the words of the class behind a prompt.

A word's score is the sum of its tokens' log-probabilities. A class's score is the logsumexp of its
words' scores. Words share forwards. A stem is all tokens of a word but the last. The model reads
the prompt and a stem, and the log-probabilities of the next token are read at each place behind the
prompt.

A CPU computes each row alone and without padding. A GPU computes a fixed number of rows of one
padded length, which follows from the row's own length. So a score does not depend on other rows.
(Invariant 3; our own scheme.)

Shapes: R text rows, W words, K classes of the entry, S stems, J places behind a prompt, T tokens of
the words, P places of a batch.
"""

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from sead_dist.errors import UserError, reading, reason
from sead_dist.models.inputs_check import LEAST, TOLERANCE
from sead_dist.models.loaded import reject_leftovers
from sead_dist.models.pretrained import (
    COPY,
    NO_EFFECT,
    Checkpoint,
    check_vocabulary,
    code_hash,
    locate,
    position_limit,
    tokenizer_hash,
    weight_files,
)
from sead_dist.models.sequence_classifier import DTYPES
from sead_dist.runtime.files import files_hash
from sead_dist.teachers.prompts import Opening, Prompt, Reader, Texts, Words, read_prompt, rows_of

# rows of a GPU's batch, and the step of its padded lengths
GPU_ROWS, GPU_STEP = 32, 32
# the name of this scheme, in the numerics class and in the fingerprint
SCHEME = "words-1"
# comes before a chat template: one that writes today's date would give other logits tomorrow
ONE_DAY = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"
NO_CAUSAL = "give a causal language model, or {path: ...} for a classifier"


@dataclass(frozen=True)
class Source:
    """Where a model lies. gguf: the name of its GGUF file in the folder; None for other formats."""

    checkpoint: Checkpoint
    gguf: str | None

    @property
    def load_arguments(self) -> dict[str, Any]:
        """The arguments with which `from_pretrained` finds it."""
        more = {} if self.gguf is None else {"gguf_file": self.gguf}
        folder = str(self.checkpoint.folder)
        return {"pretrained_model_name_or_path": folder, "local_files_only": True, **more}

    def weights_hash(self) -> str:
        files = (
            weight_files(self.checkpoint)
            if self.gguf is None
            else [self.checkpoint.folder / self.gguf]
        )
        return files_hash(files)


def find_model(path: str, revision: str | None) -> Source:
    """The model at `path`: a folder, a hub id, a GGUF file, a folder with one GGUF file, or a GGUF
    file of the hub (OWNER/NAME/FILE.gguf).

    Raises UserError where there is no such model, and for a GGUF file where the package gguf is not
    installed.
    """
    place = Path(path)
    if place.is_dir() and not (place / "config.json").is_file():
        files = sorted(place.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(
                f"{path} holds {len(files)} GGUF files; give one of them, such as {files[0]}"
            )
        place = files[0] if files else place
    if place.suffix != ".gguf":
        return Source(locate(path, revision), None)
    parts = [] if place.is_file() else _hub_parts(path)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{path} is a GGUF file, and gguf is not installed; pip install 'sead-dist[gguf]'"
        )
    if parts:
        place = _from_hub(path, parts, revision)
    return Source(Checkpoint(path, place.parent, revision), place.name)


def _hub_parts(path: str) -> list[str]:
    """OWNER, NAME and FILE of a GGUF file of the hub. Raises UserError for any other path."""
    parts = path.split("/")
    if len(parts) != 3 or path.startswith(("/", ".")):
        raise UserError(f"{path} does not exist; give a GGUF file, or OWNER/NAME/FILE.gguf")
    return parts


def _from_hub(path: str, parts: list[str], revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], revision=revision))
    except Exception as error:
        raise UserError(
            f"{path} is neither a file nor reachable on the hub: {type(error).__name__}; give a "
            "file that exists, or check the id and the network"
        ) from error


class Continuations:
    """The token sequences that are forwarded behind a prompt, and where the tokens of each word are
    read.

    stems: the sequences; none is the beginning of another. read_W: for each word its stem, and for
    each of its tokens (place behind the prompt, number in `tokens`).
    """

    def __init__(self, words_W: Sequence[tuple[int, ...]]) -> None:
        heads = {word[:-1] for word in words_W}
        self.stems = sorted(
            head
            for head in heads
            if not any(other != head and other[: len(head)] == head for other in heads)
        )
        self.places = 1 + max(map(len, self.stems))
        self.tokens = sorted({token for word in words_W for token in word})
        self.read_W = [
            (
                next(n for n, stem in enumerate(self.stems) if stem[: len(word) - 1] == word[:-1]),
                [(place, self.tokens.index(token)) for place, token in enumerate(word)],
            )
            for word in words_W
        ]

    def scores(self, logp_RSJT: np.ndarray) -> np.ndarray:
        """score_RW, summed in double precision."""
        of_words = [
            sum(logp_RSJT[:, stem, place, token].astype(np.float64) for place, token in read)
            for stem, read in self.read_W
        ]
        return np.stack(of_words, axis=1)


class LanguageModel:
    """A language model as a teacher (`kinds.Answers`). Its weights are read at the first call of
    `answer`.

    parameters: number of its weights without the embeddings of words. bytes: of all its weights.
    """

    # rows between two reports of progress
    at_once = 32

    def __init__(
        self,
        opening: Opening,
        source: Source,
        outline: PreTrainedModel,
        reader: Reader,
        words: Words,
        weights: str,
        fingerprint: str,
    ) -> None:
        config = opening.config
        self.name, self.device, self.source = opening.name, opening.device, source
        self.dtype = opening.entry.dtype or config.teacher_precision
        self.trust_remote_code = config.trust_remote_code
        self.calibrated = opening.entry.contextual_calibration
        self.reader, self.words, self.continuations = reader, words, Continuations(reader.words_W)
        self.weights_sha256, self.fingerprint = weights, fingerprint
        self.labels: Sequence[str] = words.labels
        self.max_length = reader.limit
        whole, embeddings = outline.num_parameters(), outline.get_input_embeddings()
        self.parameters = whole - embeddings.weight.numel()
        self.bytes = whole * DTYPES[self.dtype].itemsize
        self.model: PreTrainedModel | None = None
        self.empty_K: np.ndarray | None = None

    def answer(self, texts_a: list[str], texts_b: list[str] | None) -> np.ndarray:
        """The logits_RK.

        Raises RunError where the prompt of a row cannot be distinguished from the words, and
        UserError where the weights cannot be used.
        """
        prompts = [self.reader.prompt(texts) for texts in rows_of(texts_a, texts_b)]
        if self.model is None:
            self.model = self._load()
            self._check(self.model, max(prompts, key=len))
        logits_RK = self._logits(self.model, prompts)
        if self.calibrated:
            if self.empty_K is None:
                (bare_K,) = self._logits(self.model, [self.reader.prompt(Texts("", ""))])
                self.empty_K = bare_K - np.logaddexp.reduce(bare_K)
            logits_RK = logits_RK - self.empty_K
        return logits_RK.astype(np.float32)

    def _logits(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> np.ndarray:
        return self.words.of_classes(
            self.continuations.scores(self._log_probabilities(model, prompts))
        )

    def _load(self) -> PreTrainedModel:
        with reading(self.source.checkpoint.folder, COPY, f"teacher {self.name}: its weights"):
            model, info = AutoModelForCausalLM.from_pretrained(
                **self.source.load_arguments,
                dtype=DTYPES[self.dtype],
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise UserError(
                f"teacher {self.name}: its files lack the weights "
                f"{', '.join(sorted(info['missing_keys'])[:3])}; {NO_CAUSAL}"
            )
        reject_leftovers(f"teacher {self.name}", model, info["unexpected_keys"])
        return model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def _log_probabilities(
        self, model: PreTrainedModel, prompts: Sequence[list[int]]
    ) -> np.ndarray:
        """The logp_RSJT behind each prompt and stem; 0 at the places that a stem does not have."""
        behind, on_gpu = self.continuations, self.device.type == "cuda"
        found_RSJT = np.zeros(
            (len(prompts), len(behind.stems), behind.places, len(behind.tokens)), np.float32
        )
        by_length: dict[int, list[tuple[int, int]]] = {}
        for row, prompt in enumerate(prompts):
            for stem, more in enumerate(behind.stems):
                tokens = len(prompt) + len(more)
                # on a GPU each row has padding, since a batch without padding would get other
                # kernels
                length = (tokens // GPU_STEP + 1) * GPU_STEP if on_gpu else tokens
                by_length.setdefault(length, []).append((row, stem))
        rows = GPU_ROWS if on_gpu else 1
        for length, jobs in sorted(by_length.items(), reverse=True):
            for start in range(0, len(jobs), rows):
                part = jobs[start : start + rows]
                sequences = [[*prompts[row], *behind.stems[stem]] for row, stem in part]
                sequences += [sequences[0]] * (rows - len(part))
                at = [
                    (n, row, stem, place, len(prompts[row]) - 1 + place)
                    for n, (row, stem) in enumerate(part)
                    for place in range(len(behind.stems[stem]) + 1)
                ]
                batch_P, row_P, stem_P, place_P, position_P = np.array(at).T
                last = GPU_STEP if on_gpu else 0
                logits, skipped = self._forward(model, sequences, length, last + behind.places)
                logp_PV = torch.log_softmax(logits[batch_P, position_P - skipped].float(), dim=-1)
                found_RSJT[row_P, stem_P, place_P] = logp_PV[:, behind.tokens].cpu().numpy()
        return found_RSJT

    def _forward(
        self, model: PreTrainedModel, sequences: Sequence[list[int]], length: int, last: int
    ) -> tuple[torch.Tensor, int]:
        """(logits of the last places of these sequences, how many places before them were left
        out).

        Padding is on the right, where it does not change the logits of a causal model.
        """
        ids = torch.zeros(len(sequences), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, sequence in enumerate(sequences):
            ids[n, : len(sequence)] = torch.tensor(sequence)
            mask[n, : len(sequence)] = 1
        more = {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            more["logits_to_keep"] = min(last, length)
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        logits = model(**inputs, use_cache=False, **more).logits
        return logits, length - logits.shape[1]

    @torch.inference_mode()
    def _check(self, model: PreTrainedModel, prompt: list[int]) -> None:
        """Raises UserError where the scores of this row differ from those of plain Transformers,
        which gets each word alone behind the prompt."""
        ours_W = self.continuations.scores(self._log_probabilities(model, [prompt]))[0]
        plain_W = []
        for word in self.reader.words_W:
            ids = torch.tensor([[*prompt, *word]], device=self.device)
            logp_LV = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
            places = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=self.device)
            plain_W.append(float(logp_LV[places, ids[0, len(prompt) :]].double().sum()))
        if not np.isfinite(plain_W).all():
            return  # the error is raised later, with the row
        dtype = DTYPES[self.dtype]
        most = max(float(np.abs(plain_W).max()) * TOLERANCE[dtype], LEAST[dtype])
        if np.abs(ours_W - plain_W).max() > most:
            raise UserError(
                f"teacher {self.name}, a {model.config.model_type}, gives a word another "
                f"probability where more words follow, so it is not causal; {NO_CAUSAL}"
            )


def open_language_model(opening: Opening) -> LanguageModel:
    """The language model of an entry. All but its weights is checked. Raises UserError."""
    entry, name, trust = opening.entry, opening.name, opening.config.trust_remote_code
    prompt, words = read_prompt(opening)
    source = find_model(entry.path, entry.revision)
    with reading(source.checkpoint.folder, COPY, f"teacher {name}: its config"):
        config = AutoConfig.from_pretrained(**source.load_arguments, trust_remote_code=trust)
    _check_causal(name, config)
    with reading(source.checkpoint.folder, COPY, f"teacher {name}: its tokeniser"):
        tokenizer = AutoTokenizer.from_pretrained(**source.load_arguments, trust_remote_code=trust)
        tokens = tokenizer_hash(tokenizer)
    if not tokenizer.is_fast:
        raise UserError(
            f"teacher {name}: its tokeniser is a slow one, which does not give the places of "
            "tokens in a text; save it as a fast one (tokenizer.json)"
        )
    check_vocabulary(entry.path, tokenizer, config)
    with (
        reading(source.checkpoint.folder, NO_CAUSAL, f"teacher {name}: its model"),
        torch.device("meta"),
    ):
        outline = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    if entry.chat and not tokenizer.chat_template:
        raise UserError(
            f"teacher {name} has chat: true, but its tokeniser has no chat template; leave chat out"
        )
    render = partial(_in_chat, name, tokenizer, prompt) if entry.chat else prompt.text
    marks = [] if entry.chat else _marks(tokenizer)
    reader = Reader(tokenizer, render, marks, words, name)
    # padding on a GPU takes one more position
    limit = (position_limit(config) or 1 << 30) - 1
    wanted = entry.max_length or reader.fixed + opening.config.max_length
    key = "max_length" if wanted <= limit else "the model's limit"
    reader.set_limit(min(wanted, limit), key)
    weights = source.weights_hash()
    shape = {key: fact for key, fact in config.to_dict().items() if key not in NO_EFFECT}
    facts = [
        SCHEME, weights, shape, tokens, reader.limit, render(Texts("\0", "\1")),
        [list(shot) for shot in prompt.shots], words.labels, words.words_W, words.class_W.tolist(),
        entry.contextual_calibration,
        code_hash(source.checkpoint, type(config), type(tokenizer), type(outline)),
    ]  # fmt: skip
    text = json.dumps(facts, sort_keys=True, default=str)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return LanguageModel(opening, source, outline, reader, words, weights, fingerprint)


def _check_causal(name: str, config: PretrainedConfig) -> None:
    kinds = getattr(config, "architectures", None) or []
    if kinds and not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
        raise UserError(f"teacher {name} is a {kinds[0]}, which is not causal; {NO_CAUSAL}")


def _marks(tokenizer: Any) -> list[int]:
    """The token that the tokeniser puts before every text; empty where there is none."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _in_chat(name: str, tokenizer: Any, prompt: Prompt, texts: Texts) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                prompt.messages(texts),
                chat_template=ONE_DAY + tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except Exception as error:  # a template is a program and may raise any error
        raise UserError(
            f"teacher {name}: its chat template fails on the prompt: {reason(error)}; leave chat "
            "out"
        ) from error
