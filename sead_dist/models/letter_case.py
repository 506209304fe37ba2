"""A check that a tokeniser does not lower-case texts while words of its vocabulary have capitals.

Older folders have a vocabulary and no settings beside it. Transformers then lower-cases texts, so
that a cased model reads other words than those it was trained on.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sead_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
# the share of words with a capital is almost 0 in uncased vocabularies, a third in cased ones
SHARE = 0.01


def reject_lost_capitals(name: str, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises UserError where texts are lower-cased only because no file of the folder says
    otherwise, and words of the vocabulary have capitals. No text would give these words."""
    settings = folder / SETTINGS
    if (folder / "tokenizer.json").is_file() or not lower_cases(tokenizer):
        return
    if settings.is_file() and '"do_lower_case"' in settings.read_text(
        encoding="utf-8", errors="replace"
    ):
        return
    marks = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    words = sorted(word for word in tokenizer.get_vocab() if word not in marks and word[0] != "[")
    capital = [word for word in words if word != word.lower()]
    if len(capital) > SHARE * len(words):
        raise UserError(
            f"{name}: no file sets whether its tokeniser lower-cases texts, so it does, but "
            f"{len(capital)} of its {len(words)} words have capitals ({capital[0]!r}); write "
            f'"do_lower_case": false into its {SETTINGS}, or true if the model was trained on '
            "lower-cased texts"
        )


def lower_cases(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a capital is read as a small letter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return bool(getattr(tokenizer, "do_lower_case", False))
    return backend.normalizer is not None and backend.normalizer.normalize_str("A") == "a"
