"""A language model behind an OpenAI-compatible interface, as a teacher.

Some servers give the log-probabilities of a prompt (`echo`). There one request is sent for each
word, with prompt and word together, and the word's score is the sum of its tokens'
log-probabilities. Other servers get one request for each row, for the most probable first tokens.
There a class is scored by those tokens that begin its words and no word of another class. The first
prediction of a row is kept in the store, and is used from then on.

Shapes: R text rows, W words, K classes of the entry.
"""

import hashlib
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import chain
from typing import Any, Literal

import numpy as np

from sead_dist.errors import RunError, UserError, one_line, reason
from sead_dist.teachers.prompts import TRIAL, Opening, Texts, Words, read_prompt, rows_of

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 8
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
ANSWER_S = 120.0
# two log-probabilities of one token may differ by so much: servers round and compute in batches
AGREE = 0.1
# how many log-probabilities of a first token are requested, and how many older interfaces allow
TOP, LEAST_TOP = 20, 5
# where none of so many rows has a word of any class, the words are at fault
ENOUGH_ROWS = 8
# letters of a token, roughly, for the estimate before a run
LETTERS = 4
LATER = "its predictions so far are kept: give the same command again when it works"
NO_SCORES = "label the rows of the task with it elsewhere, and give a file of predictions"
Way = Literal["prompt", "first token"]


class RejectedError(Exception):
    """The server rejected a request, and would reject it again. status: the HTTP status."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, so that the key reaches only the server that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Sends requests to one server. most: how many requests may be sent (None: any number).

    The key is read from the environment for each request. It is stored nowhere else.
    """

    def __init__(self, name: str, url: str, most: int | None) -> None:
        self.name, self.url, self.most = name, url.rstrip("/"), most
        # few tries at the start: a person is there to read the message
        self.tries, self.fix = 2, "start it, or correct endpoint"
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.lock, self.sent = threading.Lock(), 0

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The server's response, as parsed JSON. Waits and tries again where the server is busy,
        fails or cannot be reached.

        Raises RejectedError where the server rejects the request, and RunError where all tries
        failed or `most` requests were sent.
        """
        said, pause_s = "", PAUSE_S
        for number in range(self.tries):
            if number:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._count()
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                said = f"{error.code} {self._without_key(error)}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise RejectedError(error.code, said) from None
                wanted = error.headers.get("Retry-After", "")
                if wanted.isdigit():
                    pause_s = max(pause_s, min(float(wanted), LONGEST_PAUSE_S))
            except (OSError, HTTPException, ValueError) as error:
                said = reason(getattr(error, "reason", error))
        raise RunError(
            f"teacher {self.name}: {self.url} failed in all {self.tries} tries ({said}); {self.fix}"
        )

    def _count(self) -> None:
        with self.lock:
            if self.most is not None and self.sent >= self.most:
                raise RunError(
                    f"teacher {self.name}: max_requests={self.most} requests were sent; its "
                    "predictions so far are kept: raise max_requests, and give the same command "
                    "again"
                )
            self.sent += 1

    def _once(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers, method="POST"
        )
        with self.opener.open(request, timeout=ANSWER_S) as answer:
            return json.loads(answer.read())

    def _without_key(self, error: urllib.error.HTTPError) -> str:
        """The server's text for an error, without the key, which such a text may repeat."""
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            return error.reason or ""
        if key := os.environ.get(KEY_VARIABLE):
            text = text.replace(key, "***")
        return one_line(text)[:200]


class Endpoint:
    """A teacher behind an endpoint (`kinds.Answers`). A few requests at the start show whether
    and how the server gives scores.

    Raises UserError where it gives none.
    """

    # rows between two reports of progress
    at_once = 64

    def __init__(self, opening: Opening) -> None:
        entry, (prompt, words) = opening.entry, read_prompt(opening)
        assert entry.endpoint is not None
        self.name, self.model, self.chat = opening.name, entry.path, entry.chat
        self.prompt, self.words = prompt, words
        self.labels: Sequence[str] = words.labels
        self.calibrated, self.concurrency = entry.contextual_calibration, entry.concurrency
        self.most = entry.max_requests
        self.client = Client(opening.name, entry.endpoint, entry.max_requests)
        self.top = TOP
        self.way = self._find_way()
        self.client.tries, self.client.fix = TRIES, LATER
        facts = [
            "endpoint-1", self.model, self.chat, self.way, prompt.text(Texts("\0", "\1")),
            [list(shot) for shot in prompt.shots], words.labels, words.words_W,
            words.class_W.tolist(), self.calibrated,
        ]  # fmt: skip
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.empty_K: np.ndarray | None = None

    def answer(self, texts_a: list[str], texts_b: list[str] | None) -> np.ndarray:
        """The logits_RK. Raises RunError where no response comes, or the server rejects a row."""
        rows = rows_of(texts_a, texts_b)
        with ThreadPoolExecutor(self.concurrency) as pool:
            if self.calibrated and self.empty_K is None:
                (bare_K,) = self._logits([Texts("", "")], pool)
                self.empty_K = bare_K - np.logaddexp.reduce(bare_K)
            logits_RK = self._logits(rows, pool)
        if self.empty_K is not None:
            logits_RK = logits_RK - self.empty_K
        return logits_RK.astype(np.float32)

    def count(self, texts_a: Sequence[str], texts_b: Sequence[str] | None) -> tuple[int, int]:
        """(requests, tokens) that these text rows take. The number of tokens is an estimate."""
        rows, words = rows_of(texts_a, texts_b), self.words.words_W
        each = len(words) if self.way == "prompt" else 1
        letters = each * sum(len(self.prompt.text(row)) for row in rows)
        return each * len(rows), letters // LETTERS + each * len(rows)

    def count_first(self) -> int:
        """Requests that the empty text still takes. Contextual calibration corrects all logits by
        those of this text."""
        if not self.calibrated or self.empty_K is not None:
            return 0
        return len(self.words.words_W) if self.way == "prompt" else 1

    def _logits(self, rows: Sequence[Texts], pool: ThreadPoolExecutor) -> np.ndarray:
        def guarded(send: Callable[[], Any], row: Texts) -> Any:
            try:
                return send()
            except RejectedError as error:
                raise RunError(
                    f"teacher {self.name}: {self.client.url} rejects {row.first[:60]!r}: "
                    f"{error.said}; shorten the prompt, or leave the row out"
                ) from None

        if self.way == "first token":
            found = pool.map(lambda row: guarded(lambda: self._by_first_token(row), row), rows)
            found_RK = np.stack(list(found))
            if len(rows) >= ENOUGH_ROWS and not np.ptp(found_RK, axis=1).any():
                raise RunError(
                    f"teacher {self.name}: no word of a class begins with one of the {self.top} "
                    f"most probable first tokens in {len(rows)} rows, such as "
                    f"{rows[0].first[:60]!r}; give words as the model begins its answers (capitals "
                    "count)"
                )
            return found_RK
        jobs = [(row, word) for row in rows for word in self.words.words_W]
        scores = pool.map(lambda job: guarded(lambda: self._of_word(*job), job[0]), jobs)
        return self.words.of_classes(np.array(list(scores), np.float64).reshape(len(rows), -1))

    def _of_word(self, row: Texts, word: str) -> float:
        """The sum of a word's log-probabilities behind a row's prompt."""
        return math.fsum(self._tokens_of(row, word)[1])

    def _tokens_of(self, row: Texts, word: str) -> tuple[str | None, list[float]]:
        """(the word's first token, the log-probability of each of its tokens behind a row's
        prompt). The first token is None where the server does not name it."""
        text = self.prompt.text(row)
        body = {"prompt": text + word, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        answer = self.client.post("/completions", {"model": self.model, **body, "echo": True})
        said = _part(answer, "choices", 0, "logprobs")
        offsets, logp = _part(said, "text_offset"), _part(said, "token_logprobs")
        if not isinstance(offsets, list) or not isinstance(logp, list) or 0 not in offsets:
            raise RejectedError(200, "no log-probabilities of the prompt")
        end = len(text) + len(word)
        own = [p for at, p in zip(offsets, logp, strict=False) if len(text) <= at < end]
        tokens = _part(said, "tokens")
        at_end = _of_last_tokens(word, tokens)
        if at_end is not None and len(logp) >= at_end.stop:
            own = logp[at_end]
        elif len(text) not in offsets:
            raise RunError(
                f"teacher {self.name}: the prompt of {row.first[:60]!r} and the word {word!r} are "
                "joined in one token, so that the word has no probability of its own; end the "
                "prompt without a blank, and begin each word with a blank"
            )
        if not own or not all(_is_number(p) for p in own):
            raise RejectedError(200, "no log-probabilities of the word")
        begins = offsets.index(len(text)) if at_end is None else at_end.start
        known = isinstance(tokens, list) and begins < len(tokens)
        return (str(tokens[begins]) if known else None), own

    def _try_prompts(self, row: Texts) -> None:
        """Try the way of prompts on one row: the server's two log-probabilities of one token must
        be equal.

        One is that of a word's first token behind the prompt. The other is that of the same token
        among the most probable first tokens. llama-cpp-python 0.3 gives the log-probabilities of a
        prompt one place off.

        Raises RejectedError where the server gives no scores, or two that differ.
        """
        asked = self._tokens_of(row, self.words.words_W[0])
        try:
            top = self._first_tokens(row)
        except RejectedError:  # nothing to compare with
            return
        more = (self._tokens_of(row, word) for word in self.words.words_W[1:])
        for first, own in chain([asked], more):
            if first in top:
                if abs(top[first] - own[0]) > AGREE:
                    raise RejectedError(200, "two different log-probabilities of one token")
                return

    def _by_first_token(self, row: Texts) -> np.ndarray:
        """The logits_K by the most probable first tokens. A class without a token among them gets
        the least log-probability in the list."""
        top = self._first_tokens(row)
        floor = min(top.values())
        begun = [self._begun_by(k, top) for k in range(len(self.labels))]
        only = [
            [top[token] for token in tokens if sum(token in other for other in begun) == 1]
            for tokens in begun
        ]
        return np.array([np.logaddexp.reduce(found) if found else floor for found in only])

    def _first_tokens(self, row: Texts) -> dict[str, float]:
        """The most probable first tokens behind a row's prompt, with their log-probabilities."""
        if self.chat:
            body = {"messages": self.prompt.messages(row), "logprobs": True}
            path, asked = "/chat/completions", {**body, "top_logprobs": self.top}
        else:
            path, asked = "/completions", {"prompt": self.prompt.text(row), "logprobs": self.top}
        more = {"model": self.model, "max_tokens": 1, "temperature": 0}
        answer = self.client.post(path, {**more, **asked})
        said = _part(answer, "choices", 0, "logprobs")
        if self.chat:
            listed = _part(said, "content", 0, "top_logprobs")
            pairs = [(_part(one, "token"), _part(one, "logprob")) for one in listed or ()]
        else:
            tops = _part(said, "top_logprobs", 0)
            pairs = list(tops.items()) if isinstance(tops, dict) else []
        top = {token: p for token, p in pairs if isinstance(token, str) and _is_number(p)}
        if not top:
            raise RejectedError(200, "no log-probabilities of the first token")
        return top

    def _begun_by(self, k: int, top: Mapping[str, float]) -> set[str]:
        """For each word of class k, the longest of these tokens that begins it."""
        found = set()
        for word, own in zip(self.words.words_W, self.words.class_W, strict=True):
            # a reply in a conversation begins without a blank
            wanted = word.strip() if self.chat else word
            fits = [
                t for t in top if t.strip() and wanted.startswith(t.strip() if self.chat else t)
            ]
            if own == k and fits:
                found.add(max(fits, key=len))
        return found

    def _find_way(self) -> Way:
        """The way in which the server gives scores. Raises UserError where it gives none."""
        trial = Texts(*TRIAL)
        ways: list[tuple[Way, int, Callable[[], object]]] = [
            ("first token", TOP, lambda: self._by_first_token(trial)),
            ("first token", LEAST_TOP, lambda: self._by_first_token(trial)),
        ]
        if not self.chat:
            ways.insert(0, ("prompt", TOP, lambda: self._try_prompts(trial)))
        last = ""
        for way, top, send in ways:
            self.top = top
            try:
                send()
            except RejectedError as error:
                if error.status in (401, 403):
                    raise UserError(
                        f"teacher {self.name}: {self.client.url} rejects the key "
                        f"({error.said}); set {KEY_VARIABLE}"
                    ) from None
                last = error.said
                continue
            except RunError as error:
                raise UserError(str(error)) from None
            if way == "first token":
                _check_first_words(self.name, self.words)
            return way
        raise UserError(
            f"teacher {self.name}: {self.client.url} gives no log-probabilities of {self.model} "
            f"({last}); {NO_SCORES}"
        )


def _of_last_tokens(word: str, tokens: Any) -> slice | None:
    """The tokens that make the word, before the generated one; None where their texts do not make
    it.

    Offsets may be wrong: some servers count a letter once for each token that has a part of it.
    """
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return None
    end = start = len(tokens) - 1
    found = ""
    while start > 0 and len(found) < len(word):
        start -= 1
        found = tokens[start] + found
    return slice(start, end) if found == word else None


def _check_first_words(name: str, words: Words) -> None:
    """Raises UserError where words of two classes begin alike, as their first tokens may be the
    same."""
    firsts = [word.split()[0] for word in words.words_W]
    for one, first in enumerate(firsts):
        for other, second in enumerate(firsts):
            if words.class_W[one] != words.class_W[other] and second.startswith(first):
                raise UserError(
                    f"teacher {name}: its endpoint scores only first tokens, and the words "
                    f"{words.words_W[one]!r} and {words.words_W[other]!r} of two classes begin "
                    "alike; give words that begin differently"
                )


def _part(of: Any, *keys: str | int) -> Any:
    """The value below these keys; None where there is none. A server may send anything."""
    for key in keys:
        try:
            of = of[key]
        except (KeyError, IndexError, TypeError):
            return None
    return of


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
