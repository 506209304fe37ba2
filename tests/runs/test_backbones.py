"""Today's kinds of models in whole runs: taught by one of its kind, killed, resumed, read again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import BACKBONES, FOUR_LAYERS, alone, save_kind, texts
from ranks import finish, start
from small import config, kill_at, model_bytes, newest, read, run_distill, words, write_task
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FEW = ("modernbert", "gpt2")
# whose layers cannot be chosen
WHOLE = ("albert", "t5")
STEPS = 5


def given(data: Path, root: Path, folder: Path, layers: str) -> list[str]:
    keys = words(data, [folder], root / "run", root / "store", max_steps=STEPS, save_steps=1,
                 keep_training_state="true", final_checkpoint="last", max_length=32)  # fmt: skip
    kept = [word for word in keys if not word.startswith("student.")]
    return [*kept, f"student={folder}", f"student.layers={layers}"]


@pytest.mark.parametrize(
    "kind", [k if k in FEW else pytest.param(k, marks=pytest.mark.slow) for k in BACKBONES]
)
def test_a_student_of_a_kind_is_taught_resumes_and_is_read_by_plain_transformers(tmp_path, kind):
    folder = save_kind(tmp_path / "m", kind, **FOUR_LAYERS.get(kind, {"num_hidden_layers": 4}))
    data = write_task(tmp_path / "data")
    layers = "null" if kind in WHOLE else "[0,3]"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    keys = [given(data, root, folder, layers) for root in (whole, killed)]
    finish(start(1, whole / "ranks", run_distill, keys[0]), whole / "ranks", 120.0)
    kill_at(2, killed, keys[1])
    assert newest(killed) < STEPS
    finish(start(1, killed / "ranks", run_distill, keys[1]), killed / "ranks", 120.0)
    assert model_bytes(killed / "run") == model_bytes(whole / "run")
    assert config(*keys[0]).student.layers == (None if kind in WHOLE else [0, 3])
    saved = whole / "run" / "model"
    depth = 4 if kind in WHOLE else 2
    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    assert model.config.num_hidden_layers == depth
    assert read(whole / "run" / "run_summary.json")["steps"] == STEPS
    # in a batch as alone
    tokenizer = AutoTokenizer.from_pretrained(saved)
    batch = tokenizer(texts(8), padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.inference_mode():
        said_RC = model(**batch).logits.numpy()
    expected_RC = alone(saved, texts(8), 32)
    assert np.abs(said_RC - expected_RC).max() < 1e-3 * np.abs(expected_RC).max()
