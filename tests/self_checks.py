"""What a run tries before it works is tried once in a session of tests, not in each run.

These are a model's self-checks on the rows of a batch, the padding of its kind, and the report of
made-up scores. Each depends on few facts, which the tests' runs share. What is found is kept in the
folder KEPT_IN, so that forked processes read it too. Tests of the checks themselves call them, or
use the fixture `all_tried`, which takes the folder away.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils.memory
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sead_dist.models import inputs
from sead_dist.models.inputs_check import Padding, probed_padding
from sead_dist.models.pretrained import is_own_code
from sead_dist.runs import distillation
from sead_dist.runs.setup import RunSetup
from sead_dist.teachers import teacher
from sead_dist.teachers.inference import free_rows_from, probe_config

# the environment variable with the folder of this session's findings
KEPT_IN = "SEAD_DIST_TESTS_TRIED"


def make_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(teacher, "free_rows_from", remembered_rows)
    patch.setattr(inputs, "probed_padding", remembered_padding)
    patch.setattr(distillation, "try_report", remembered_report(distillation.try_report))
    # Accelerate collects garbage at the end of a run, which takes longer than a tiny run's training
    patch.setattr(accelerate.utils.memory, "gc", SimpleNamespace(collect=lambda: 0))


def once(facts: object, make: Callable[[], Any]) -> Any:
    """What `make` gives for these facts, from the session's folder where it was made before.
    Raises what `make` raises; then nothing is kept."""
    if KEPT_IN not in os.environ:
        return make()
    text = json.dumps(facts, sort_keys=True, default=str)
    path = Path(os.environ[KEPT_IN]) / hashlib.sha256(text.encode()).hexdigest()
    if path.exists():
        return json.loads(path.read_text())
    found = make()
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(found))
    aside.replace(path)
    return found


def remembered_rows(
    config: PretrainedConfig, dtype: str, device: torch.device, weights: str | None = None
) -> int | None:
    if is_own_code(type(config)):
        return free_rows_from(config, dtype, device, weights)
    shape = {**probe_config(config).to_dict(), "_name_or_path": None}
    facts = "rows", shape, dtype, str(device), weights, torch.get_num_threads()
    rows: int | None = once(facts, lambda: free_rows_from(config, dtype, device, weights))
    return rows


def remembered_padding(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, max_length: int
) -> Padding:
    if is_own_code(type(config)):
        return probed_padding(tokenizer, config, max_length)
    words = type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map
    ways = tokenizer.padding_side, tokenizer.model_input_names, tokenizer.pad_token_type_id
    shape = {**config.to_dict(), "_name_or_path": None}
    facts = "padding", words, ways, shape, max_length
    padding: Padding = once(facts, lambda: probed_padding(tokenizer, config, max_length))
    return padding


def remembered_report(try_report: Callable[[RunSetup], None]) -> Callable[[RunSetup], None]:
    """`try_report` once for all names that stand in a report."""

    def remembered(setup: RunSetup) -> None:
        task = setup.task
        facts = (
            *("report", task.name, task.kind, task.labels, task.score_range, task.metrics),
            *(list(setup.splits.official), [one.name for one in setup.teachers]),
            *(setup.config.method, setup.config.prediction_texts),
        )
        once(facts, lambda: try_report(setup))

    return remembered
