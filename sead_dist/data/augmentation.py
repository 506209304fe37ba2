"""Changed copies of training rows and of unlabelled text, which the teachers label.

A copy is a pure function of its row, the seed, its number and the neighbours of words in the
student's embedding table. A recombined copy also depends on the texts of other rows. Ranks,
restarts and machines change nothing: random numbers come from `random.Random.random`, which gives
the same numbers in every version of Python.

B examples.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sead_dist.config.schema import Operation, RunConfig
from sead_dist.data.examples import (
    ExampleSet,
    fingerprint,
    identities,
    known_sentences,
    sentence_hash,
    shares_sentence,
    subset,
)
from sead_dist.data.neighbors import nearest_texts
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError

# Version of the rules by which a row becomes a copy
COPY_RULES = 1
OPERATIONS: tuple[Operation, ...] = ("mask", "ngram", "neighbor", "swap", "recombine")
# share of the words that mask and neighbor change, and the longest n-gram (Tang et al. 2019,
# section 3.2, whose probabilities of masking and of replacing are .1 each)
SHARE, LONGEST = 0.1, 5
# share of recombined pairs whose new text is one of the nearest (our own trial on stsb)
NEAR_SHARE = 0.8
# most texts from which partners are taken: a search among more takes long
MOST_PARTNERS = 20_000
MOST_LABELLED, COPIES_OF_EACH = 50_000, 10

# the first and the second texts of an example, one of each for every choice
Texts = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Material:
    """What copies are made of, apart from the rows. mask_token: None: words are left out instead.
    neighbors: for a word, the words near it in the student's embedding table; None: the table has
    no meaningful neighbours. table: a hash of the table."""

    mask_token: str | None = None
    neighbors: Mapping[str, Sequence[str]] | None = None
    table: str = ""


@dataclass(frozen=True)
class Copies:
    """examples: the copies; None where there are none. operations: that of each copy. removed: the
    number of rows or copies that were left out, by reason."""

    examples: ExampleSet | None
    operations: tuple[str, ...]
    removed: dict[str, int]
    fingerprint: str = ""


def automatic_copies(labelled: int, text: int) -> int:
    """The number of copies for `augment.copies=auto`. With the rows of text they are ten times the
    labelled rows. There are none above 50,000 labelled rows."""
    if labelled > MOST_LABELLED:
        return 0
    return max(0, COPIES_OF_EACH * labelled - text)


def no_copies_line(labelled: int, text: int) -> str:
    """The line of the log where `automatic_copies` gives 0."""
    why = f"the text alone is {COPIES_OF_EACH} times the labelled rows or more"
    if labelled > MOST_LABELLED:
        why = f"the run has {labelled} labelled rows, and above {MOST_LABELLED} there are none"
    elif not labelled:
        why = "the run has no labelled row"
    return f"copies: 0 (automatic: {why}; augment.copies=N makes N of each row)"


def run_rows(config: RunConfig, labelled: int, text: int) -> int:
    """The number of training rows that a run aims at: labelled rows, text and copies. Fewer copies
    are made where some would be equal or have a held-out sentence. The length of a run does not
    depend on that."""
    asked = config.augment.copies
    if asked is None or not config.uses_copies:
        return labelled + text
    copies = automatic_copies(labelled, text) if asked == "auto" else asked * (labelled + text)
    return labelled + text + copies


def is_pair(task: TaskSpec) -> bool:
    """Whether a row has two texts of its own, which can be swapped or recombined."""
    return task.text_b is not None and not task.choices


def keeps_label(operation: str, task: TaskSpec) -> bool:
    """Whether a copy by this operation has the gold label of its row."""
    return operation in ("mask", "neighbor") or (operation == "swap" and task.symmetric)


def fitting_operations(
    asked: Sequence[Operation] | None, task: TaskSpec, has_table: bool, gold_alone: bool
) -> list[Operation]:
    """The operations of a run: those set, or all that fit the task. gold_alone: no teacher
    predicts, so only operations that keep the label are of use.

    Raises UserError for one that is set and does not fit.
    """
    fitting = []
    for operation in asked or OPERATIONS:
        why = _unfit_reason(operation, task, has_table, gold_alone)
        if why is not None and asked:
            raise UserError(f"augment.operations names {operation!r}: {why}; leave it out")
        # in a task that is not symmetric, swapped texts are like no real row: only on request
        if why is None and (asked or operation != "swap" or task.symmetric):
            fitting.append(operation)
    return list(dict.fromkeys(fitting))


def _unfit_reason(operation: str, task: TaskSpec, has_table: bool, gold_alone: bool) -> str | None:
    if operation in ("swap", "recombine") and not is_pair(task):
        return f"it needs a task with two texts, and task {task.name} has no such pairs"
    if operation == "neighbor" and not has_table:
        return "the student's embeddings are new or of another tokeniser, so words lack neighbours"
    if gold_alone and not keeps_label(operation, task):
        return (
            "its copies lose their gold label, and a run without teachers has no other label for "
            f"them (in task {task.name} the label stays with "
            f"{', '.join(op for op in OPERATIONS if keeps_label(op, task))})"
        )
    return None


def mask_words(text: str, rng: random.Random, mask_token: str | None) -> str:
    """The text with about a tenth of its words, at least one, as the mask token, or without these
    words where there is no mask token. A text of one word stays."""
    words = text.split()
    if len(words) < 2:
        return text
    chosen = _some(len(words), rng)
    if mask_token is None:
        return " ".join(w for place, w in enumerate(words) if place not in chosen) or text
    return " ".join(mask_token if place in chosen else w for place, w in enumerate(words))


def keep_ngram(text: str, rng: random.Random) -> str:
    """Only one to five words in a row of the text. A text of one word stays."""
    words = text.split()
    if len(words) < 2:
        return text
    length = 1 + int(rng.random() * min(LONGEST, len(words) - 1))
    start = int(rng.random() * (len(words) - length + 1))
    return " ".join(words[start : start + length])


def replace_by_neighbors(
    text: str, rng: random.Random, neighbors: Mapping[str, Sequence[str]]
) -> str:
    """The text with about a tenth of the words that have neighbours, at least one, replaced by a
    neighbour."""
    parts = re.split(r"(\w+)", text)  # words stand at odd places
    places = [place for place in range(1, len(parts), 2) if _near(parts[place], neighbors)]
    if not places:
        return text
    for chosen in sorted(_some(len(places), rng)):
        near = _near(parts[places[chosen]], neighbors)
        parts[places[chosen]] = near[int(rng.random() * len(near))]
    return "".join(parts)


def _near(word: str, neighbors: Mapping[str, Sequence[str]]) -> Sequence[str]:
    return neighbors.get(word) or neighbors.get(word.lower()) or ()


def _some(count: int, rng: random.Random) -> set[int]:
    """Places below `count`, each taken with a chance of a tenth. One place where none was taken."""
    chosen = {place for place in range(count) if rng.random() < SHARE}
    return chosen or {int(rng.random() * count)}


@dataclass(frozen=True)
class Partners:
    """pool: the texts that a pair can be recombined with. near: for a text, the places in `pool` of
    the texts nearest to it."""

    pool: list[str]
    near: dict[str, list[int]] = field(default_factory=dict)

    def draw(self, anchor: str, rng: random.Random) -> str:
        near, closely = self.near.get(anchor), rng.random() < NEAR_SHARE
        chance = rng.random()
        if closely and near:
            return self.pool[near[int(chance * len(near))]]
        return self.pool[int(chance * len(self.pool))]


def change(
    texts: Texts, operation: str, rng: random.Random, material: Material, partners: Partners,
    symmetric: bool,
) -> Texts:  # fmt: skip
    """The texts of a copy; the given texts where there is nothing to change. A text that all
    choices share is changed once. The text of each choice is changed by the same operation."""
    first, second = texts
    if operation == "swap":
        return second, first
    if operation == "recombine":
        turned = symmetric and rng.random() < 0.5
        anchor = (second if turned else first)[0]
        return (anchor,), (partners.draw(anchor, rng),)
    if operation == "ngram":
        changed = keep_ngram(first[0], rng)
        # only one text of a pair is cut: for two snippets there is no label
        if second and rng.random() < 0.5:
            return first, tuple(keep_ngram(text, rng) for text in second)
        return (changed,) * len(first), second

    def one(text: str) -> str:
        if operation == "mask":
            return mask_words(text, rng, material.mask_token)
        return replace_by_neighbors(text, rng, material.neighbors or {})

    return (one(first[0]),) * len(first), tuple(one(text) for text in second)


def texts_of(examples: ExampleSet, index: int) -> Texts:
    """The texts of the example at `index`."""
    part = slice(index * examples.choices, (index + 1) * examples.choices)
    second = () if examples.texts_b is None else tuple(examples.texts_b[part])
    return tuple(examples.texts_a[part]), second


def generator(id_2: np.ndarray, seed: int, number: int) -> random.Random:
    """The random numbers of a copy. They follow from the row's identity, the seed and the copy's
    number (-1: those of the row itself)."""
    key = f"{seed} {number}".encode()
    digest = hashlib.blake2b(id_2.astype(">i8").tobytes(), digest_size=8, key=key)
    return random.Random(int.from_bytes(digest.digest(), "big"))


@dataclass(frozen=True)
class WantedCopies:
    """Which copies to make. of_each: copies of each row; None: `in_all` copies in total.
    gold_labels: copies keep the gold label where their operation keeps it."""

    operations: Sequence[Operation]
    seed: int
    of_each: int | None
    in_all: int
    gold_labels: bool


def make_copies(
    task: TaskSpec, sources: ExampleSet, held: Sequence[ExampleSet], wanted: WantedCopies,
    material: Material,
) -> Copies:  # fmt: skip
    """The copies of these rows. Rows that share a sentence with `held` are not copied. A copy is
    left out if it has such a sentence, or equals a row or another copy."""
    known, removed = known_sentences(held), Counter[str]()
    shared_B = shares_sentence(sources, known)
    removed["rows not copied, which share a sentence with held-out rows"] = int(shared_B.sum())
    rows = _ordered_rows(sources, np.flatnonzero(~shared_B), wanted.seed)
    total = wanted.in_all if wanted.of_each is None else wanted.of_each * len(rows)
    if not rows or not total or not wanted.operations:
        return Copies(None, (), dict(+removed))
    plan = _planned(sources, rows, total, wanted)
    partners = _partners(task, sources, rows, plan, wanted.seed)
    taken = {id_.tobytes() for part in (sources, *held) for id_ in part.ids_B2}
    held_texts = {int(hash_) for hash_ in known} | _text_hashes(held)
    kept: list[tuple[int, Operation, Texts]] = []
    for row, number, operation in plan:
        rng = generator(sources.ids_B2[row], wanted.seed, number)
        texts = change(texts_of(sources, row), operation, rng, material, partners, task.symmetric)
        why = _reason_against(texts, texts_of(sources, row), taken, held_texts)
        if why is None:
            kept.append((row, operation, texts))
        else:
            removed[why] += 1
    if not kept:
        return Copies(None, (), dict(+removed))
    examples = _as_examples(task, sources, kept, wanted.gold_labels)
    operations = tuple(operation for _, operation, _ in kept)
    digest = hashlib.sha256(f"{material.table} {COPY_RULES} {fingerprint(examples)}".encode())
    return Copies(examples, operations, dict(+removed), digest.hexdigest())


def _reason_against(texts: Texts, source: Texts, taken: set[bytes], held: set[int]) -> str | None:
    """Why a copy is not kept, or None. The identity of a copy that is kept is added to `taken`."""
    both = [*texts[0], *texts[1]]
    if texts == source or any(not re.search(r"[^\W_]", text) for text in both):
        return "copies without a change or without a word"
    if any(sentence_hash(text, {}) in held for text in both):
        return "copies with a held-out sentence"
    own = identities([texts])[0].tobytes()
    if own in taken:
        return "copies equal to a row or to another copy"
    taken.add(own)
    return None


def _text_hashes(parts: Sequence[ExampleSet]) -> set[int]:
    hashes: dict[str, int] = {}
    for part in parts:
        for text in (*part.texts_a, *(part.texts_b or ())):
            sentence_hash(text, hashes)
    return set(hashes.values()) - {0}


def _ordered_rows(sources: ExampleSet, allowed: np.ndarray, seed: int) -> list[int]:
    """The allowed rows, in an order that follows from their contents and the seed. Of equal rows
    only the first is there."""
    first: dict[bytes, int] = {}
    for row in allowed.tolist():
        first.setdefault(sources.ids_B2[row].tobytes(), row)
    return sorted(first.values(), key=lambda row: generator(sources.ids_B2[row], seed, -1).random())


def _planned(
    sources: ExampleSet, rows: Sequence[int], total: int, wanted: WantedCopies
) -> list[tuple[int, int, Operation]]:
    """(row, number of the copy, operation) of each copy. The operations take turns in each row. The
    row's contents determine which one is first."""
    plan = []
    for place in range(total):
        number, row = place // len(rows), rows[place % len(rows)]
        offset = int(sources.ids_B2[row, 0] % len(wanted.operations))
        plan.append((row, number, wanted.operations[(offset + number) % len(wanted.operations)]))
    return plan


def _partners(
    task: TaskSpec, sources: ExampleSet, rows: Sequence[int],
    plan: Sequence[tuple[int, int, Operation]], seed: int,
) -> Partners:  # fmt: skip
    """The texts that pairs are recombined with: second texts, and in a symmetric task first texts
    too."""
    anchors = dict.fromkeys(row for row, _, operation in plan if operation == "recombine")
    if not anchors or sources.texts_b is None:
        return Partners([])
    second = sources.texts_b
    texts = [second[row] for row in rows]
    asked = [sources.texts_a[row] for row in anchors]
    if task.symmetric:
        texts += [sources.texts_a[row] for row in rows]
        asked += [second[row] for row in anchors]

    def by_chance(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest()

    pool, asked = sorted(set(texts), key=by_chance)[:MOST_PARTNERS], list(dict.fromkeys(asked))
    return Partners(pool, dict(zip(asked, nearest_texts(asked, pool), strict=True)))


def _as_examples(
    task: TaskSpec, sources: ExampleSet, kept: Sequence[tuple[int, Operation, Texts]], gold: bool
) -> ExampleSet:
    examples = subset(sources, np.array([row for row, _, _ in kept]))
    gold_B = np.array([gold and keeps_label(operation, task) for _, operation, _ in kept])
    labels_B = np.where(gold_B, examples.labels_B, task.task_kind.unlabelled)
    texts = [texts for _, _, texts in kept]
    groups_B = None if examples.groups_B is None else np.arange(len(kept))
    return replace(
        examples,
        split="copies",
        texts_a=[text for first, _ in texts for text in first],
        texts_b=None if examples.texts_b is None else [t for _, second in texts for t in second],
        labels_B=labels_B.astype(examples.labels_B.dtype),
        groups_B=groups_B,
        ids_B2=identities(texts),
    )
