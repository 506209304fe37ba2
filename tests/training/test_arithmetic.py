"""What a run says of numbers that this machine is slow in."""

import pytest
import torch
from small import CPU, config

from sead_dist.training.engine import slow_arithmetic


@pytest.mark.parametrize(
    ("keys", "capability", "told"),
    [
        ({"precision": "bf16"}, "AVX2", True),
        ({"teacher_precision": "bf16"}, "AVX2", True),
        ({"teachers": "[{path: one, dtype: bf16}]"}, "AVX2", True),
        ({"teachers": "[{path: one, dtype: bf16}]"}, "AVX512", False),
        ({}, "AVX2", False),
    ],
)
def test_bf16_is_called_slow_where_the_processor_has_no_instructions_for_it(
    monkeypatch, keys, capability, told
):
    given = config(**{"teachers": "[one]", **keys})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert bool(slow_arithmetic(given, CPU)) == told
    assert slow_arithmetic(given, torch.device("cuda", 0)) == []
