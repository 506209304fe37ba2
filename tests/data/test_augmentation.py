"""Copies of rows: what each operation does, that they are pure, and what no copy may say."""

import random
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from small import TASK, config, example_set, sentences

from sead_dist.data.augmentation import (
    OPERATIONS,
    Material,
    WantedCopies,
    automatic_copies,
    fitting_operations,
    keep_ngram,
    make_copies,
    mask_words,
    no_copies_line,
    replace_by_neighbors,
)
from sead_dist.data.examples import build_examples, concatenate, subset, without_labels
from sead_dist.data.neighbors import nearest_texts
from sead_dist.data.tasks import TASKS
from sead_dist.errors import UserError

NEAR = {"good": ["fine", "nice"], "plot": ["story"]}
# held-out rows that share nothing with any row here
NONE = build_examples(TASK, [{"sentence": "nothing alike", "label": "positive"}], "validation")
TEXT = "the plot was not very good , said the man"


def pairs(count: int = 30, task: str = "stsb"):
    texts = sentences(2 * count, 3)
    label = "2.5" if task == "stsb" else "1"
    rows = [
        {"sentence1": texts[2 * n], "sentence2": texts[2 * n + 1], "label": label}
        for n in range(count)
    ]
    return build_examples(TASKS[task], rows, "train")


def choices(count: int = 12):
    texts = sentences(3 * count, 4)
    rows = [
        dict(zip(("premise", "choice1", "choice2"), texts[3 * n :], strict=False))
        | {"question": "cause", "label": n % 2}
        for n in range(count)
    ]
    return build_examples(TASKS["copa"], rows, "train")


def copies(task, examples, held=(), operations=OPERATIONS, of_each=4, seed=0, gold=False, **more):
    wanted = WantedCopies(operations, seed, of_each, 0, gold)
    material = Material(**{"mask_token": "[MASK]", "neighbors": NEAR, **more})
    return make_copies(task, examples, list(held), wanted, material)


def single(examples, operations=("mask", "ngram", "neighbor"), **more):
    return copies(TASK, examples, [NONE], operations, **more)


def test_masked_words_are_the_mask_token_or_are_left_out():
    words = TEXT.split()
    for seed in range(20):
        masked = mask_words(TEXT, random.Random(seed), "[MASK]").split()
        changed = [new for old, new in zip(words, masked, strict=True) if old != new]
        assert 1 <= len(changed) <= 5
        assert set(changed) == {"[MASK]"}
        left = mask_words(TEXT, random.Random(seed), None).split()
        assert len(left) == len(words) - len(changed)
        assert left == [new for new in masked if new != "[MASK]"]
    assert mask_words("good", random.Random(0), "[MASK]") == "good"


def test_an_ngram_is_one_to_five_words_in_a_row():
    kept = [keep_ngram(TEXT, random.Random(seed)) for seed in range(200)]
    assert all(f" {text} " in f" {TEXT} " and text != TEXT for text in kept)
    assert {len(text.split()) for text in kept} == {1, 2, 3, 4, 5}
    assert keep_ngram("good", random.Random(0)) == "good"


def test_neighbours_take_the_place_of_words_and_leave_the_rest_as_it_is():
    found = {replace_by_neighbors("A Good  plot, good!", random.Random(s), NEAR) for s in range(40)}
    assert "A Good  story, good!" in found
    assert any("A fine  plot" in text for text in found)
    assert all(text.startswith("A ") and text.endswith("!") and "," in text for text in found)
    assert replace_by_neighbors("bad music", random.Random(0), NEAR) == "bad music"


def test_copies_of_a_row_do_not_depend_on_other_rows_nor_on_the_order():
    rows = example_set(sentences(30))
    whole = single(rows)
    texts = set(whole.examples.texts_a)
    assert len(texts) == len(whole.examples) > 60
    turned = single(subset(rows, np.arange(30)[::-1]))
    assert set(turned.examples.texts_a) == texts
    assert turned.examples.texts_a == whole.examples.texts_a
    few = single(subset(rows, np.arange(10)))
    assert set(few.examples.texts_a) <= texts


def test_more_copies_keep_the_first_ones_and_a_seed_changes_them():
    rows = example_set(sentences(20))
    two, four, other = single(rows, of_each=2), single(rows, of_each=4), single(rows, seed=1)
    assert set(two.examples.texts_a) < set(four.examples.texts_a)
    assert two.fingerprint != four.fingerprint != other.fingerprint
    assert set(other.examples.texts_a) != set(four.examples.texts_a)


def test_another_embedding_table_is_another_fingerprint():
    rows = example_set(sentences(10))
    assert single(rows, table="a").fingerprint != single(rows, table="b").fingerprint
    assert single(rows, table="a").fingerprint == single(rows, table="a").fingerprint


def test_no_row_with_a_held_out_sentence_is_copied_and_no_copy_comes_to_one():
    rows = pairs(30)
    selection = subset(rows, np.arange(5))
    # either side counts, in any Unicode form, and around blanks
    first = {"sentence1": " Café ", "sentence2": "by itself one", "label": "1"}
    second = {"sentence1": "two of them", "sentence2": "cafe\u0301", "label": "1"}
    odd = build_examples(TASKS["stsb"], [first], "validation")
    mine = concatenate(rows, build_examples(TASKS["stsb"], [second], "train"))
    made = copies(TASKS["stsb"], mine, [selection, odd], of_each=10)
    assert made.removed["rows not copied, which share a sentence with held-out rows"] == 6
    texts = {*made.examples.texts_a, *made.examples.texts_b}
    forbidden = {*selection.texts_a, *selection.texts_b, "two of them", "cafe\u0301"}
    assert not texts & forbidden
    assert unicodedata.normalize("NFC", "cafe\u0301") not in texts
    # an n-gram that is a held-out sentence
    longer = example_set(["the plot was good", "good"])
    phrases = build_examples(
        TASK, [{"sentence": t, "label": "positive"} for t in ("Plot", "the plot")], "selection"
    )
    made = copies(TASK, longer, [phrases], ("ngram",), of_each=60)
    assert made.removed["copies with a held-out sentence"] > 0
    assert not {"plot", "the plot"} & set(made.examples.texts_a)


def test_no_copy_equals_a_row_or_another_copy():
    rows = concatenate(example_set(["the plot", "the", "plot"]), example_set(["the plot"]))
    made = copies(TASK, rows, [NONE], ("ngram",), of_each=20)
    assert made.examples is None
    assert made.removed["copies equal to a row or to another copy"] == 20


def test_copies_have_no_label_unless_gold_labels_are_kept_by_the_operation():
    rows = pairs(20)
    assert np.isnan(copies(TASKS["stsb"], rows, [NONE]).examples.labels_B).all()
    made = copies(TASKS["stsb"], rows, [subset(rows, np.arange(1))], gold=True)
    kept = {"mask", "neighbor", "swap"}
    for operation, label in zip(made.operations, made.examples.labels_B, strict=True):
        assert np.isnan(label) == (operation not in kept)
    # of text that has no label no copy has one
    text = without_labels(rows, np.nan)
    assert np.isnan(copies(TASKS["stsb"], text, [NONE], gold=True).examples.labels_B).all()
    # rte is not symmetric: a swapped pair has another label
    rte = pairs(20, "rte")
    made = copies(TASKS["rte"], rte, [NONE], ("swap", "mask"), gold=True)
    for operation, label in zip(made.operations, made.examples.labels_B, strict=True):
        assert (label == -1) == (operation == "swap")


def test_pairs_are_swapped_and_recombined_mostly_with_near_texts():
    rows = pairs(40)
    swapped = copies(TASKS["stsb"], rows, [NONE], ("swap",), of_each=1)
    at = {a: b for a, b in zip(rows.texts_a, rows.texts_b, strict=True)}
    turned = zip(swapped.examples.texts_a, swapped.examples.texts_b, strict=True)
    assert all(at[b] == a for a, b in turned)
    # ten texts of each of eight matters
    texts = [f"matter{n % 8} alone{n}" for n in range(80)]
    both = zip(texts[:40], texts[40:], strict=True)
    mine = [{"sentence1": a, "sentence2": b, "label": "1"} for a, b in both]
    rows = build_examples(TASKS["stsb"], mine, "train")
    made = copies(TASKS["stsb"], rows, [NONE], ("recombine",), of_each=3).examples
    closely = [
        a.split()[0] == b.split()[0] for a, b in zip(made.texts_a, made.texts_b, strict=True)
    ]
    assert 0.7 < np.mean(closely) < 0.9
    assert {*made.texts_a, *made.texts_b} <= set(texts)
    # where the sides are unlike, a first text stays first and a second one second
    rte = pairs(40, "rte")
    made = copies(TASKS["rte"], rte, [NONE], ("recombine",), of_each=5).examples
    assert set(made.texts_a) <= set(rte.texts_a)
    assert set(made.texts_b) <= set(rte.texts_b)


def test_copies_of_choices_keep_one_first_text_and_every_choice():
    rows = choices()
    operations = fitting_operations(None, TASKS["copa"], True, False)
    assert operations == ["mask", "ngram", "neighbor"]
    made = copies(TASKS["copa"], rows, [NONE], operations).examples
    assert made.texts_a[0::2] == made.texts_a[1::2]
    assert len(made.texts_a) == len(made.texts_b) == 2 * len(made)
    assert set(made.labels_B) == {-1}


def test_every_task_kind_has_copies_that_join_its_rows():
    for task, rows in ((TASKS["stsb"], pairs()), (TASKS["copa"], choices())):
        operations = fitting_operations(None, task, True, False)
        made = copies(task, rows, [subset(rows, np.arange(2))], operations)
        joined = concatenate(rows, made.examples)
        assert len(joined) == len(rows) + len(made.operations) > len(rows)
        assert joined.labels_B.dtype == rows.labels_B.dtype
    grouped = replace(example_set(sentences(6)), groups_B=np.array([0, 0, 1, 1, 2, 2]))
    made = single(grouped).examples
    assert len(set(concatenate(grouped, made).groups_B)) == 3 + len(made)


def test_the_automatic_number_is_ten_times_the_labelled_rows_with_the_text():
    assert automatic_copies(100, 0) == 1000
    assert automatic_copies(100, 400) == 600
    assert automatic_copies(100, 5000) == 0
    assert automatic_copies(50_000, 0) == 500_000
    assert automatic_copies(50_001, 0) == 0
    rows = example_set(sentences(20))
    wanted = WantedCopies(("mask",), 0, None, 30, False)
    made = make_copies(TASK, rows, [NONE], wanted, Material("[MASK]"))
    assert len(made.operations) + sum(made.removed.values()) == 30


def test_why_there_are_no_automatic_copies_is_told():
    told = [no_copies_line(*rows) for rows in ((100, 1000), (50_001, 0), (0, 900))]
    assert [line.partition("automatic: ")[2].partition(";")[0] for line in told] == [
        "the text alone is 10 times the labelled rows or more",
        "the run has 50001 labelled rows, and above 50000 there are none",
        "the run has no labelled row",
    ]


def test_operations_that_do_not_fit_are_passed_over_or_refused_by_name():
    sst2, stsb, rte = (TASKS[name] for name in ("sst2", "stsb", "rte"))
    assert fitting_operations(None, sst2, False, False) == ["mask", "ngram"]
    assert fitting_operations(None, stsb, True, False) == list(OPERATIONS)
    # swapped pairs of a task that is not symmetric are unlike its rows
    assert fitting_operations(None, rte, True, False) == ["mask", "ngram", "neighbor", "recombine"]
    assert fitting_operations(["swap"], rte, True, False) == ["swap"]
    assert fitting_operations(None, rte, True, True) == ["mask", "neighbor"]
    for asked, task, table, gold, why in (
        (
            ["swap"],
            sst2,
            True,
            False,
            "names 'swap': it needs a task with two texts, and task sst2",
        ),
        (["recombine"], TASKS["copa"], True, False, "task copa has no such pairs; leave it out"),
        (["neighbor"], sst2, False, False, "the student's embeddings are new or of another token"),
        (
            ["ngram"],
            sst2,
            True,
            True,
            r"lose their gold label.*\(in task sst2 the label stays with mask, neighbor\)",
        ),
        (["swap"], rte, True, True, "names 'swap': its copies lose their gold label"),
    ):
        with pytest.raises(UserError, match=why):
            fitting_operations(asked, task, table, gold)


def test_keys_of_copies_count_only_where_there_are_copies():
    none = {"augment__copies": "null"}
    plain, same = config(**none), config("augment.gold_labels=true", **none)
    assert plain.identity() == same.identity()
    assert not any(key.startswith("augment") for key in plain.identity())
    for copies in (2, "auto"):
        asked = {"augment__copies": copies, "augment__operations": "[mask,swap]"}
        # no teacher is asked, so none are made
        assert config(**asked).identity() == plain.identity()
        own = config("teachers=[a]", **asked).identity()
        assert own["augment.operations"] == ["mask", "swap"]
    with pytest.raises(UserError, match=r"augment\.copies=0: "):
        config(augment__copies=0)
    with pytest.raises(UserError, match=r"augment\.operations"):
        config("augment.operations=[shout]")


def test_nearest_texts_share_rare_words_and_leave_the_text_itself_out():
    pool = [f"common words about {name}" for name in ("cats", "dogs", "cats and dogs", "tea")]
    pool += [f"other line {n}" for n in range(60)]
    first, second, none = nearest_texts(["common words about cats", "tea time", "?"], pool)
    assert first[0] == 2
    assert 0 not in first
    assert second == [3]
    assert none == []
    assert nearest_texts(["a"], ["?", "!"]) == [[]]
