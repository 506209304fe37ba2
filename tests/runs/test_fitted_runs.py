"""A run whose ensemble is fitted to the gold labels of its selection split."""

import json

import numpy as np
import pytest
from small import (
    ALONE,
    grammar_task,
    logits_of,
    model_bytes,
    read,
    save_teacher,
    sweep_words,
    words,
    write_task,
)
from transformers import AutoModelForSequenceClassification

from sead_dist.config.load import load_config
from sead_dist.data.splits import load_examples
from sead_dist.errors import UserError
from sead_dist.objectives.teacher_weights import fit_probabilities
from sead_dist.runs.distillation import distill
from sead_dist.runtime.distributed import StopFlag
from sead_dist.sweep.run import run_sweep

FITTED = {"ensemble": "fitted", "selection__fraction": 0.5, "max_steps": 4}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("fitted")
    teachers = [save_teacher(root / "a"), save_teacher(root / "b", seed=1)]
    return write_task(root / "data", rows=420, dev=8), teachers


def test_weights_are_those_of_the_selection_split_and_stay_when_the_run_is_resumed(task, tmp_path):
    data, teachers = task
    distill(load_config(words(data, teachers, tmp_path / "whole", **FITTED)), ALONE)
    kept = read(tmp_path / "whole" / "ensemble.json")
    given = load_config(words(data, teachers, tmp_path / "run", **FITTED))
    selection = load_examples(given, grammar_task(data)).selection
    models = [AutoModelForSequenceClassification.from_pretrained(one).eval() for one in teachers]
    logits_NBC = np.stack([logits_of(model, selection.texts_a) for model in models])
    assert kept["weights"] == pytest.approx(
        fit_probabilities(logits_NBC, selection.labels_B), abs=1e-3
    )
    stop = StopFlag()
    stop.signal = 15
    distill(given, ALONE, stop=stop)
    # as if the answers had a last digit of another machine
    kept["weights"] = [0.25, 0.75]
    (tmp_path / "run" / "ensemble.json").write_text(json.dumps(kept))
    distill(given, ALONE)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "weights: a 0.250, b 0.750" in log
    assert model_bytes(tmp_path / "run") != model_bytes(tmp_path / "whole")


def test_too_few_labelled_rows_are_refused_with_their_number(task, tmp_path):
    data, teachers = task
    changes = {**FITTED, "selection__fraction": 0.4}
    needs = "ensemble=fitted needs 200 labelled rows in the selection split, and it has 1[67][0-9];"
    with pytest.raises(UserError, match=needs):
        distill(load_config(words(data, teachers, tmp_path / "run", **changes)), ALONE)
    assert not (tmp_path / "run").exists()
    method = tmp_path / "mine.yaml"
    method.write_text("ensemble: fitted\n")
    folder = tmp_path / "grammar"
    write_task(folder)
    with pytest.raises(UserError, match="needs 200 labelled rows"):
        run_sweep(sweep_words(folder, tmp_path / "sweep", f"methods=[{method}]"), ALONE)
    assert not list((tmp_path / "sweep").glob("grammar/teachers/*"))
