"""A teacher's entry whose keys make it a prompted language model, read here or at an endpoint."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from sead_dist.config.registered import ENDPOINT, LANGUAGE_MODEL, MODEL

# what only such a teacher reads, and what only one at an endpoint does
PROMPT_KEYS = ("prompt", "words", "chat", "shots", "contextual_calibration")
ENDPOINT_KEYS = ("endpoint", "concurrency", "max_requests")


def with_kind(raw: Any) -> Any:
    """The entry with its `model` as its path, and with the kind that its other keys mean.

    Raises ValueError for a model without a prompt, for a prompt without a model, and for a model
    and a path."""
    if not isinstance(raw, Mapping):
        return raw
    entry = dict(raw)
    if "model" in entry:
        if entry.get("path") is not None:
            raise ValueError("model and path are two names of one thing; leave one out")
        if entry.get("prompt") is None:
            raise ValueError(
                "a language model needs a prompt and words; add them, or give path for a classifier"
            )
        entry["path"] = entry.pop("model")
    elif entry.get("path") is None and entry.get("predictions") is None:
        for key, what in (("endpoint", "an endpoint"), ("prompt", "a language model")):
            if entry.get(key) is not None:
                raise ValueError(f"{what} needs model: NAME; add the name of its language model")
    if entry.get("kind") is None and entry.get("prompt") is not None:
        entry["kind"] = LANGUAGE_MODEL if entry.get("endpoint") is None else ENDPOINT
    return entry


def mistake(kind: str, given: Mapping[str, Any]) -> str | None:
    """What is wrong with the keys of a prompt, as the end of an error message, or None. given: the
    keys that differ from their defaults."""
    if kind not in (LANGUAGE_MODEL, ENDPOINT):
        of_prompt = [key for key in (*PROMPT_KEYS, *ENDPOINT_KEYS) if key in given]
        where = "a language model's, which has a prompt" if kind == MODEL else "no key of its kind"
        return f"{of_prompt[0]} is {where}; add it, or leave it out" if of_prompt else None
    for key in ("prompt", "words"):
        if key not in given:
            return f"a language model needs a prompt and words, and {key} is missing; add it"
    if kind == LANGUAGE_MODEL:
        remote = [key for key in ENDPOINT_KEYS if key in given]
        return f"{remote[0]} is for kind: {ENDPOINT}; leave it out" if remote else None
    if "endpoint" not in given:
        return "endpoint is missing; give the URL of an OpenAI-compatible interface, ending in /v1"
    return _mistaken_url(given["endpoint"])


def mistaken_words(words: Mapping[str, list[str]]) -> str | None:
    """What is wrong with the words of the classes, as the end of an error message, or None."""
    speaks_for: dict[str, str] = {}
    for name, its in words.items():
        if not its:
            return f"the class {name!r} has no words; give it one, with the blank before it"
        for word in its:
            if not word.strip():
                return f"the class {name!r} has the word {word!r}, which says nothing; give letters"
            if word in speaks_for:
                return (
                    f"the word {word!r} stands twice, for {speaks_for[word]} and {name}; "
                    "leave one out"
                )
            speaks_for[word] = name
    return None


def _mistaken_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        return "endpoint is no URL of http or https; give one, such as http://localhost:8000/v1"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return (
            "endpoint holds more than a place, and configurations are kept; give the URL alone, "
            "and the key in the variable OPENAI_API_KEY"
        )
    return None
