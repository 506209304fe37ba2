"""The built-in task, read back from its files by a parser and a scorer of the test's own."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from sead_dist.cli import grammar

CLAUSE = re.compile(r"the (\w+) was ((?:\w+ )*)(\w+)")
STRONG = {"very", "really", "truly", "so", "extremely"}


def write(folder: Path, seed: int = 0, **sizes) -> Path:
    grammar.write_grammar_task(folder, seed, **{"unlabelled_rows": 2000, **sizes})
    return folder


def read(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def sentences(path: Path) -> list[str]:
    return [row[0] for row in read(path)]


def clauses(sentence: str) -> list[str]:
    return re.split(r" and | but | , ", sentence.removeprefix("although "))


def pairs(lines: list[str]) -> set[tuple[str, str]]:
    """Every (noun, adjective) and (negator or degree word, adjective) of one clause."""
    found = set()
    for line in lines:
        for clause in clauses(line):
            noun, modifiers, adjective = CLAUSE.fullmatch(clause).groups()
            found |= {(word, adjective) for word in [noun, *modifiers.split()]}
    return found


def clause_score(clause: str) -> int:
    _, modifiers, adjective = CLAUSE.fullmatch(clause).groups()
    words = set(modifiers.split())
    degrees = words - set(grammar.NEGATORS)
    strength = 2 if not degrees else 3 if degrees <= STRONG else 1
    if words & set(grammar.NEGATORS):
        strength = -(4 - strength)
    return strength if adjective in grammar.ADJECTIVES[1] else -strength


def sentence_label(sentence: str) -> str:
    that_count = clauses(sentence) if " and " in sentence else clauses(sentence)[-1:]
    score = sum(clause_score(clause) for clause in that_count)
    assert score != 0
    return "positive" if score > 0 else "negative"


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("the plot was hardly good", "negative"),
        ("the plot was never very dull", "positive"),
        ("the plot was very good and the cast was slightly dull", "positive"),
        ("the plot was not very good and the cast was good", "positive"),
        ("the plot was very good but the cast was dull", "negative"),
        ("although the plot was very good , the cast was not good", "negative"),
    ],
)
def test_the_scorer_of_these_tests_follows_the_rules(sentence, label):
    assert sentence_label(sentence) == label


def test_dev_labels_are_right_and_only_the_stated_share_of_training_labels_is_not(tmp_path):
    folder = write(tmp_path, train_rows=1000, label_noise=0.1)
    assert all(label == sentence_label(text) for text, label in read(folder / "validation.tsv"))
    wrong = [label != sentence_label(text) for text, label in read(folder / "train.tsv")]
    assert sum(wrong) == 100


@pytest.mark.parametrize("seed", [0, 1])
def test_dev_holds_known_words_in_pairs_that_no_other_text_holds(tmp_path, seed):
    folder = write(tmp_path, seed)
    train, dev = sentences(folder / "train.tsv"), sentences(folder / "validation.tsv")
    text = sentences(folder / "unlabeled.tsv")
    assert set(" ".join(dev).split()) <= set(" ".join(train).split())
    assert len(pairs(dev)) > 100
    assert not pairs(dev) & pairs(train + text)
    # Unlabelled text, though, is more of what training text is.
    assert len(pairs(text) & pairs(train)) > 100


def test_no_sentence_occurs_twice_in_or_between_files(tmp_path):
    folder = write(tmp_path)
    names = ("train.tsv", "validation.tsv", "unlabeled.tsv")
    every = [line for name in names for line in sentences(folder / name)]
    assert len(every) == 1100 + 1000 + 2000
    assert len(set(every)) == len(every)


def test_every_form_occurs_and_the_classes_are_balanced(tmp_path):
    rows = read(write(tmp_path) / "validation.tsv")
    for mark in (" and ", " but ", "although ", "not ", "hardly ", "never ", "slightly "):
        assert sum(mark in text for text, _ in rows) > 10, mark
    assert 0.4 < sum(label == "positive" for _, label in rows) / len(rows) < 0.6


def test_the_seed_alone_decides_the_files(tmp_path):
    first, again = write(tmp_path / "a", 3), write(tmp_path / "b", 3)
    other = write(tmp_path / "c", 4)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) >= 6
    for file in files:
        assert (first / file).read_bytes() == (again / file).read_bytes(), file
    for name in ("train.tsv", "validation.tsv", "unlabeled.tsv"):
        assert (first / name).read_bytes() != (other / name).read_bytes()


def test_headers_and_task_file_fit_each_other(tmp_path):
    folder = write(tmp_path)
    task = yaml.safe_load((folder / "task.yaml").read_text(encoding="utf-8"))
    header = (folder / "train.tsv").read_text(encoding="utf-8").splitlines()[0]
    assert header.split("\t") == [*task["fields"], task["label_column"]]
    assert (folder / "unlabeled.tsv").read_text(encoding="utf-8").startswith("sentence\n")
    assert {label for _, label in read(folder / "train.tsv")} == set(task["labels"])


def test_the_tokenizer_reloads_and_knows_every_word_whole(tmp_path):
    folder = write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for line in sentences(folder / "train.tsv") + sentences(folder / "validation.tsv"):
        assert tokenizer.tokenize(line) == line.split()
    assert tokenizer.tokenize("Meh") == ["m", "##e", "##h"]
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id]
    assert [*special, tokenizer.sep_token_id, tokenizer.mask_token_id] == [0, 1, 2, 3, 4]
    ids = tokenizer("the plot was good")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert len(ids) == 6
