"""A prediction depends on the teacher and the example alone: invariant 3.

R rows of a request, C classes.
"""

import copy

import numpy as np
import pytest
import torch
from small import (
    CPU,
    SHAPES,
    build_model,
    example_set,
    load_teachers,
    logits_of,
    save_teacher,
    sentences,
)
from transformers import AutoConfig

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.data.order import make_split
from sead_dist.models.sequence_classifier import DTYPES
from sead_dist.teachers.inference import (
    SHAPES as BATCHES,
)
from sead_dist.teachers.inference import (
    Cut,
    NotFiniteError,
    cut_into_batches,
    free_rows_from,
    padded_length,
    predict,
    rows_for,
    rows_per_batch,
)

# as many rows of one length as more than a batch holds, and a few of every other length
WORDS = sorted(set(" ".join(sentences(50)).split()))
TEXTS = [f"{one} {two}" for one in WORDS for two in WORDS][:68] + sentences(12)


def tokens_of(texts):
    return make_split(example_set(texts), grammar_tokenizer(), 32).tokens


TOKENS = tokens_of(TEXTS)


def ask(model, rows, free_from=None, tokens=TOKENS) -> np.ndarray:
    """Own-order logits_RC of these rows, in their order."""
    rows_R = np.asarray(rows)
    logits_RC = np.full((len(rows_R), 2), np.nan, np.float32)

    def done(part, logits_PC):
        assert np.isnan(logits_RC[part]).all()
        logits_RC[part] = logits_PC

    predict(model, tokens, rows_R, CPU, Cut(80, free_from), done)
    assert not np.isnan(logits_RC).any()
    return logits_RC


def teacher(kind, dtype):
    return build_model(kind).to(DTYPES[dtype])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("bert", "fp32"),
        ("bert", "bf16"),
        ("roberta", "fp32"),
        ("electra", "bf16"),
        ("distilbert", "fp32"),
        ("deberta-v2", "fp32"),
        ("mpnet", "bf16"),
    ],
)
def test_invariant_03_a_prediction_has_the_same_bits_in_any_company(kind, dtype):
    model = teacher(kind, dtype)
    free_rows = free_rows_from(model.config, dtype, CPU)
    everyone = np.arange(len(TEXTS))
    expected = ask(model, everyone)
    random = np.random.default_rng(0)
    torch.manual_seed(99)  # no generator's state matters
    for free_from in {None, free_rows}:
        np.testing.assert_array_equal(ask(model, everyone, free_from), expected)
        for row in random.choice(everyone, 2, replace=False):
            np.testing.assert_array_equal(ask(model, [row], free_from)[0], expected[row])
        for count in (7, 40):
            rows = random.choice(everyone, count, replace=False)
            np.testing.assert_array_equal(ask(model, rows, free_from), expected[rows])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("bert", "fp32"),
        ("roberta", "bf16"),
        pytest.param("bert", "bf16", marks=pytest.mark.slow),
        pytest.param("roberta", "fp32", marks=pytest.mark.slow),
    ],
)
def test_invariant_03_a_prediction_has_the_same_bits_on_any_number_of_threads(kind, dtype):
    model = teacher(kind, dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            free_rows = free_rows_from(model.config, dtype, CPU)
            if free_rows is None:
                pytest.skip("here bits depend on the threads, and the store's key names them")
            found.append(ask(model, np.arange(len(TEXTS)), free_rows))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_invariant_03_other_texts_in_the_set_do_not_matter(dtype):
    model = teacher("bert", dtype)
    few = TEXTS[60:75]
    alone = ask(model, np.arange(len(few)), tokens=tokens_of(few))
    np.testing.assert_array_equal(alone, ask(model, np.arange(60, 75)))


def test_invariant_03_every_batch_has_a_guard_row_and_a_fixed_number_of_rows():
    seen = []
    model = teacher("bert", "fp32")
    model.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["attention_mask"].clone()), with_kwargs=True
    )
    ask(model, np.arange(len(TEXTS)))
    ask(model, [3])
    for mask in seen:
        assert mask.shape[0] == rows_per_batch(mask.shape[1], "cpu")
        assert mask[-1].sum() == 1
    assert len({mask.shape[1] for mask in seen}) > 3
    seen.clear()
    ask(model, np.arange(len(TEXTS)), free_from=BATCHES["cpu"].free_most)
    ask(model, [3], free_from=2)
    for mask in seen:
        # where rows are free there are fewer, but never a batch without padding
        assert mask.shape[1] % 2 == 0
        assert not mask.all()
    assert [len(mask) for mask in seen] != [rows_per_batch(m.shape[1], "cpu") for m in seen]


def test_predictions_are_those_of_the_bare_model():
    for kind in SHAPES:
        model = teacher(kind, "fp32")
        np.testing.assert_allclose(
            ask(model, np.arange(5)), logits_of(model, TEXTS[:5]), rtol=1e-4, atol=1e-4
        )


def test_the_padded_length_is_a_function_of_the_rows_own_length():
    given = np.array([1, 2, 3, 63, 64, 65, 72, 73])
    assert padded_length(given, "cpu").tolist() == [2, 2, 4, 64, 64, 72, 72, 80]
    assert padded_length(given, "cuda").tolist() == [8, 8, 8, 64, 64, 72, 72, 80]


def test_on_a_gpu_batches_have_no_other_row_count_than_the_self_check_has_seen():
    counts = BATCHES["cuda"].counts
    full = rows_per_batch(64, "cuda")
    for free_from in (32, 192):
        found = {rows_for(count, 64, "cuda", free_from) for count in range(1, full + 1)}
        assert found == {rows for rows in counts if rows >= free_from} | {full}
        assert all(rows_for(count, 64, "cuda", free_from) >= count for count in range(1, full + 1))
    assert rows_for(3, 64, "cuda", None) == full
    # a long text's full count may be less than any of these
    assert rows_for(3, 2048, "cuda", 64) == rows_per_batch(2048, "cuda") == 32


def test_rows_are_cut_once_each_longest_first_with_room_for_the_guard():
    lengths_R = np.random.default_rng(0).integers(2, 80, 500)
    parts = list(cut_into_batches(lengths_R, "cpu", 78))
    assert sorted(np.concatenate([part for part, _ in parts]).tolist()) == list(range(500))
    assert [length for _, length in parts] == sorted((length for _, length in parts), reverse=True)
    for part, length in parts:
        assert len(part) < rows_per_batch(length, "cpu")
        assert np.minimum(lengths_R[part], 78).max() <= length
    # a length is never beyond the teacher's positions
    assert max(length for _, length in parts) == 78


def test_a_row_count_that_changes_bits_is_found_by_the_self_check():
    # a layer whose result depends on the batch, as some kernels' does
    config = copy.deepcopy(build_model().config)
    free_rows = free_rows_from(config, "fp32", CPU)
    assert free_rows is not None
    assert free_rows <= BATCHES["cpu"].free_most
    from transformers.models.bert import modeling_bert

    original = modeling_bert.BertPooler.forward
    try:
        modeling_bert.BertPooler.forward = lambda self, h: original(self, h) + h.shape[0] / 1e4
        assert free_rows_from(config, "fp32", CPU) is None
    finally:
        modeling_bert.BertPooler.forward = original


def test_the_row_counts_of_one_width_and_numbers_are_tried_once(tmp_path, monkeypatch):
    tried = []

    def trying(config, dtype, *more):
        tried.append((config.hidden_size, dtype))
        return free_rows_from(config, dtype, *more)

    monkeypatch.setattr("sead_dist.teachers.teacher.free_rows_from", trying)
    # of other depth, other order of classes, and read elsewhere
    first = save_teacher(tmp_path / "a")
    deep = save_teacher(tmp_path / "b", seed=1, num_hidden_layers=3)
    other = save_teacher(tmp_path / "c", seed=2, labels=("positive", "negative"))
    teachers = load_teachers([first, deep, other])
    assert tried == [(32, "fp32")]
    assert len({teacher.cut for teacher in teachers}) == 1
    tried.clear()
    wide = save_teacher(tmp_path / "d", hidden_size=64)
    load_teachers([first, wide, f"{{path: {first}, dtype: bf16}}"])
    assert tried == [(32, "fp32"), (64, "fp32"), (32, "bf16")]


def test_the_self_check_leaves_the_generator_and_the_threads_alone():
    # the probe's made-up rows are not text for BART, which needs an end in each
    bart = AutoConfig.for_model(
        "bart", d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=128,
    )  # fmt: skip
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for config, free in ((build_model().config, True), (bart, False)):
            torch.manual_seed(5)
            expected = torch.rand(3)
            torch.manual_seed(5)
            assert (free_rows_from(config, "fp32", CPU) is not None) == free
            assert torch.equal(torch.rand(3), expected)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_row_without_a_finite_answer_is_named_by_its_place():
    model = teacher("bert", "fp32")
    good = grammar_tokenizer()("good")["input_ids"][1]
    with torch.no_grad():
        model.get_input_embeddings().weight[good] = float("nan")
    texts = ["the plot was bad", "bad", "good", "the cast was bad"]
    with pytest.raises(NotFiniteError) as caught:
        ask(model, [0, 1, 2, 3], tokens=tokens_of(texts))
    assert caught.value.position == 2
