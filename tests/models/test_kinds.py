"""docs/models.md says of each kind of model what the self-check decides."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import KINDS, alone, save_kind, texts
from small import CPU, example_set

from sead_dist.data.tokens import tokenize
from sead_dist.errors import UserError
from sead_dist.models.inputs import settle, student_inputs
from sead_dist.models.inputs_check import (
    check_teacher,
    probed_padding,
    real_rows,
    reset_attention,
)
from sead_dist.models.pretrained import load_tokenizer, locate, position_limit
from sead_dist.models.sequence_classifier import load_classifier
from sead_dist.teachers.inference import Cut, predict

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LONGEST, ROWS = 64, 12
# a row of the table: | name | `kind` | padding | positions | as a student |
ROW = re.compile(r"^\| [^|]+ \| `([^`]+)` \| (\w+) \| (\w+) \| (\w+) \|$", re.M)


def documented() -> dict[str, tuple[str, str, str]]:
    """(padding as a teacher, whether its positions end, outcome as a student) of each kind."""
    rows = ROW.findall(DOCS.read_text(encoding="utf-8"))
    return {kind: (padding, positions, student) for kind, padding, positions, student in rows}


def test_the_table_has_a_row_for_each_kind_that_is_tried():
    assert sorted(documented()) == sorted(KINDS)
    assert len(KINDS) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_is_what_the_table_says(tmp_path, kind):
    folder = save_kind(tmp_path, kind)
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
    try:
        student_inputs(model, tokenizer, LONGEST, "the student", examples)
        student = "works"
    except UserError:
        student = "refused"
    found = "neither" if padding == "none" else padding, "end" if limit else "open", student
    assert found == documented()[kind]
