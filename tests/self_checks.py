"""A model's self-check on the rows of a batch is made once in a process, not in each run.

It depends on the model's shape, its dtype and the threads, which the tests' teachers share. What it
finds is shown in `teachers/test_forward.py`, which calls it itself.
"""

import json

import pytest
import torch
from transformers import PretrainedConfig

from sead_dist.models.pretrained import is_own_code
from sead_dist.teachers import teacher
from sead_dist.teachers.inference import free_rows_from, probe_config


def make_once(patch: pytest.MonkeyPatch) -> None:
    found: dict[tuple[object, ...], int | None] = {}

    def remembered(
        config: PretrainedConfig, dtype: str, device: torch.device, weights: str | None = None
    ) -> int | None:
        if is_own_code(type(config)):
            return free_rows_from(config, dtype, device, weights)
        facts = {**probe_config(config).to_dict(), "_name_or_path": None}
        shape = json.dumps(facts, sort_keys=True, default=str)
        key = shape, dtype, device, weights, torch.get_num_threads()
        if key not in found:
            found[key] = free_rows_from(config, dtype, device, weights)
        return found[key]

    patch.setattr(teacher, "free_rows_from", remembered)
