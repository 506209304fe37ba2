"""Order, slicing and padding: invariant 1.

B rows of a micro-batch, G rows of a global batch, S steps, U unique examples.
"""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from small import config, example_set, sentences, small_split

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.data.examples import subset
from sead_dist.data.order import (
    BatchStream,
    Cursor,
    cut_by_tokens,
    cut_into_micro_batches,
    epoch_order,
    make_batch,
    make_split,
    tokenize,
)
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.objectives.losses import total_loss
from sead_dist.teachers.base import Request, stream


def batches_of(split, rank=0, size=1, seed=3, epochs=2, global_batch=8, micro_batch=2, most=None):
    return BatchStream(split, seed, global_batch, micro_batch, epochs, most, rank, size)


class Recorder:
    """A teacher source that answers entry e with the logits (e, -e), and notes what it is asked."""

    def __init__(self):
        self.needed: list[np.ndarray] = []

    def submit(self, request: Request) -> "Recorder":
        self.needed.append(request.entries_R)
        self.answer = torch.tensor(request.entries_R, dtype=torch.float32)
        return Answer(self.answer)


class Answer:
    def __init__(self, entries_R: torch.Tensor):
        self.entries_R = entries_R

    def result(self) -> TeacherLogits:
        logits_NRC = torch.stack([self.entries_R, -self.entries_R], -1)[None]
        return TeacherLogits(logits_NRC, torch.ones(1, len(self.entries_R), dtype=torch.bool))


def seen_rows(split, size, prefetch_rows, start=0, depth=0, **more):
    """{(step, micro): its rows' entries, teachers' answers} over all ranks, valid rows alone."""
    found = {}
    for rank in range(size):
        batches = batches_of(split, rank, size, **more)
        taught_steps = stream(batches, Recorder(), start, prefetch_rows, depth, lambda *_: None)
        for taught in taught_steps:
            for batch, teachers in zip(taught.step.batches, taught.teachers, strict=True):
                keep = batch.valid_B
                rows = batch.entries_B[keep].tolist()
                if rows:
                    assert (batch.step, batch.micro) not in found
                    found[batch.step, batch.micro] = (
                        rows,
                        teachers.logits_NBC[0, keep, 0].tolist(),
                        batch.inputs["input_ids"][keep].tolist(),
                    )
    return found


def test_invariant_01_order_does_not_depend_on_ranks_prefetch_rows_depth_or_restarts():
    split = small_split(21)
    expected = seen_rows(split, size=1, prefetch_rows=10**6)
    # two epochs of all 21 rows, the last batch of five rows included
    assert sorted(e for rows, _, _ in expected.values() for e in rows) == sorted(2 * [*range(21)])
    for rows, teachers, _ in expected.values():
        assert rows == [int(e) for e in teachers]
    for size in (1, 2, 4):
        for prefetch_rows in (1, 8, 20, 10**6):
            for depth in (0, 1):
                assert seen_rows(split, size, prefetch_rows, depth=depth) == expected
    for start in (1, 3, 5):
        tail = {place: seen for place, seen in expected.items() if place[0] >= start}
        assert seen_rows(split, size=2, prefetch_rows=9, start=start) == tail


def test_invariant_01_rows_that_fill_the_shape_reach_neither_teachers_nor_the_loss():
    # the short batch holds the longest rows, so row -1 would be seen among what is asked for
    texts = sorted(sentences(21), key=len, reverse=True)
    split = make_split(example_set(texts), grammar_tokenizer(), 32)
    for size, seed in [(1, 0), (2, 1), (3, 2)]:
        for rank in range(size):
            source = Recorder()
            batches = batches_of(split, rank, size, seed, global_batch=12, micro_batch=4)
            taught_steps = list(stream(batches, source, 0, 12, 0, lambda *_: None))
            # what is asked for are the valid rows of the step, each once, on every rank
            for taught, needed_R in zip(taught_steps, source.needed, strict=True):
                rows_G = batches.rows(taught.step.number)
                assert needed_R.tolist() == sorted(split.entry_B[rows_G].tolist())
            for taught in taught_steps:
                for batch in taught.step.batches:
                    check_fillers_count_nothing(batch, taught.step.valid_rows)


def test_the_first_step_of_a_window_names_the_steps_that_its_wait_was_for():
    batches = batches_of(small_split(21), 0, 1)
    for depth in (0, 1):
        taught_steps = list(stream(batches, Recorder(), 2, 9, depth, lambda *_: None))
        windows = {one.step.number: one.window for one in taught_steps if one.window is not None}
        assert windows == {steps.start: steps for steps in batches.windows(2, 9)}
        assert [one.step.number for one in taught_steps if one.waited_s] == list(windows)


def check_fillers_count_nothing(batch, valid_rows):
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(len(batch.valid_B), 2, generator=generator)
    one = total_loss(logits_BC, batch.labels_B, batch.valid_B, None, "kl", 0.5, valid_rows).total
    logits_BC[~batch.valid_B] += 100 * torch.randn(2, generator=generator)
    two = total_loss(logits_BC, batch.labels_B, batch.valid_B, None, "kl", 0.5, valid_rows).total
    assert torch.equal(one, two)
    assert bool(one == 0) == (not batch.valid_B.any())


def test_every_rank_does_as_many_forwards_and_valid_rows_add_up():
    split = small_split(21)
    for size in (1, 2, 3, 4, 5):
        streams = [
            batches_of(split, rank, size, global_batch=8, micro_batch=2) for rank in range(size)
        ]
        for step in range(streams[0].total_steps):
            parts = [stream.step(step) for stream in streams]
            assert len({len(part.batches) for part in parts}) == 1
            valid = sum(int(b.valid_B.sum()) for part in parts for b in part.batches)
            assert {part.valid_rows for part in parts} == {valid}


def test_epochs_differ_and_seeds_differ():
    one = epoch_order(1000, 0, 0, 32)
    assert sorted(one[one >= 0].tolist()) == list(range(1000))
    assert not np.array_equal(one, epoch_order(1000, 0, 1, 32))
    assert not np.array_equal(one, epoch_order(1000, 1, 0, 32))


def long_and_short(rows=400):
    """A split whose label is decided by the length of the text."""
    labels = ["negative", "positive"]
    texts = [" ".join(["very"] * (1 + n % 40)) for n in range(rows)]
    return make_split(
        example_set(texts, [labels[n % 40 >= 20] for n in range(rows)]), grammar_tokenizer(), 64
    )


def test_invariant_01_a_batch_is_a_random_sample_whatever_the_lengths():
    split = long_and_short()
    batches = batches_of(split, epochs=40, global_batch=20, micro_batch=5)
    labels_B = split.examples.labels_B
    means_S = np.array([labels_B[batches.rows(n)].mean() for n in range(batches.total_steps)])
    # of 20 rows drawn without replacement from 400, half of which have label 1
    expected = 0.25 / 20 * (1 - 20 / 400) * 400 / 399
    assert 0.8 * expected < means_S.var() < 1.25 * expected


def test_invariant_01_two_rows_meet_again_no_oftener_than_chance_says():
    batches = batches_of(long_and_short(), epochs=21, global_batch=20, micro_batch=5)
    batch_of = np.zeros((21, 400), int)
    for step in range(batches.total_steps):
        at = batches.cursor(step)
        batch_of[at.epoch, batches.rows(step)] = at.batch
    upper = np.triu_indices(400, 1)
    met = [(row[:, None] == row[None])[upper] for row in batch_of]
    again = np.mean([(a & b).sum() / a.sum() for a, b in pairwise(met)])
    assert abs(again - 19 / 399) < 0.005


def test_invariant_01_the_incomplete_batch_holds_random_rows():
    split = long_and_short(41)
    batches = batches_of(split, epochs=400, global_batch=20, micro_batch=5)
    last = [batches.rows(n) for n in range(batches.total_steps) if len(batches.rows(n)) < 20]
    assert [len(rows) for rows in last] == [1] * 400
    seen = np.bincount(np.concatenate(last), minlength=41)
    assert (seen > 0).all()
    assert seen.max() < 25  # 10 each are expected


def test_micro_batches_hold_rows_of_like_length_and_ranks_like_tokens():
    split = long_and_short()
    batches = batches_of(split, global_batch=40, micro_batch=10)
    for step in range(batches.steps_per_epoch):
        lengths = [batches.lengths_B[rows] for rows in batches.micro_batches(step)]
        assert len(lengths) == 4
        assert sorted(np.concatenate(lengths).tolist(), reverse=True) == [
            length for part in lengths for length in part.tolist()
        ]
        padded = [part.max() * len(part) for part in lengths]
        whole = sum(int(part.sum()) for part in lengths)
        assert max(padded) <= 1.35 * whole / 4
        # as many rows in each would leave the first rank with far more
        assert max(padded) < 0.8 * 10 * lengths[0].max()


def test_micro_batches_of_a_step_do_not_depend_on_the_other_steps_or_on_ranks():
    lengths_G = np.random.default_rng(0).integers(3, 60, 32)
    rows_G = np.arange(100, 132)
    one = cut_into_micro_batches(rows_G, lengths_G, 4)
    two = cut_into_micro_batches(rows_G.copy(), lengths_G.copy(), 4)
    assert [rows.tolist() for rows in one] == [rows.tolist() for rows in two]
    assert sorted(np.concatenate(one).tolist()) == rows_G.tolist()
    assert [len(rows) for rows in cut_into_micro_batches(rows_G[:2], lengths_G[:2], 4)][2:] == [
        0,
        0,
    ]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_no_other_cut_has_a_smaller_largest_part(parts):
    random = np.random.default_rng(parts)
    for count in (1, 2, 5, 7):
        lengths_G = -np.sort(-random.integers(1, 9, count))
        counts = cut_by_tokens(lengths_G, parts)
        assert sum(counts) == count
        assert len(counts) <= parts
        cost = largest_part(lengths_G, np.cumsum(counts)[:-1])
        inner = range(1, count)
        for cuts in range(min(parts, count)):
            for ends in combinations(inner, cuts):
                assert cost <= largest_part(lengths_G, ends)


def largest_part(lengths_G, ends):
    return max(part[0] * len(part) for part in np.split(lengths_G, list(ends)))


def test_a_cursor_counts_batches_that_were_consumed():
    batches = batches_of(small_split(21))
    assert batches.steps_per_epoch == 3
    assert batches.cursor(0) == Cursor(0, 0)
    assert batches.step(2).cursor_after == Cursor(1, 0)


def test_max_steps_cuts_and_extends_epochs():
    split = small_split(21)
    assert batches_of(split, epochs=2).total_steps == 6
    assert batches_of(split, epochs=2, most=4).total_steps == 4
    assert batches_of(split, epochs=1, most=10).total_steps == 10


def test_windows_hold_at_most_so_many_rows_and_end_with_their_epoch():
    batches = batches_of(small_split(21))
    assert list(batches.windows(0, 16)) == [range(0, 2), range(2, 3), range(3, 5), range(5, 6)]
    assert list(batches.windows(4, 10**6)) == [range(4, 6)]
    assert list(batches.windows(0, 1)) == [range(n, n + 1) for n in range(6)]


def test_equal_texts_share_one_entry_whatever_their_labels():
    split = make_split(
        example_set(["good", "bad", "good"], ["positive", "negative", "negative"]),
        grammar_tokenizer(),
        16,
    )
    assert len(split) == 3
    assert len(split.ids_U2) == 2
    assert split.entry_B[0] == split.entry_B[2] != split.entry_B[1]
    # the first of equal rows stands for them
    assert sorted(split.row_U.tolist()) == [0, 1]
    asked = batches_of(split, global_batch=4, epochs=1).entries(range(1))
    assert asked.tolist() == [0, 1]


def test_padding_masks_what_is_not_text_and_truncation_is_counted():
    tokenizer = grammar_tokenizer()
    examples = example_set(["good", "the plot was not very good"])
    table = tokenize(tokenizer, examples, 5)
    assert table.truncated == 1
    assert table.lengths_B().tolist() == [3, 5]
    inputs = table.pad(np.array([1, 0]), 6)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    good = tokenizer("good")["input_ids"]
    assert inputs["input_ids"][1].tolist() == [*good, *[tokenizer.pad_token_id] * 3]


def test_a_micro_batch_is_padded_to_its_own_longest_row():
    split = make_split(
        example_set(["good", "bad", " ".join(["very"] * 9)]), grammar_tokenizer(), 32
    )
    assert make_batch(split, np.array([0, 1])).inputs["input_ids"].shape == (2, 3)
    assert make_batch(split, np.array([0, 2])).inputs["input_ids"].shape == (2, 11)
    # a micro-batch of fillers alone is as short as can be
    assert make_batch(split, np.array([-1, -1])).inputs["input_ids"].shape == (2, 3)


def test_an_empty_training_split_is_refused():
    split = small_split(3)
    nobody = subset(split.examples, np.zeros(0, np.int64))
    empty = make_split(nobody, grammar_tokenizer(), 16)
    with pytest.raises(UserError, match="training split is empty"):
        batches_of(empty)


def test_the_config_names_the_shapes_of_a_step():
    given = config(global_batch_size=12, micro_batch_size=4)
    batches = batches_of(
        small_split(21),
        1,
        2,
        global_batch=given.global_batch_size,
        micro_batch=given.micro_batch_size,
    )
    # three micro-batches for two ranks: two turns, the fourth is fillers
    assert batches.micro_count() == 2
    assert [batch.micro for batch in batches.step(0).batches] == [1, 3]
    assert not batches.step(0).batches[1].valid_B.any()
