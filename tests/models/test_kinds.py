"""docs/models.md says of each kind of model what the self-check decides."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import (
    BACKBONES,
    FOUR_LAYERS,
    KINDS,
    alone,
    assert_layers_work_as,
    build_kind,
    save_kind,
    texts,
)
from small import CPU, TASK, example_set, model_inputs
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.config.schema import StudentConfig
from sead_dist.data.tokens import tokenize
from sead_dist.errors import RunError, UserError
from sead_dist.models.hidden_states_check import check_layer_outputs
from sead_dist.models.inputs import settle, student_inputs
from sead_dist.models.inputs_check import (
    check_teacher,
    padded,
    probed_padding,
    real_rows,
    reset_attention,
    rows_alone,
)
from sead_dist.models.pretrained import load_tokenizer, locate, position_limit
from sead_dist.models.sequence_classifier import load_classifier
from sead_dist.models.student import build_student, check_start
from sead_dist.runs import onnx_export
from sead_dist.teachers.inference import Cut, predict

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LONGEST, ROWS = 64, 12
# those of which a quick test looks at all but ONNX
FEW = ("albert", "gemma3_text", "gpt2", "modernbert", "t5")
METHODS = ("distilbert", "tinybert", "minilm")
# a row of the table: | name | `kind` | what it is or does in each column |
ROW = re.compile(r"^\| [^|]+ \| `([^`]+)` \| ([^|]+(?: \| [^|]+){6}) \|$", re.M)
COLUMNS = ("teacher", "padding", "positions", "student", "layers", "features", "ONNX")


def documented() -> dict[str, dict[str, str]]:
    """What the table says of each kind, by column."""
    rows = ROW.findall(DOCS.read_text(encoding="utf-8"))
    return {kind: dict(zip(COLUMNS, cells.split(" | "), strict=True)) for kind, cells in rows}


def test_the_table_has_a_row_for_each_kind_that_is_tried():
    assert sorted(documented()) == sorted(KINDS)
    assert len(KINDS) >= 40


@pytest.mark.parametrize(
    "kind", [k if k in FEW else pytest.param(k, marks=pytest.mark.slow) for k in sorted(KINDS)]
)
def test_a_kind_is_what_the_table_says(tmp_path, kind):
    found = {**as_a_teacher(tmp_path / "one", kind), **by_its_layers(tmp_path / "four", kind)}
    said = documented()[kind]
    # what no padding leaves alone follows no teacher's inside
    found["features"] = "rejected" if found["student"] == "rejected" else its_features(kind)
    assert found == {column: said[column] for column in found}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_kind_is_exported_as_the_table_says(tmp_path, kind):
    works = is_exported(tmp_path, kind, documented()[kind]["padding"])
    assert documented()[kind]["ONNX"] == ("works" if works else "rejected")


def test_all_that_is_asked_for_today_works_but_what_is_told():
    """The cells that may be refused: layers that are shared or of two kinds, and more than an
    encoder alone."""
    said = documented()
    rejected = {
        (kind, column)
        for kind in BACKBONES
        for column, cell in said[kind].items()
        if cell == "rejected"
    }
    assert rejected == {
        *(("albert", "layers"), ("t5", "layers")),
        *(("t5", "features"), ("t5", "ONNX")),
    }
    assert {kind for kind in BACKBONES if said[kind]["ONNX"] == "not tried"} == set()


def outcome(ask: Callable[[], object]) -> str:
    """Whether it works, or is rejected in one line."""
    said: Exception | None = None
    try:
        ask()
    except (UserError, RunError) as error:
        said = error
    assert "\n" not in str(said)
    return "works" if said is None else "rejected"


def as_a_teacher(folder: Path, kind: str) -> dict[str, str]:
    """Its answers in batches are those of plain Transformers on each text alone; and whether it
    stands what a student meets."""
    save_kind(folder, kind)
    checkpoint, examples = locate(str(folder)), example_set(texts(ROWS))
    model, tokenizer = load_classifier(checkpoint), load_tokenizer(checkpoint)
    settle(tokenizer, model.config)
    reset_attention(model.eval())
    padding = probed_padding(tokenizer, model.config, LONGEST)
    tokens = tokenize(tokenizer, examples, LONGEST)
    check_teacher(model, real_rows(tokenizer, examples, LONGEST, CPU, tokens), padding, kind)
    said_RC = np.zeros((len(examples), 2), np.float32)

    def done(places: np.ndarray, logits_RC: np.ndarray) -> None:
        said_RC[places] = logits_RC

    predict(model, tokens, np.arange(len(examples)), CPU, Cut(LONGEST, None, None, padding), done)
    expected_RC = alone(folder, texts(ROWS))
    assert expected_RC.std() > 0.005
    assert np.abs(said_RC - expected_RC).max() < 1e-3 * np.abs(expected_RC).max()
    limit = position_limit(model.config)
    # a row as long as the positions, or longer than any table here
    length = limit or 4 * LONGEST
    ids = torch.full((1, length), 7)
    ids[0, -1] = tokenizer.sep_token_id
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return {
        "teacher": "works",
        "padding": "neither" if padding == "none" else padding,
        "positions": "end" if limit else "open",
        "student": outcome(
            lambda: student_inputs(model, tokenizer, LONGEST, "the student", examples)
        ),
    }


def by_its_layers(folder: Path, kind: str) -> dict[str, str]:
    """Whether layers of it can be chosen: any, or some that begin with the first."""
    save_kind(folder, kind, **FOUR_LAYERS.get(kind, {"num_hidden_layers": 4}))
    whole = load_classifier(locate(str(folder))).eval()
    for layers, said in (([1, 3], "works"), ([0, 3], "from 0")):
        given = {"path": str(folder), "shape": None, "layers": layers, "tokenizer": None}
        entry = StudentConfig(**given)
        early = outcome(lambda entry=entry: check_start(entry, False))
        made: list[PreTrainedModel] = []
        assert early == outcome(
            lambda entry=entry, made=made: made.append(
                build_student(entry, TASK, grammar_tokenizer(), 0)
            )
        )
        if made:
            assert_layers_work_as(made[0].eval(), whole, layers)
            made[0].save_pretrained(folder / "cut")
            plain = AutoModelForSequenceClassification.from_pretrained(folder / "cut").eval()
            ids = {"input_ids": torch.arange(30)[None] + 5}
            with torch.inference_mode():
                torch.testing.assert_close(plain(**ids).logits, made[0](**ids).logits)
            return {"layers": said}
    return {"layers": "rejected"}


def its_features(kind: str) -> str:
    """The methods that read hidden states or attention rightly."""
    model, inputs = build_kind(kind), model_inputs(LONGEST)
    settle(inputs.tokenizer, model.config)
    read = [
        method
        for method in METHODS
        if outcome(lambda method=method: check_layer_outputs(model, inputs, method, "it"))
        == "works"
    ]
    return "all" if len(read) == len(METHODS) else ", ".join(read) or "rejected"


def is_exported(folder: Path, kind: str, side: str) -> bool:
    """Whether onnxruntime answers as PyTorch does, for any number of rows and tokens."""
    model, tokenizer = build_kind(kind), grammar_tokenizer()
    settle(tokenizer, model.config)
    rows = rows_alone(tokenizer, texts(6), LONGEST)
    pads = int(tokenizer.pad_token_id), int(tokenizer.pad_token_type_id)
    batch = padded(rows, side, *pads)
    two = {name: tensor[:2] for name, tensor in batch.items()}
    if outcome(lambda: onnx_export.write_onnx(model, two, folder / "x.onnx")) == "rejected":
        return False
    run = onnx_export.open_onnx(folder / "x.onnx", 1)
    for inputs in (batch, rows[0], rows[3], two):
        with torch.inference_mode():
            expected_RC = model(**inputs).logits
        if float((run(inputs) - expected_RC).abs().max()) > 1e-4 * max(1, expected_RC.abs().max()):
            return False
    return True
