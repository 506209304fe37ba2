"""Batches without padding: their logits are those of padded ones, and the self-check finds what
would make them others. The kernel is a stand-in here: PyTorch's runs on GPUs alone (tests/gpu).

R rows of a request, T tokens of a pack.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from packs import kernel, stand_in_for_packs
from small import CPU, build_model, example_set, load_teachers, save_teacher, sentences

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.data.order import TokenTable, make_split
from sead_dist.errors import UserError
from sead_dist.planning.workload import batch_shapes
from sead_dist.teachers import packing
from sead_dist.teachers.inference import Cut, batches_of, predict
from sead_dist.teachers.rates import measure_teacher

KINDS = ["bert", "roberta", "electra"]
TEXTS = [*sentences(40), "good", "bad plot"]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    stand_in_for_packs(monkeypatch)


def ask(model, tokens: TokenTable, rows_R, cut: Cut) -> np.ndarray:
    logits_RC = np.full((len(rows_R), model.config.num_labels * tokens.choices), np.nan, np.float32)

    def done(part, logits_PC):
        assert np.isnan(logits_RC[part]).all()
        logits_RC[part] = logits_PC

    predict(model, tokens, np.asarray(rows_R), CPU, cut, done)
    assert not np.isnan(logits_RC).any()
    return logits_RC


def tokens_of(texts) -> TokenTable:
    return make_split(example_set(texts), grammar_tokenizer(), 64).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_with_a_stand_in_kernel_are_those_of_padded_batches(kind):
    tokens, rows = tokens_of(TEXTS), np.arange(len(TEXTS))[::-1]
    padded = ask(build_model(kind), tokens, rows, Cut(64, 2))
    packed = ask(packing.use_packs(build_model(kind)), tokens, rows, Cut(64, 2, 512))
    np.testing.assert_allclose(packed, padded, rtol=1e-4, atol=1e-4)


def test_packed_pairs_and_choices_with_a_stand_in_kernel_keep_their_types_and_places():
    random = np.random.default_rng(0)
    counts = random.integers(3, 30, 24)
    ids = random.integers(3, 60, counts.sum()).astype(np.int32)
    types = random.integers(0, 2, counts.sum()).astype(np.int8)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    tokens = TokenTable(
        ids, types, offsets, choices=3, pad_id=0, pad_type=0, cut=np.zeros(0, np.int64)
    )
    padded = ask(build_model(), tokens, np.arange(8), Cut(64, None))
    packed = ask(packing.use_packs(build_model()), tokens, np.arange(8), Cut(64, None, 512))
    np.testing.assert_allclose(packed, padded, rtol=1e-4, atol=1e-4)
    types[:] = 0
    other = ask(packing.use_packs(build_model()), tokens, np.arange(8), Cut(64, None, 512))
    assert np.abs(other - padded).max() > 0.01


def test_rows_are_packed_once_each_within_the_sizes_and_their_spare_rows():
    random = np.random.default_rng(0)
    counts = random.integers(2, 64, 400)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = np.ones(counts.sum(), np.int32)
    tokens = TokenTable(
        ids, None, offsets, choices=2, pad_id=0, pad_type=0, cut=np.zeros(0, np.int64)
    )
    rows = random.permutation(200)
    parts = list(packing.cut_into_packs(tokens, rows, 512))
    assert sorted(np.concatenate([part for part, _ in parts]).tolist()) == list(range(200))
    per_row = counts.reshape(-1, 2).sum(axis=1)
    lengths_of: dict[int, set[int]] = {}
    for part, size in parts:
        assert size in packing.SIZES
        assert per_row[rows[part]].sum() <= size
        inputs = packing.pack_inputs(tokens, rows[part], size, build_model().config)
        assert inputs["input_ids"].shape == (1, size)
        steps = np.diff(inputs["offsets"].numpy())
        assert steps.min() >= 0
        assert steps.sum() == size
        assert steps.max() == inputs["most"] <= 80
        lengths_of.setdefault(size, set()).add(len(steps))
    # the shapes of all tensors follow from the size
    assert all(len(found) == 1 for found in lengths_of.values())
    # many short rows need room for themselves, whatever their tokens
    short = TokenTable(ids[:600], None, np.arange(0, 602, 2), 1, 0, 0, np.zeros(0, np.int64))
    (*_, last) = packing.cut_into_packs(short, np.arange(300), 512)
    assert [size for _, size in packing.cut_into_packs(short, np.arange(300), 512)] == [2048, 512]
    assert len(last[0]) == 300 - 2048 // packing.TOKENS_PER_ROW


def test_a_pack_asks_for_as_many_tokens_as_bits_need():
    tokens = tokens_of(TEXTS[:2])
    for least in (512, 1024):
        ((_, inputs),) = batches_of(
            tokens, np.arange(2), CPU, Cut(64, None, least), build_model().config
        )
        assert inputs["input_ids"].shape == (1, least)


def test_the_self_check_with_a_stand_in_kernel_passes_and_finds_what_is_wrong(monkeypatch):
    config = build_model().config
    assert packing.self_check(config, "fp32", CPU) is not None
    from torch.nn.attention import varlen

    def leaks(*given):  # every row sees all
        query, key, value, *_ = given
        ends = torch.tensor([0, len(query)])
        return kernel(query, key, value, ends, ends, len(query), 0)

    def depends_on_place(query, *others):
        place = torch.arange(len(query))[:, None, None] / len(query) * 1e-2
        return kernel(query, *others) + place

    def says_nothing(query, *_others):
        return torch.zeros_like(query)

    def breaks(*_given):
        raise RuntimeError("no kernel for this")

    for wrong in (leaks, depends_on_place, says_nothing, breaks):
        monkeypatch.setattr(varlen, "varlen_attn", wrong)
        assert packing.self_check(config, "fp32", CPU) is None

    def full(*_given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    # a run that went on padded would be of another numerics class than before
    monkeypatch.setattr(varlen, "varlen_attn", full)
    with pytest.raises(UserError, match="too little free memory"):
        packing.self_check(config, "fp32", CPU)


@pytest.mark.parametrize("hidden", [32, 128, 256])
def test_the_self_check_sees_attention_at_any_width_with_a_stand_in_kernel(monkeypatch, hidden):
    from torch.nn.attention import varlen

    config = build_model("bert").config
    config.hidden_size, config.initializer_range = hidden, 0.02
    assert packing.self_check(config, "fp32", CPU) is not None
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *_others: torch.zeros_like(query))
    assert packing.self_check(config, "fp32", CPU) is None


def test_what_cannot_be_packed_is_padded(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(packing, "self_check", lambda *_given: 512)
    bert = build_model("bert").config
    assert packing.packs_from(bert, "bf16", gpu) == 512
    # no kernel on this device, for this dtype, for this model
    assert packing.packs_from(bert, "bf16", CPU) is None
    assert packing.packs_from(bert, "fp32", gpu) is None
    assert packing.packs_from(build_model("deberta-v2").config, "bf16", gpu) is None
    for change in ({"is_decoder": True}, {"auto_map": {"AutoModel": "mine.Model"}}):
        other = build_model("bert").config
        other.update(change)
        assert packing.packs_from(other, "bf16", gpu) is None


def test_rates_and_estimates_know_packs_with_a_stand_in_kernel(tmp_path):
    (teacher,) = load_teachers([save_teacher(tmp_path / "one")])
    packed = replace(teacher, cut=replace(teacher.cut, pack_from=512))
    rate = measure_teacher(packed, CPU, False, [8, 16], time.monotonic() + 60)
    assert rate.lengths_K == (8, 16)
    assert min(rate.row_s_K) > 0
    # a pack of 2,048 tokens has room for 256 texts at most
    assert packed.cut.full_rows(np.array([4, 16, 64]), "cpu").tolist() == [256, 128, 32]
    requests = [np.full(200, 16), np.array([10, 20])]
    lengths_P, rows_P = batch_shapes(packed, requests, "cpu")
    assert lengths_P == [16, 16, 15]
    # 3,200 tokens: a full pack and one of 2,048, which holds 1,152; 30 tokens: the least
    assert rows_P == [128, 128, 34]
