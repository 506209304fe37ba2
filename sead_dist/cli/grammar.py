"""The built-in task: the sentiment of sentences from a seeded grammar.

A clause is `the NOUN was [NEGATOR] [DEGREE] ADJECTIVE`. Its score has the adjective's sign and a
strength: 3 with a strong degree word ("very"), 2 without one, 1 with a weak one ("slightly"). A
negator inverts the sign and makes the strength 4 - strength ("not very good" is mildly negative).
A sentence is one clause or two:

    A                       the sign of A
    A and B                 the sign of the sum: the stronger wins (equal opposites never occur)
    A but B                 the sign of B
    although A , B          the sign of B

In the last two forms A and B always differ in sign, so counting words cannot solve them. The form
"B although A" is left out. With it, encoders as small as the demo's, trained from random weights in
seconds, often do not learn the rule. Then they fail the validation of teachers.

For each adjective the seed reserves a few nouns, negators and degree words for the dev split
(`validation`). Every clause of the dev split uses only words that are reserved for its adjective.
No clause of the training split or of the unlabelled text does. So the words of the dev split are
known, and their pairs are new.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import BertTokenizer

from sead_dist.config.yaml_text import to_yaml

LABELS = ("negative", "positive")
ADJECTIVES = {
    -1: "awful bad bland boring clumsy dreadful dull empty flat hollow messy poor silly stale "
    "terrible weak".split(),
    +1: "bright brilliant charming clever delightful elegant fine fresh funny good great lovely "
    "moving sharp superb warm".split(),
}
NOUNS = (
    "acting camera cast dialogue editing ending film humor music opening pacing plot romance "
    "script soundtrack style"
).split()
NEGATORS = "not hardly never".split()
DEGREES = {
    3: "very really truly so extremely".split(),
    1: "slightly somewhat fairly mildly".split(),
}
FORMS = ("one", "and", "but", "although")
FORM_WEIGHTS = (6, 3, 3, 3)
NEGATED = 0.25  # share of clauses with a negator
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Clause:
    """One clause. score: its signed strength, from -3 to 3 and never 0."""

    text: str
    score: int


@dataclass(frozen=True)
class Pools:
    """The words that may occur with one adjective in one part of the data."""

    nouns: list[str]
    negators: list[str]
    degrees: dict[int, list[str]]  # strength -> words


def write_grammar_task(
    folder: Path,
    seed: int = 0,
    train_rows: int = 1100,
    validation_rows: int = 1000,
    unlabelled_rows: int = 6000,
    label_noise: float = 0.1,
) -> None:
    """Write the whole task into `folder`, which is made if missing.

    The same arguments give the same bytes. Files: `train.tsv` and `validation.tsv` (header
    sentence, label), `unlabeled.tsv` (header sentence), `task.yaml` (a task file as a user writes
    it) and `tokenizer/` (for AutoTokenizer). No sentence occurs twice, within a file or between
    files.

    label_noise: the share of training labels that are swapped, as by errors of annotation. The
    labels of validation are always right. Raises OSError where `folder` cannot be written.
    """
    rng = random.Random(seed)
    seen_pools, unseen_pools = _divide_words(rng)
    taken: set[str] = set()
    train = _draw_rows(seen_pools, train_rows, taken, rng)
    text = _draw_rows(seen_pools, unlabelled_rows, taken, rng)
    validation = _draw_rows(unseen_pools, validation_rows, taken, rng)
    for row in rng.sample(range(train_rows), round(label_noise * train_rows)):
        sentence, label = train[row]
        train[row] = (sentence, 1 - label)

    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / "train.tsv", train)
    _write_rows(folder / "validation.tsv", validation)
    lines = ["sentence", *(sentence for sentence, _ in text)]
    (folder / "unlabeled.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = {
        "name": "grammar",
        "kind": "classification",
        "fields": ["sentence"],
        "text_a": "{sentence}",
        "labels": list(LABELS),
        "label_column": "label",
        "metrics": ["accuracy"],
        "splits": {"train": ["train"], "validation": ["validation"]},
    }
    (folder / "task.yaml").write_text(to_yaml(task), encoding="utf-8")
    grammar_tokenizer().save_pretrained(folder / "tokenizer")


def grammar_tokenizer() -> BertTokenizer:
    """A WordPiece tokeniser. A word of the grammar is one token. Other words are split into
    letters."""
    words = {"the", "was", "and", "but", "although", ",", *NOUNS, *NEGATORS}
    for group in (*ADJECTIVES.values(), *DEGREES.values()):
        words.update(group)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*SPECIAL_TOKENS, *letters, *("##" + letter for letter in letters), *sorted(words)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=64)


def _divide_words(rng: random.Random) -> tuple[dict[str, Pools], dict[str, Pools]]:
    """For each adjective, the words for training and unlabelled text, and those for dev."""
    seen, unseen = {}, {}
    for adjective in ADJECTIVES[-1] + ADJECTIVES[1]:
        nouns = rng.sample(NOUNS, len(NOUNS))
        negators = rng.sample(NEGATORS, len(NEGATORS))
        degrees = {strength: rng.sample(words, len(words)) for strength, words in DEGREES.items()}
        unseen[adjective] = Pools(nouns[:4], negators[:1], {k: v[:1] for k, v in degrees.items()})
        seen[adjective] = Pools(nouns[4:], negators[1:], {k: v[1:] for k, v in degrees.items()})
    return seen, unseen


def _draw_rows(
    pools: dict[str, Pools], count: int, taken: set[str], rng: random.Random
) -> list[tuple[str, int]]:
    """`count` new rows (sentence, class index). Their sentences are added to `taken`."""
    rows: list[tuple[str, int]] = []
    while len(rows) < count:
        sentence, label = _draw_sentence(pools, rng)
        if sentence not in taken:
            taken.add(sentence)
            rows.append((sentence, label))
    return rows


def _draw_sentence(pools: dict[str, Pools], rng: random.Random) -> tuple[str, int]:
    """A sentence, and the index of its class."""
    form = rng.choices(FORMS, FORM_WEIGHTS)[0]
    main = _draw_clause(pools, rng)
    if form == "one":
        return main.text, int(main.score > 0)
    if form == "and":
        other = _draw_until(pools, rng, lambda clause: clause.score != -main.score)
        return f"{main.text} and {other.text}", int(main.score + other.score > 0)
    other = _draw_until(pools, rng, lambda clause: clause.score * main.score < 0)
    if form == "but":
        return f"{other.text} but {main.text}", int(main.score > 0)
    return f"although {other.text} , {main.text}", int(main.score > 0)


def _draw_until(
    pools: dict[str, Pools], rng: random.Random, fits: Callable[[Clause], bool]
) -> Clause:
    while True:
        clause = _draw_clause(pools, rng)
        if fits(clause):
            return clause


def _draw_clause(pools: dict[str, Pools], rng: random.Random) -> Clause:
    sign = rng.choice((-1, 1))
    adjective = rng.choice(ADJECTIVES[sign])
    pool = pools[adjective]
    negated = rng.random() < NEGATED
    # A negated clause has a strong degree word or none, since "not slightly good" is not English.
    strength = rng.choice((2, 3) if negated else (1, 2, 3))
    words = ["the", rng.choice(pool.nouns), "was"]
    if negated:
        words.append(rng.choice(pool.negators))
    if strength != 2:
        words.append(rng.choice(pool.degrees[strength]))
    words.append(adjective)
    return Clause(" ".join(words), -sign * (4 - strength) if negated else sign * strength)


def _write_rows(path: Path, rows: list[tuple[str, int]]) -> None:
    lines = ["sentence\tlabel", *(f"{sentence}\t{LABELS[label]}" for sentence, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
