"""Examples built from official and hub rows, their identities, and the cuts made of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rows import load_split

from sead_dist.data.examples import (
    ExampleSet,
    build_examples,
    concatenate,
    count_overlap,
    entries,
    fingerprint,
    hold_out,
    known_sentences,
    sample,
    shares_sentence,
    subset,
)
from sead_dist.data.tasks import TASKS
from sead_dist.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SST2, RTE, QQP = TASKS["sst2"], TASKS["rte"], TASKS["qqp"]


def official(name: str) -> ExampleSet:
    task = TASKS[name]
    split = list(task.splits)[1]
    return build_examples(task, load_split(task, split, FIXTURES / name, None, None, False), split)


def sentences(*rows: tuple[str, int]) -> ExampleSet:
    return build_examples(
        SST2, [{"sentence": text, "label": label} for text, label in rows], "train"
    )


def pairs(*rows: tuple[str, str, int]) -> ExampleSet:
    return build_examples(
        QQP, [{"question1": a, "question2": b, "label": y} for a, b, y in rows], "train"
    )


@pytest.mark.parametrize("name", sorted(TASKS))
def test_official_and_hub_forms_give_the_same_examples(name):
    lines = (FIXTURES / "hub" / f"{name}.jsonl").read_text().splitlines()
    hub = build_examples(TASKS[name], [json.loads(line) for line in lines], "validation")
    ours = official(name)
    assert fingerprint(hub) == fingerprint(ours)
    assert (hub.texts_a, hub.texts_b, hub.answers) == (ours.texts_a, ours.texts_b, ours.answers)
    assert np.array_equal(hub.sentences_BS, ours.sentences_BS)
    if ours.groups_B is None:
        assert hub.groups_B is None
    else:
        assert np.array_equal(hub.groups_B, ours.groups_B)


def test_copa_makes_two_text_rows_of_one_example():
    copa = official("copa")
    assert (len(copa), copa.choices, len(copa.texts_a), len(copa.ids_B2)) == (4, 2, 8, 4)
    assert copa.texts_a[:2] == ["The lamp went out. What was the cause?"] * 2
    assert copa.texts_b[:2] == ["The bulb burned out.", "The room was warm."]
    assert copa.texts_a[2] == "He missed the bus. What happened as a result?"


def test_wsc_marks_its_spans_where_they_stand():
    assert official("wsc").texts_a == [
        "Tom called *Ben* , but #he# was out.",
        "*Tom* called Ben , but #he# was out.",
        # A double space, an index off by two, and a word ("it") that also stands earlier.
        "The old  trunk would not fit *the car* as #it# was too small.",
        "When Mrs. Hill saw it rain, *the dog* barked, but #it# did not wake her.",
    ]


def test_wic_shows_the_word_with_both_sentences():
    wic = official("wic")
    assert (wic.texts_a[0], wic.texts_b[0]) == (
        "bank: The bank lent us money.",
        "A bank was robbed.",
    )


def test_multirc_is_a_row_per_answer_grouped_by_question():
    multirc = official("multirc")
    assert multirc.groups_B.tolist() == [0, 0, 0, 1, 1]
    assert multirc.labels_B.tolist() == [1, 0, 1, 0, 1]
    assert multirc.texts_b[0] == "When did Ida sell honey? May"
    assert multirc.rows_B.tolist() == [0] * 5


def test_record_is_a_row_per_candidate_with_the_placeholder_filled():
    record = official("record")
    candidates = ["Lund", "Mara Lund", "North Harbour", "Oslo", "the Harbour"]
    assert [answer.candidate for answer in record.answers] == candidates * 2
    assert record.texts_b[4] == "the Harbour runs the port of the town."
    assert record.answers[0].gold == ("Lund", "Mara Lund")
    assert record.groups_B.tolist() == [0] * 5 + [1] * 5
    assert record.labels_B.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("value", ["entailment", " Entailment ", 0, "0", 0.0])
def test_label_values_by_name_or_number(value):
    row = {"sentence1": "a", "sentence2": "b", "label": value}
    assert build_examples(RTE, [row], "train").labels_B.tolist() == [0]


@pytest.mark.parametrize(
    ("value", "index"), [(True, 1), (False, 0), ("TRUE", 1), ("no", 0), (1, 1)]
)
def test_label_values_of_yes_no_tasks(value, index):
    row = {"question": "q", "passage": "p", "label": value}
    assert build_examples(TASKS["boolq"], [row], "train").labels_B.tolist() == [index]


@pytest.mark.parametrize("value", ["maybe", 2, -1, None, True, 0.5, ""])
def test_label_outside_the_set_names_split_row_value_and_allowed(value):
    rows = [{"sentence1": "a", "sentence2": "b", "label": y} for y in ("entailment", value)]
    message = r"train row 2: label .* in column 'label' .*allowed: entailment, not_entailment, 0, 1"
    with pytest.raises(UserError, match=message) as error:
        build_examples(RTE, rows, "train")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [5.1, -0.1, "high", None, float("nan"), "inf"])
def test_score_outside_the_range_is_named(value):
    row = {"sentence1": "a", "sentence2": "b", "score": value}
    with pytest.raises(UserError, match=r"validation row 1: score .* a number from 0 to 5"):
        build_examples(TASKS["stsb"], [row], "validation")


def test_missing_columns_and_texts_are_named():
    with pytest.raises(UserError, match="row 1: no column 'label'; its columns: sentence"):
        build_examples(SST2, [{"sentence": "a"}], "train")
    with pytest.raises(UserError, match="row 1: no column 'sentence2'; its columns: sentence1"):
        build_examples(RTE, [{"sentence1": "a"}], "train")
    with pytest.raises(UserError, match="column 'sentence' holds None; expected text"):
        build_examples(SST2, [{"sentence": None, "label": 1}], "train")
    with pytest.raises(
        UserError, match=r"row 1 does not have the form of task 'multirc'.*columns text"
    ):
        build_examples(TASKS["multirc"], [{"text": "a"}], "train")
    with pytest.raises(UserError, match="'xyz' is not in the text"):
        row = {
            "text": "ab",
            "span1_text": "xyz",
            "span1_index": 0,
            "span2_text": "ab",
            "span2_index": 0,
        }
        build_examples(TASKS["wsc"], [row], "train")
    with pytest.raises(UserError, match="the train split has no rows"):
        build_examples(SST2, [], "train")


def test_unlabelled_text_needs_no_labels():
    unlabelled = build_examples(
        SST2, [{"sentence": "a"}, {"sentence": "b", "label": 1}], "t", labelled=False
    )
    assert unlabelled.labels_B.tolist() == [-1, -1]
    row = {"sentence1": "a", "sentence2": "b"}
    assert np.isnan(build_examples(TASKS["stsb"], [row], "t", labelled=False).labels_B).all()
    nested = {
        "passage": {"text": "p", "questions": [{"question": "q", "answers": [{"text": "a"}]}]}
    }
    assert build_examples(TASKS["multirc"], [nested], "t", labelled=False).labels_B.tolist() == [-1]


def test_identity_is_the_exact_texts():
    ids = sentences(("a", 1), ("a", 0), ("a ", 1), ("A", 1)).ids_B2
    assert np.array_equal(ids[0], ids[1])  # neither the label nor the place in the file
    assert len(np.unique(ids, axis=0)) == 3
    split_elsewhere = pairs(("ab", "c", 0), ("a", "bc", 0), ("ab c", "", 0)).ids_B2
    assert len(np.unique(split_elsewhere, axis=0)) == 3
    assert not np.array_equal(sentences(("a", 1)).ids_B2, pairs(("a", "", 1)).ids_B2)
    assert ids.dtype == np.int64
    # The value itself is fixed: predictions are kept under it.
    assert ids[0].tolist() == [-4169874990038687251, -4126942542538121671]


def test_texts_that_are_not_valid_unicode_have_identities():
    assert len(np.unique(sentences(("\ud800", 1), ("\ud801", 1)).ids_B2, axis=0)) == 2


def test_subset_keeps_the_choices_of_an_example_together():
    copa = official("copa")
    some = subset(copa, np.array([3, 0]))
    assert some.texts_b == copa.texts_b[6:8] + copa.texts_b[0:2]
    assert np.array_equal(some.ids_B2, copa.ids_B2[[3, 0]])
    record = subset(official("record"), official("record").groups_B == 1)
    assert len(record) == len(record.answers) == len(record.texts_a) == 5


def test_concatenate_keeps_groups_apart():
    multirc = official("multirc")
    joined = concatenate(multirc, subset(multirc, np.array([3, 4])))
    assert joined.groups_B.tolist() == [0, 0, 0, 1, 1, 3, 3]
    assert joined.texts_a == multirc.texts_a + multirc.texts_a[3:]
    assert len(joined.ids_B2) == len(joined.labels_B) == len(joined.rows_B) == 7


def many(count: int = 400) -> ExampleSet:
    # Each pair shares a question with the next of its own chain of four.
    rows = [(f"q{i // 4}.{i % 4}", f"q{i // 4}.{i % 4 + 1}", i % 2) for i in range(count)]
    return pairs(*rows)


def shuffled(examples: ExampleSet) -> ExampleSet:
    return subset(examples, np.random.default_rng(0).permutation(len(examples)))


def content(examples: ExampleSet) -> list[tuple[str, str]]:
    return sorted(zip(examples.texts_a, examples.texts_b, strict=True))


def test_sample_is_a_function_of_contents_and_seed():
    examples = many()
    some = sample(examples, 50, seed=3)
    assert len(some) == 50
    assert content(some) == content(sample(shuffled(examples), 50, seed=3))
    assert content(some) != content(sample(examples, 50, seed=4))
    assert (np.diff(some.rows_B) > 0).all()  # the file's order
    assert set(content(sample(examples, 20, seed=3))) < set(content(some))
    assert sample(examples, 400, seed=3) is examples


def test_sample_takes_groups_whole():
    record = official("record")
    assert sample(record, 7, seed=0).groups_B.tolist() in ([0] * 5, [1] * 5)
    with pytest.raises(
        UserError, match=r"a sample of 4 of the .* validation split is empty, since each"
    ):
        sample(record, 4, seed=0)


def test_hold_out_keeps_rows_that_share_a_sentence_together():
    examples = many()
    train, selection = hold_out(QQP, examples, 0.1, seed=1)
    assert (len(train), len(selection)) == (360, 40)
    questions = [set(part.texts_a) | set(part.texts_b) for part in (train, selection)]
    assert not questions[0] & questions[1]
    assert selection.split == "selection"
    assert sorted([*train.rows_B, *selection.rows_B]) == list(range(400))


def test_hold_out_is_a_function_of_contents_and_seed():
    examples = many()
    selection = hold_out(QQP, examples, 0.1, seed=1)[1]
    assert content(selection) == content(hold_out(QQP, shuffled(examples), 0.1, seed=1)[1])
    assert content(selection) != content(hold_out(QQP, examples, 0.1, seed=2)[1])


def test_hold_out_compares_sentences_by_words_not_case_and_not_the_task_word():
    rows = [
        {"word": "bank", "sentence1": f"s{i}", "sentence2": f"t{i}", "label": i % 2}
        for i in range(40)
    ]
    rows += [{"word": "bank", "sentence1": " S0 ", "sentence2": "new", "label": 1}]
    examples = build_examples(TASKS["wic"], rows, "train")
    for seed in range(20):  # one word in every row does not tie the rows
        held = hold_out(TASKS["wic"], examples, 0.5, seed)[1].rows_B.tolist()
        assert (0 in held) == (40 in held)


def test_a_tied_group_larger_than_the_fraction_stays_in_train():
    big = [("same", f"b{i}", i % 2) for i in range(30)]
    small = [(f"x{i}", f"y{i}", i % 2) for i in range(20)]
    selection = hold_out(QQP, pairs(*big, *small), 0.2, seed=0)[1]
    assert len(selection) == 10
    assert "same" not in selection.texts_a


def test_blank_texts_do_not_tie_rows():
    examples = pairs(*[(f"q{i}", " ", i % 2) for i in range(20)])
    assert len(hold_out(QQP, examples, 0.5, seed=0)[1]) == 10


def test_hold_out_keeps_groups_and_passages_whole():
    rows = [
        {"paragraph": f"p{p}", "question": f"q{q}", "answer": f"a{a}", "label": a % 2}
        for p in range(10)
        for q in range(2)
        for a in range(3)
    ]
    train, selection = hold_out(
        TASKS["multirc"], build_examples(TASKS["multirc"], rows, "train"), 0.2, 0
    )
    assert len(selection) == 12
    assert not set(train.texts_a) & set(selection.texts_a)


def test_hold_out_that_cannot_choose_says_what_to_raise():
    with pytest.raises(
        UserError, match=r"selection.fraction=0.1 of 4 train rows of sst2 holds out no rows"
    ):
        hold_out(SST2, sentences(*[(str(i), i % 2) for i in range(4)]), 0.1, 0)
    with pytest.raises(
        UserError,
        match=r"rows of one label only \(rows that share a text .*\); raise selection.fraction",
    ):
        hold_out(SST2, sentences(*[(str(i), int(i > 0)) for i in range(40)]), 0.1, 0)
    with pytest.raises(UserError, match="all 40 train rows of sst2 are 'positive'; give rows of"):
        hold_out(SST2, sentences(*[(str(i), 1) for i in range(40)]), 0.1, 0)
    with pytest.raises(UserError, match="sst2 has 1 train row, so none can be held out; give more"):
        hold_out(SST2, sentences(("a", 1)), 0.1, 0)
    with pytest.raises(
        UserError, match=r"selection.fraction is 1.5; give a number between 0 and 1"
    ):
        hold_out(SST2, sentences(("a", 1)), 1.5, 0)


def test_overlap_is_of_exact_texts():
    dev = sentences(("a", 1), ("b", 0), ("b", 0), ("c", 1))
    train, text = sentences(("b", 1), ("d", 0), ("b", 1)), sentences(("c ", 1), ("a", 0))
    assert count_overlap(dev, train) == 2
    assert count_overlap(dev, train, text) == 3
    assert count_overlap(dev) == 0


def test_a_sentence_of_a_pair_is_shared_in_any_unicode_form_and_case():
    def pair(a, b):
        return {"question1": a, "question2": b, "label": 0}

    held = build_examples(QQP, [pair("Caf\u00e9?", " "), pair("two", "three ")], "selection")
    rows = [pair("one", "CAFE\u0301? "), pair("three", ""), pair("cafe?", ""), pair("tw o", "four")]
    known = known_sentences([held])
    shared_B = shares_sentence(build_examples(QQP, rows, "train"), known)
    assert shared_B.tolist() == [True, True, False, False]
    assert len(known) == 3


def test_entries_are_unique_sorted_and_found_again():
    ids_B2 = np.array([[2, -1], [-3, 5], [2, -1], [2, -7], [-3, 5]])
    ids_U2, entry_B = entries(ids_B2)
    assert ids_U2.tolist() == [[-3, 5], [2, -7], [2, -1]]
    assert entry_B.tolist() == [2, 0, 2, 1, 0]
    assert entries(np.zeros((0, 2), np.int64))[0].shape == (0, 2)


def test_fingerprint_sees_texts_labels_and_order():
    base = sentences(("a", 1), ("b", 0))
    others = [
        sentences(("a", 1), ("c", 0)),
        sentences(("a", 1), ("b", 1)),
        sentences(("b", 0), ("a", 1)),
    ]
    assert len({fingerprint(e) for e in [base, *others]}) == 4
    assert fingerprint(base) == fingerprint(replace(base, split="other"))
