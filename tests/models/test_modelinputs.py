"""What a model is fed: a prediction in a batch equals that of the text alone (invariant 3).

R rows, C classes.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import alone, save_kind, texts
from small import (
    CPU,
    SHAPES,
    TASK,
    build_model,
    config,
    example_set,
    load_teachers,
    make_source,
    save_teacher,
    words,
    write_task,
)
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.config.load import load_config
from sead_dist.data.examples import ExampleSet
from sead_dist.data.order import make_split
from sead_dist.data.splits import load_official
from sead_dist.data.tasks import load_task
from sead_dist.data.tokens import tokenize
from sead_dist.errors import UserError
from sead_dist.models.inputs import settle, student_inputs
from sead_dist.models.inputs_check import (
    CheckRows,
    check_teacher,
    padding_of,
    probe_rows,
    real_rows,
)
from sead_dist.models.pretrained import locate
from sead_dist.models.sequence_classifier import load_classifier
from sead_dist.runs.checked_run import read_inputs
from sead_dist.runs.onnx_export import load_original
from sead_dist.runs.prediction import data_of, load_answerer
from sead_dist.runtime.distributed import World
from sead_dist.teachers import whole
from sead_dist.teachers.base import Request
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.inference import predict
from sead_dist.teachers.whole import load_whole

ALONE = World(0, 1, CPU)
# which padding leaves a text's answer alone, by what each looks at
PADDING = {
    "xlnet": "left", "gpt2": "right", "llama": "right", "qwen3": "right", "big_bird": "none",
    "mobilebert": "none", "convbert": "none", "fnet": "none", "nystromformer": "none",
    "funnel": "right",
}  # fmt: skip


def asked(folder: Path) -> tuple[np.ndarray, str]:
    """(what the teacher says as the package asks it, how its rows are padded)."""
    given = config(teachers=[{"path": str(folder)}], max_length=64)
    teacher = read_teachers(given, TASK, ALONE)[0]
    model = load_whole(teacher, CPU, False, {})
    tokens = teacher.inputs.tokens(example_set(texts()))
    said_RC = np.zeros((24, 2), np.float32)

    def done(places, logits):
        said_RC[places] = logits

    for part in np.array_split(np.random.default_rng(0).permutation(24), 2):
        predict(model, tokens, part, CPU, teacher.cut, lambda p, x, part=part: done(part[p], x))
    return said_RC, teacher.cut.padding


@pytest.mark.parametrize("kind", PADDING)
def test_invariant_03_every_kind_answers_in_a_batch_as_alone(tmp_path, kind):
    folder = save_kind(tmp_path / kind, kind, side="left" if kind == "xlnet" else "right")
    said_RC, padding = asked(folder)
    assert padding == PADDING[kind]
    expected_RC = alone(folder, texts())
    assert expected_RC.std() > 0.01
    assert np.abs(said_RC - expected_RC).max() < 1e-3 * np.abs(expected_RC).max()


@pytest.mark.parametrize("pad", [None, 7])
def test_invariant_03_the_padding_token_is_the_tokenisers_whatever_the_config_says(tmp_path, pad):
    folder = save_kind(tmp_path / "gpt2", "gpt2", pad_token_id=pad)
    said_RC, _ = asked(folder)
    assert np.abs(said_RC - alone(folder, texts())).max() < 1e-4


@pytest.mark.parametrize("kind", ["big_bird", "mobilebert", "convbert", "fnet", "nystromformer"])
def test_a_student_whose_answers_change_with_padding_is_refused_in_one_line(tmp_path, kind):
    folder = save_kind(tmp_path / kind, kind)
    model, tokenizer = load_classifier(locate(str(folder))), grammar_tokenizer()
    settle(tokenizer, model.config)
    with pytest.raises(UserError, match=r"the student is a \w+, and its logits") as caught:
        student_inputs(model, tokenizer, 64, "the student", example_set(texts()))
    assert "\n" not in str(caught.value)


def test_the_students_tokeniser_is_saved_with_the_side_that_it_was_trained_with(tmp_path):
    folder = save_kind(tmp_path / "xlnet", "xlnet")
    model, tokenizer = load_classifier(locate(str(folder))), grammar_tokenizer()
    settle(tokenizer, model.config)
    student_inputs(model, tokenizer, 64, "the student", example_set(texts()))
    assert tokenizer.padding_side == "left"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "left"
    table = tokenize(tokenizer, example_set(["good", "the plot was good"]), 32)
    inputs = table.pad(np.array([0, 1]), 6)
    assert inputs["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert inputs["input_ids"][0, 3:].tolist() == tokenizer("good")["input_ids"]


def test_a_maximum_length_that_holds_no_token_of_text_is_refused():
    tokenizer, one = grammar_tokenizer(), example_set(["good plot"])
    assert len(tokenize(tokenizer, one, 3).ids) == 3
    with pytest.raises(
        UserError, match="max_length=2 leaves no token for text: this tokeniser adds 2"
    ):
        tokenize(tokenizer, one, 2)
    pairs = replace(one, texts_b=["bad"])
    with pytest.raises(UserError, match=r"max_length=3 leaves no .* give max_length=4 or more"):
        tokenize(tokenizer, pairs, 3)


def test_segments_come_from_the_model_and_not_from_a_list_of_names(tmp_path):
    folder = save_teacher(tmp_path / "bert", type_vocab_size=2)
    tokenizer = grammar_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    settle(tokenizer, AutoConfig.from_pretrained(folder))
    pair = example_set(["good"])
    pair.__dict__["texts_b"] = ["the plot was bad"]
    types = tokenize(tokenizer, pair, 32).types
    assert types is not None
    assert set(types.tolist()) == {0, 1}
    without = grammar_tokenizer()
    without.model_input_names = ["input_ids", "attention_mask"]
    settle(without, AutoConfig.for_model("distilbert", **SHAPES["distilbert"]))
    assert tokenize(without, pair, 32).types is None


def test_a_teacher_whose_own_weights_do_not_stand_its_padding_is_refused():
    model, tokenizer = build_model("bert"), grammar_tokenizer()
    real, fixed = (
        real_rows(tokenizer, example_set(texts()), 32, CPU),
        probe_rows(tokenizer, 32, CPU),
    )
    for rows in (real, fixed):
        check_teacher(model, rows, "right", "a")
    forward = model.bert.forward

    def blind(*given, attention_mask=None, **inputs):
        return forward(*given, **inputs)  # padding is read as text

    model.bert.forward = blind
    for rows in (real, fixed):
        with pytest.raises(
            UserError, match="teacher a gives a text other logits in a batch padded on the r"
        ):
            check_teacher(model, rows, "right", "a")


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 0.02), ("float32", 5e-6)])
def test_rounding_of_a_score_near_zero_is_no_misreading(dtype, rounding):
    model = build_model(labels=("score",)).to(getattr(torch, dtype))
    (one,) = probe_rows(grammar_tokenizer(), 32, CPU).alone[1:2]
    longer = {name: torch.nn.functional.pad(tensor, (0, 20)) for name, tensor in one.items()}
    off = {"padded": 0.0}

    def score(*given, attention_mask, **inputs):
        """As of a head whose sum is near 0: what padding changes does not shrink with it."""
        padded = attention_mask.shape[1] > one["input_ids"].shape[1]
        return SequenceClassifierOutput(logits=torch.tensor([[off["padded"] * padded + 1e-6]]))

    model.forward = score
    rows = CheckRows([one], lambda _side: [longer])
    off["padded"] = rounding
    check_teacher(model, rows, "right", "it")
    off["padded"] = 10 * rounding
    with pytest.raises(
        UserError, match="teacher it gives a text other logits in a batch padded on the right"
    ):
        check_teacher(model, rows, "right", "it")


def test_the_rows_tried_are_the_shortest_a_middle_and_the_longest_as_transformers_makes_them():
    tokenizer = grammar_tokenizer()
    lines = ["the plot was bad", "good", " ".join(["very"] * 9), "the plot", "not good", "bad"]
    examples = example_set(lines)
    rows = real_rows(tokenizer, examples, 8, CPU)
    lengths = [row["input_ids"].shape[1] for row in rows.alone]
    assert lengths == [3, 4, 8]
    plain = tokenizer("good", return_tensors="pt")
    assert torch.equal(rows.alone[0]["input_ids"], plain["input_ids"])
    (batch,) = rows.together("left")
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert torch.equal(batch["input_ids"][0, -3:], plain["input_ids"][0])
    assert [one["input_ids"].shape for one in rows.together("none")] == [(2, 3), (2, 4), (2, 8)]
    # of a split that is tokenised already they are looked for in all of it
    tokens = tokenize(tokenizer, examples, 8)
    again = real_rows(tokenizer, examples, 8, CPU, tokens)
    assert [row["input_ids"].tolist() for row in again.alone] == [
        row["input_ids"].tolist() for row in rows.alone
    ]


def tried_as(role: str, folder: Path, data: Path) -> ExampleSet:
    """Load a model as a command does that uses it so; the examples of which it is to be tried."""
    if role == "student":
        given = words(data, [folder], data / "run", student__shape="null", student__path=folder)
        return read_inputs(load_config(given))[1].train
    task = load_task(data / "task.yaml")
    examples = load_official(task, data_of("", None, str(data)), "validation")
    if role == "export":
        load_original(str(folder), str(data / "task.yaml"), str(data), None)
    elif role == "answerer":
        load_answerer(str(folder), task, None, CPU, examples)
    else:
        source = make_source(load_teachers([folder], task=task), data / "store", data / "run")
        split = make_split(examples, grammar_tokenizer(), 32)
        source.submit(Request(split, np.arange(len(split)), None, "a test")).result()
    return examples


@pytest.mark.parametrize("role", ["teacher", "student", "answerer", "export"])
def test_a_model_is_tried_on_rows_of_the_run_whatever_it_is_there_for(tmp_path, monkeypatch, role):
    """Alone, the shortest and the longest row among those that it was asked."""
    folder, data = save_teacher(tmp_path / "model"), write_task(tmp_path)
    forward, alone = BertForSequenceClassification.forward, set()

    def spied(self, input_ids, **inputs):
        if len(input_ids) == 1:
            alone.add(tuple(input_ids[0].tolist()))
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", spied)
    examples = tried_as(role, folder, data)
    rows = [tuple(ids) for ids in grammar_tokenizer()(examples.texts_a)["input_ids"]]
    for length in (min(map(len, rows)), max(map(len, rows))):
        assert alone.intersection(row for row in rows if len(row) == length)


def test_a_model_is_tried_after_its_weights_are_in_8_bits(tmp_path, monkeypatch):
    folder = save_teacher(tmp_path / "t")
    teacher = read_teachers(config(teachers=[{"path": str(folder)}], max_length=32), TASK, ALONE)[0]
    entry = teacher.entry.model_copy(update={"quantization": "int8"})
    order = []
    monkeypatch.setattr(whole, "quantize", lambda model: order.append("quantize"))
    monkeypatch.setattr(whole, "check_teacher", lambda *given: order.append("check"))
    load_whole(replace(teacher, entry=entry), CPU, False, {})
    assert order == ["quantize", "check"]


def test_answers_that_depend_on_what_was_asked_before_are_told(tmp_path):
    folder = save_kind(tmp_path / "bird", "big_bird")
    model = load_classifier(locate(str(folder))).eval()  # nothing sets its attention again
    rows = real_rows(grammar_tokenizer(), example_set(texts(3)), 64, CPU)
    alone = sorted(rows.alone, key=lambda row: row["input_ids"].shape[1])
    rows = CheckRows([alone[-1], *alone], rows.together)
    with pytest.raises(UserError, match="its logits for a text depend on the texts before it"):
        padding_of(model, rows, "right")
    model.bert.set_attention_type("block_sparse")
    with pytest.raises(UserError, match="teacher a, a big_bird: its logits for a text depend on"):
        check_teacher(model, CheckRows(rows.alone, lambda _: rows.alone), "right", "a")


def test_a_text_without_a_token_is_named_before_any_work():
    tokenizer = grammar_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    examples = example_set(["good", "", "bad"])
    if len(tokenizer("")["input_ids"]):
        tokenizer = without_marks(tokenizer)
    with pytest.raises(UserError, match=r"row 2 of .* has a text without a token"):
        make_split(examples, tokenizer, 16)


def without_marks(tokenizer):
    """The same, adding no marks of its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return tokenizer


def test_predictions_of_old_rules_are_kept_where_the_tensors_are_the_same(tmp_path, monkeypatch):
    old = Path(__file__).parents[1] / "fixtures" / "b2c3d08"
    folder = tmp_path / "old"
    shutil.copytree(old, folder)
    monkeypatch.chdir(folder)
    kept = next(Path("store/values").iterdir()).name
    given = config(teachers=[{"path": "teacher"}], max_length=64)
    teacher = read_teachers(given, TASK, ALONE)[0]
    assert kept.startswith(teacher.key.fingerprint[:16])
    # of a padding token of its own before, whose tensors were others
    named = AutoConfig.from_pretrained("teacher")
    named.pad_token_id = 9
    named.save_pretrained("teacher")
    same = read_teachers(given, TASK, ALONE)[0]
    assert same.config.pad_token_id == 0
    assert same.key.fingerprint == teacher.key.fingerprint
