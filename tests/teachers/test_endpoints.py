"""Language models behind an OpenAI-compatible interface, asked over HTTP at a server of the tests.

R text rows, K classes of the entry."""

import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from ranks import run_ranks, try_ranks
from small import (
    ALONE,
    TASK,
    config,
    grammar_tokenizer,
    model_bytes,
    run_distill,
    save_teacher,
    sentences,
    words,
    write_task,
)

from sead_dist.errors import RunError, UserError
from sead_dist.teachers import endpoint
from sead_dist.teachers.entries import read_teachers

PROMPT = '"Review: {sentence}\\nSentiment:"'
WORDS = '{positive: [" good", " great"], negative: [" bad"]}'
KEY = "sk-secret-of-the-tests"


def log_probability(text: str, token: str) -> float:
    """What the model of the tests takes a token behind a text for."""
    seed = sum((place + 1) * ord(letter) for place, letter in enumerate(text + token))
    return -0.5 - (seed % 97) / 20


def pieces(text: str) -> list[str]:
    """Words with the blank before them, cut after four letters: long words have two tokens."""
    return [part for word in re.findall(r"\s*\S+|\s+$", text) for part in _cut(word)]


def _cut(word):
    return [word[:5], word[5:]] if len(word) > 5 else [word]


class Model(ThreadingHTTPServer):
    """offers: which log-probabilities it gives. failures: how each of the next requests fails,
    as (status, headers, text). broken_after: it gives nothing more after so many requests. late:
    its log-probabilities of prompts are one place off, and what it writes is not among them."""

    daemon_threads = True
    # a connection beyond these would wait for a second
    request_queue_size = 128

    def __init__(self, offers=("prompt", "top"), most_top=20, drift=0, late=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.offers, self.most_top, self.drift, self.late = offers, most_top, drift, late
        self.failures, self.broken_after = [], None
        self.bodies, self.keys, self.lock = [], [], threading.Lock()
        self.now = self.most_at_once = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append((self.path, body))
            server.keys.append(self.headers.get("Authorization"))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
            failure = server.failures.pop(0) if server.failures else None
            if server.broken_after is not None and len(server.bodies) > server.broken_after:
                failure = (500, {}, "out of order")
        time.sleep(0.002)
        status, headers, said = failure or self.answer(body)
        with server.lock:
            server.now -= 1
        text = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def answer(self, body):
        offers, most = self.server.offers, self.server.most_top
        if self.path == "/v1/chat/completions":
            if "top" not in offers or not body.get("logprobs"):
                return 200, {}, {"choices": [{"message": {"content": "good"}, "logprobs": None}]}
            text = body["messages"][-1]["content"]
            top = [{"token": t, "logprob": log_probability(text, t)} for t in ("good", "bad", "so")]
            return 200, {}, {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
        if self.path != "/v1/completions":
            return 404, {}, "no such place"
        if body.get("echo"):
            if "prompt" not in offers:
                return 400, {}, {"error": "echo is not supported"}
            parts = pieces(body["prompt"])
            starts = [len("".join(parts[:n])) for n in range(len(parts))]
            ends, late = [*starts[1:], len(body["prompt"])], self.server.late
            logp = [
                None,
                *(
                    log_probability(body["prompt"][: ends[n] if late else starts[n]], parts[n])
                    for n in range(1, len(parts))
                ),
            ]
            said = {"tokens": [*parts, " and"], "token_logprobs": [*logp, -1.0],
                    "text_offset": [*starts, len(body["prompt"])]}  # fmt: skip
            if late:
                said = {name: values[:-1] for name, values in said.items()}
            # letters of which a token has a half are counted as often as there are such tokens
            shift = self.server.drift * body["prompt"].count("\u00e9")
            said["text_offset"][1:] = [at + shift for at in said["text_offset"][1:]]
            return 200, {}, {"choices": [{"text": body["prompt"] + " and", "logprobs": said}]}
        if body.get("logprobs", 0) > most:
            return 400, {}, {"error": f"logprobs must be at most {most}"}
        if "top" not in offers:
            return 200, {}, {"choices": [{"text": " good", "logprobs": None}]}
        text = body["prompt"]
        top = {t: log_probability(text, t) for t in (" good", " gr", " b", " so", " ")}
        return 200, {}, {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


@pytest.fixture
def serve(monkeypatch):
    """`serve(...)`: a server that answers until the test's end. Retries wait for hardly anything."""
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.001)
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)
    servers = []

    def start(**more):
        servers.append(Model(**more))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def entry(server, more="", words=WORDS, prompt=PROMPT, name="m"):
    url = server if isinstance(server, str) else server.url
    return f"{{endpoint: '{url}', model: {name}, prompt: {prompt}, words: {words}{more}}}"


def opened(*entries, **changes):
    given = config(f"teachers=[{', '.join(entries)}]", **changes)
    return read_teachers(given, TASK, ALONE, grammar_tokenizer())


def of_prompt(text):
    """What both classes have by the log-probabilities of prompts."""

    def score(word):
        parts = pieces(word)
        return sum(log_probability(text + "".join(parts[:n]), parts[n]) for n in range(len(parts)))

    return [np.logaddexp(score(" good"), score(" great")), score(" bad")]


def prompt_of(text):
    return f"Review: {text}\nSentiment:"


def test_words_are_scored_by_the_log_probabilities_of_prompts_where_there_are_some(serve):
    server = serve()
    (teacher,) = opened(entry(server))
    texts = sentences(5)
    found_RK = teacher.answers.answer(texts, None)
    np.testing.assert_allclose(found_RK, [of_prompt(prompt_of(text)) for text in texts], rtol=1e-6)
    assert teacher.answers.way == "prompt"
    # two to try, and one for each row and word
    assert len(server.bodies) == 2 + 5 * 3
    assert {(path, body["model"]) for path, body in server.bodies} == {("/v1/completions", "m")}


def test_log_probabilities_of_prompts_that_are_others_than_of_first_tokens_are_not_taken(serve):
    """llama-cpp-python 0.3.x gives what the model says behind a token, not before it."""
    (teacher,) = opened(entry(serve(late=True)))
    assert teacher.answers.way == "first token"


def test_a_word_is_known_by_its_tokens_where_offsets_are_off(serve):
    """A letter of two tokens is counted twice by some servers."""
    server = serve(drift=1)
    (teacher,) = opened(entry(server))
    texts = ["a caf\u00e9 of old", "\u00e9 \u00e9 \u00e9\u00e9", "plain"]
    found_RK = teacher.answers.answer(texts, None)
    np.testing.assert_allclose(found_RK, [of_prompt(prompt_of(text)) for text in texts], rtol=1e-6)


def test_words_that_no_row_begins_with_are_told(serve):
    words = '{positive: [" Good"], negative: [" Bad"]}'
    server = serve(offers=("top",))
    (teacher,) = opened(entry(server, words=words))
    assert len(teacher.answers.answer(sentences(3), None)) == 3
    with pytest.raises(RunError, match=r"no word of a class begins .* in 9 rows, .*\(capitals cou"):
        teacher.answers.answer(sentences(9), None)


def test_else_first_tokens_are_scored_and_what_is_not_listed_has_the_least(serve):
    server = serve(offers=("top",), most_top=5)
    (teacher,) = opened(entry(server))
    assert (teacher.answers.way, teacher.answers.top) == ("first token", 5)
    text = sentences(1)[0]
    (found_K,) = teacher.answers.answer([text], None)

    def p(token):
        return log_probability(prompt_of(text), token)

    # " gr" begins " great", " b" begins " bad", and a blank begins all
    np.testing.assert_allclose(found_K, [np.logaddexp(p(" good"), p(" gr")), p(" b")], rtol=1e-6)
    (other,) = opened(entry(server, words='{positive: [" good"], negative: [" awful"]}'))
    least = min(p(token) for token in (" good", " gr", " b", " so", " "))
    np.testing.assert_allclose(
        other.answers.answer([text], None)[0], [p(" good"), least], rtol=1e-6
    )
    # " gr" begins words of both, and speaks for neither
    (both,) = opened(entry(server, words='{positive: [" grand"], negative: [" great"]}'))
    np.testing.assert_allclose(both.answers.answer([text], None)[0], [least, least], rtol=1e-6)


def test_in_a_conversation_words_begin_without_a_blank(serve):
    server = serve()
    (teacher,) = opened(entry(server, ", chat: true"))
    text = sentences(1)[0]
    found_K = teacher.answers.answer([text], None)[0]
    wanted_K = [log_probability(prompt_of(text), token) for token in ("good", "bad")]
    np.testing.assert_allclose(found_K, wanted_K, rtol=1e-6)
    path, body = server.bodies[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": prompt_of(text)}]


def test_contextual_calibration_asks_of_an_empty_text_once(serve):
    server = serve()
    (teacher,) = opened(entry(server, ", contextual_calibration: true"))
    texts = sentences(3)
    before = len(server.bodies)
    found_RK = np.concatenate([teacher.answers.answer([text], None) for text in texts])
    empty_K = np.array(of_prompt(prompt_of("")))
    wanted_RK = [of_prompt(prompt_of(text)) - (empty_K - np.logaddexp(*empty_K)) for text in texts]
    np.testing.assert_allclose(found_RK, wanted_RK, rtol=1e-5)
    assert len(server.bodies) - before == (1 + 3) * 3


def test_a_model_without_log_probabilities_is_refused_and_pointed_to_a_file(serve):
    for server, more in ((serve(offers=()), ""), (serve(offers=()), ", chat: true")):
        with pytest.raises(
            UserError, match=r"gives no log-probabilities of m .*file of predictions"
        ):
            opened(entry(server, more))


def test_what_fails_for_a_while_is_asked_again(serve):
    server = serve()
    (teacher,) = opened(entry(server, ", concurrency: 1"))
    server.failures += [
        (429, {"Retry-After": "0"}, "slow down"),
        (503, {}, "busy"),
        (200, {}, "{no json"),
    ]
    before = len(server.bodies)
    text = sentences(1)[0]
    np.testing.assert_allclose(
        teacher.answers.answer([text], None)[0], of_prompt(prompt_of(text)), rtol=1e-6
    )
    assert len(server.bodies) - before == 3 + 3


def test_what_always_fails_ends_the_run_in_one_line(serve):
    server = serve()
    (teacher,) = opened(entry(server))
    server.broken_after = 0
    with pytest.raises(RunError, match=r"failed in all 8 tries \(500 out of order\)"):
        teacher.answers.answer(["a"], None)
    server.broken_after, server.failures = None, [(400, {}, "too long\n\x1b[31m")] * 3
    with pytest.raises(RunError, match=r"rejects 'a b': 400 too long\\n\\x1b\[31m; shorten"):
        teacher.answers.answer(["a b"], None)


def test_so_many_requests_are_at_work_at_once_and_no_more(serve):
    server = serve()
    (teacher,) = opened(entry(server, ", concurrency: 3"))
    teacher.answers.answer(sentences(20), None)
    assert server.most_at_once == 3


def test_the_key_comes_from_the_environment_and_is_told_to_nobody_else(serve, monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    server, other = serve(), serve()
    (teacher,) = opened(entry(server))
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in repr(vars(teacher.answers)) + repr(vars(teacher.answers.client))
    server.failures = [(302, {"Location": f"{other.url}/completions"}, "elsewhere")] * 3
    with pytest.raises(RunError, match="rejects 'a': 302"):
        teacher.answers.answer(["a"], None)
    assert other.bodies == []
    server.failures = [(401, {}, f"wrong key {KEY}")] * 3
    with pytest.raises(
        UserError, match=r"rejects the key \(401 wrong key \*\*\*\); set OPENAI_API_KEY"
    ):
        opened(entry(server))


def test_all_that_an_answer_depends_on_is_part_of_its_identity_and_the_place_is_not(serve):
    server, twin, first = serve(), serve(), serve(offers=("top",))
    variants = [
        entry(server),
        entry(server, name="n"),
        entry(server, ", chat: true"),
        entry(server, ", contextual_calibration: true"),
        entry(server, words='{positive: [" good"], negative: [" bad"]}'),
        entry(server, prompt='"{sentence} It is"'),
        entry(first),
    ]
    prints = [opened(one)[0].key.fingerprint for one in variants]
    assert len(set(prints)) == len(variants)
    same = opened(entry(twin), entry(server, ", concurrency: 2, max_requests: 500"))
    assert {teacher.key.fingerprint for teacher in same} == {prints[0]}


@pytest.mark.parametrize(
    ("url", "more", "message"),
    [
        ("localhost:8000/v1", "", "endpoint is not a URL of http or https"),
        ("ftp://host/v1", "", "endpoint is not a URL of http or https"),
        ("http://:80/v1", "", "endpoint is not a URL of http or https"),
        ("http://me:word@host/v1", "", "endpoint has a user, a password"),
        ("http://host/v1?key=a", "", "endpoint has a user, a password"),
        (
            "http://127.0.0.1:1/v1",
            "",
            "failed in all 2 tries .*Connection refused.*; start it, or correct",
        ),
        ("http://127.0.0.1:1/v1", ", concurrency: 0", "greater than 0"),
        ("http://127.0.0.1:1/v1", ", max_requests: 0", "greater than 0"),
        ("http://127.0.0.1:1/v1", ", max_length: 64", "max_length=64 is for a model"),
        ("http://127.0.0.1:1/v1", ", revision: main", "revision=main is for a model"),
        (
            "http://127.0.0.1:1/v1",
            ", kind: model",
            "prompt is for a language model, and this is a classifier; leave kind out",
        ),
    ],
)
def test_bad_entries_are_refused_in_one_line(serve, url, more, message):
    with pytest.raises(UserError, match=message) as told:
        opened(entry(url, more))
    assert "\n" not in str(told.value)


def test_words_that_begin_alike_are_refused_where_first_tokens_are_scored(serve):
    given = {"words": '{positive: [" very good"], negative: [" very bad"]}'}
    opened(entry(serve(), **given))
    with pytest.raises(UserError, match="' very good' and ' very bad' of two classes begin alike"):
        opened(entry(serve(offers=("top",)), **given))


def test_a_prompt_that_is_joined_with_a_word_is_refused(serve):
    with pytest.raises(UserError, match=r"are joined in one token.*end the prompt without a blank"):
        opened(
            entry(
                serve(), prompt='"{sentence} It is "', words="{positive: [good], negative: [bad]}"
            )
        )


# whole runs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """54 training, 6 selection and 20 dev rows."""
    root = tmp_path_factory.mktemp("task")
    return write_task(root / "data"), save_teacher(root / "a")


def run_quickly(world, given):
    endpoint.PAUSE_S = 0.001
    endpoint.Endpoint.at_once = 8
    run_distill(world, given)


@pytest.mark.slow
def test_a_run_whose_server_fails_goes_on_where_it_was(task, tmp_path, serve, monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    data, encoder = task
    good, bad = serve(), serve()
    whole = words(
        data, [encoder, entry(good, ", max_requests: 242")], tmp_path / "whole", tmp_path / "s1"
    )
    run_ranks(1, tmp_path / "ranks", run_quickly, whole)
    assert len(good.bodies) == 2 + 3 * 80
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "teacher m: at most 240 requests of about " in log
    assert "tokens for 80 rows" in log

    given = words(data, [encoder, entry(bad)], tmp_path / "run", tmp_path / "s2")
    bad.broken_after = 90
    (error,) = try_ranks(1, tmp_path / "ranks", run_quickly, given)
    assert isinstance(error, RunError)
    assert "failed in all 8 tries" in str(error)
    bad.broken_after, before = None, len(bad.bodies)
    bad.bodies.clear()
    run_ranks(1, tmp_path / "ranks", run_quickly, given)
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "whole")
    # the six selection rows and two pieces of eight were kept before it failed
    assert before > 90
    assert len(bad.bodies) == 2 + 3 * (80 - 6 - 2 * 8)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_run_that_would_send_more_requests_than_it_may_is_refused_before_any(
    task, tmp_path, serve
):
    data, encoder = task
    server = serve()
    given = words(data, [encoder, entry(server, ", max_requests: 100")], tmp_path / "run")
    (error,) = try_ranks(1, tmp_path / "ranks", run_quickly, given)
    assert isinstance(error, UserError)
    assert re.search(
        r"would send at most 240 requests .* for 80 rows, and max_requests is 100", str(error)
    )
    assert len(server.bodies) == 2


def test_what_it_may_send_ends_it_where_retries_use_it_up(serve):
    server = serve()
    (teacher,) = opened(entry(server, ", max_requests: 3"))
    with pytest.raises(RunError, match="max_requests=3 requests were sent"):
        teacher.answers.answer(sentences(2), None)
    assert len(server.bodies) == 3
    assert math.isfinite(teacher.answers.count(["a"], None)[1])
