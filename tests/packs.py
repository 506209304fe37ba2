"""What stands in for PyTorch's kernel for unequal lengths, which runs on GPUs alone."""

import itertools

import pytest
import torch
from torch.nn.attention import varlen

from sead_dist.planning import workload as estimate
from sead_dist.teachers import inference as forward
from sead_dist.teachers import packing

SIZES = (512, 1024, 2048)


def kernel(query_THD, key_THD, value_THD, offsets, also, most, _most):
    """What PyTorch's kernel computes, row by row."""
    assert torch.equal(offsets, also)
    found_THD = torch.full_like(query_THD, float("nan"))
    ends = offsets.tolist()
    assert ends[-1] == len(query_THD)
    for start, end in itertools.pairwise(ends):
        assert end - start <= most
        if end > start:
            parts = (part[start:end].transpose(0, 1) for part in (query_THD, key_THD, value_THD))
            attended = torch.nn.functional.scaled_dot_product_attention(*parts)
            found_THD[start:end] = attended.transpose(0, 1)
    return found_THD


def stand_in_for_packs(patch: pytest.MonkeyPatch) -> None:
    """The kernel, and packs of few tokens, which a CPU has through in no time."""
    patch.setattr(varlen, "varlen_attn", kernel)
    for module in (packing, forward, estimate):
        patch.setattr(module, "SIZES", SIZES)
