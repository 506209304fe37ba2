"""Examples of one split (exact texts, labels, identities), and how splits are cut from them.

In a split without gold labels the ensemble's answers are the labels, and scores measure agreement
with them.

Shapes: B examples, S sentences of an example, U unique examples, C classes. An identity is a
128-bit hash of the exact input texts, kept as two int64. Equal rows have equal identities. Contents
and seed alone determine which examples a cut takes. The order in the file does not, and is kept.
"""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sead_dist.data.formats import Item, Route, read_items
from sead_dist.data.metrics import Answer
from sead_dist.data.tasks import TaskSpec, compute_metrics
from sead_dist.errors import UserError
from sead_dist.runtime.console import counted


@dataclass(frozen=True)
class ExampleSet:
    """B examples of one split. Text lists have length B * choices, choices of one example adjacent.

    `labels_B`: int64 class index, -1 unlabelled; regression float64, NaN unlabelled.
    `groups_B`: int64, multirc and record only. `ids_B2`: int64 identities. `rows_B`: int64, the row
    of the source (from 0) that the example came from. `routes_B`: int64, the teacher that each row
    names, or None. `sentences_BS`: int64 hash of each sentence (`sentence_hash`);
    0 if blank.
    """

    split: str
    choices: int  # text rows per example: 1, or the number of choices (copa: 2)
    texts_a: list[str]
    texts_b: list[str] | None
    labels_B: np.ndarray
    groups_B: np.ndarray | None
    answers: list[Answer] | None  # record: candidate and accepted answers of each row
    ids_B2: np.ndarray
    sentences_BS: np.ndarray
    rows_B: np.ndarray
    routes_B: np.ndarray | None = None
    by_teachers: bool = False  # the labels are the ensemble's answers, since none are gold

    def __len__(self) -> int:
        return len(self.labels_B)

    @property
    def has_gold(self) -> bool:
        """Whether a row has a gold label."""
        return bool(has_label(self.labels_B).any()) and not self.by_teachers


def has_label(labels_B: np.ndarray) -> np.ndarray:
    """has_B: False where a row has no label."""
    # callers have arrays alone; their type is the `label_type` of the kind
    return np.asarray(~np.isnan(labels_B) if labels_B.dtype.kind == "f" else labels_B >= 0)


def build_examples(
    task: TaskSpec,
    rows: Sequence[Mapping[str, Any]],
    split: str,
    labelled: bool | None = True,
    route: Route | None = None,
    first: int = 0,
    skipped: list[str] | None = None,
) -> ExampleSet:
    """The examples of `rows`. labelled: True: each row needs a label. False: labels are not read.
    None: a label is read where there is one. first: the place of the first row in its file.
    skipped: with it, rows that cannot be read are skipped, and their errors are added to it.

    Raises UserError (split, row from 1, value, what is allowed) for a missing column, a text that
    is not a text, a label outside the set and a split without rows.
    """
    items = list(read_items(task, rows, split, labelled, route, first, skipped))
    if not items and skipped:
        raise UserError(skipped[0])  # no row can be read: the first error is shown
    if not items:
        raise UserError(f"the {split} split has no rows; give a file that has some")
    kind = task.task_kind
    labels = [kind.unlabelled if item.label is None else item.label for item in items]
    hashes: dict[str, int] = {}  # passages repeat: hash each once
    sentences = [sentence_hash(text, hashes) for item in items for text in item.sentences]
    answers = [item.answer for item in items if item.answer is not None]
    return ExampleSet(
        split=split,
        choices=len(task.choices) or 1,
        texts_a=[text for item in items for text in item.texts_a],
        texts_b=[text for item in items for text in item.texts_b] if task.is_pair else None,
        labels_B=np.array(labels, dtype=kind.label_type),
        groups_B=_number_groups(items),
        answers=answers or None,
        ids_B2=identities([(item.texts_a, item.texts_b) for item in items]),
        sentences_BS=np.array(sentences, dtype=np.int64).reshape(len(items), -1),
        rows_B=np.array([item.row for item in items], dtype=np.int64),
        routes_B=None if route is None else np.array([item.route for item in items], np.int64),
    )


def identities(texts: Sequence[tuple[Sequence[str], Sequence[str]]]) -> np.ndarray:
    """ids_B2 of examples by their (first texts, second texts)."""
    return _as_int64([_identity(*both) for both in texts]).reshape(-1, 2)


def _identity(texts_a: Sequence[str], texts_b: Sequence[str]) -> bytes:
    # Counts and lengths stand in front: so two different inputs never give the same bytes.
    parts = [b"%d %d" % (len(texts_a), len(texts_b))]
    for text in (*texts_a, *texts_b):
        encoded = text.encode("utf-8", "surrogatepass")
        parts += [b" %d:" % len(encoded), encoded]
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _as_int64(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=">i8").astype(np.int64)


def sentence_hash(text: str, hashes: dict[str, int]) -> int:
    """A hash that equal sentences share; 0 for a blank one. Case and the number of blanks between
    words do not count. hashes: those known up to now; the new one is added."""
    if text not in hashes:
        folded = " ".join(unicodedata.normalize("NFC", text).casefold().split())
        encoded = folded.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(encoded, digest_size=8).digest()
        hashes[text] = int.from_bytes(digest, "big", signed=True) if folded else 0
    return hashes[text]


def _number_groups(items: list[Item]) -> np.ndarray | None:
    if items[0].group is None:
        return None
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(item.group, len(numbers)) for item in items], np.int64)


def subset(examples: ExampleSet, rows_B: np.ndarray) -> ExampleSet:
    """The examples at the positions `rows_B`, in that order; or those where the mask `rows_B` is
    True."""
    if rows_B.dtype == np.bool_:
        rows_B = np.flatnonzero(rows_B)
    at = [i * examples.choices + c for i in rows_B.tolist() for c in range(examples.choices)]
    texts_b, answers, groups_B = examples.texts_b, examples.answers, examples.groups_B
    return replace(
        examples,
        texts_a=[examples.texts_a[i] for i in at],
        texts_b=None if texts_b is None else [texts_b[i] for i in at],
        labels_B=examples.labels_B[rows_B],
        groups_B=None if groups_B is None else groups_B[rows_B],
        answers=None if answers is None else [answers[i] for i in rows_B.tolist()],
        ids_B2=examples.ids_B2[rows_B],
        sentences_BS=examples.sentences_BS[rows_B],
        rows_B=examples.rows_B[rows_B],
        routes_B=None if examples.routes_B is None else examples.routes_B[rows_B],
    )


def concatenate(*parts: ExampleSet) -> ExampleSet:
    """The examples of all parts, in order. There is at least one part, and all are of one task.
    Groups of different parts stay apart."""
    first = parts[0]
    groups_B = routes_B = None
    if all(part.groups_B is not None for part in parts):
        groups, offset = [], 0
        for part in parts:
            assert part.groups_B is not None
            groups.append(part.groups_B + offset)
            offset = int(groups[-1].max(initial=offset - 1)) + 1
        groups_B = np.concatenate(groups)
    if all(part.routes_B is not None for part in parts):
        routes_B = np.concatenate([part.routes_B for part in parts if part.routes_B is not None])
    texts_b, answers = first.texts_b, first.answers
    return replace(
        first,
        texts_a=[text for part in parts for text in part.texts_a],
        texts_b=None if texts_b is None else [t for part in parts for t in part.texts_b or ()],
        labels_B=np.concatenate([part.labels_B for part in parts]),
        groups_B=groups_B,
        answers=None if answers is None else [a for part in parts for a in part.answers or ()],
        ids_B2=np.concatenate([part.ids_B2 for part in parts]),
        sentences_BS=np.concatenate([part.sentences_BS for part in parts]),
        rows_B=np.concatenate([part.rows_B for part in parts]),
        routes_B=routes_B,
    )


def fold_numbers(examples: ExampleSet, folds: int, seed: int) -> np.ndarray:
    """fold_B: the fold of each example, from 0. Folds have about the same size. Examples that share
    a sentence or a group are in the same fold. A tied group that is larger than a fold is in none,
    which is -1."""
    fold_B = np.full(len(examples), -1)
    _, tied_B, counts_U = np.unique(_tied(examples), return_inverse=True, return_counts=True)
    left_B = np.flatnonzero(counts_U[tied_B] * folds <= len(examples))
    ends = [round(fold * len(left_B) / folds) for fold in range(folds + 1)]
    for fold, size in enumerate(np.diff(ends).tolist()):
        chosen_B = _choose(subset(examples, left_B), tied_B[left_B], size, seed)
        fold_B[left_B[chosen_B]] = fold
        left_B = left_B[~chosen_B]
    return fold_B


def sample(examples: ExampleSet, n: int, seed: int) -> ExampleSet:
    """At most `n` examples, chosen by a hash of seed and contents. A group is taken whole or not at
    all."""
    return divide(examples, n, seed)[0]


def divide(examples: ExampleSet, n: int, seed: int) -> tuple[ExampleSet, ExampleSet]:
    """(a sample as of `sample`, the examples that it leaves out)."""
    if n >= len(examples):
        return examples, subset(examples, np.zeros(0, np.int64))
    units_B = np.arange(len(examples)) if examples.groups_B is None else examples.groups_B
    chosen_B = _choose(examples, units_B, n, seed)
    if not chosen_B.any():
        raise UserError(
            f"a sample of {n} of the {len(examples)} examples of the {examples.split} split is "
            "empty, since each group of examples is larger; give a larger number"
        )
    return subset(examples, chosen_B), subset(examples, ~chosen_B)


def hold_out(
    task: TaskSpec,
    examples: ExampleSet,
    fraction: float,
    seed: int,
    key: str = "selection.fraction",
    split: str = "selection",
) -> tuple[ExampleSet, ExampleSet]:
    """(train, held out): about `fraction` of the examples are held out, and named `split`. They
    share no sentence and no group with a training example. A tied group that is larger than the
    fraction stays in train. Raises UserError, naming `key`, where a side has no rows or the
    held-out rows have only one label."""
    if not 0 < fraction < 1:
        raise UserError(f"{key} is {fraction}; give a number between 0 and 1")
    if len(examples) == 1:
        raise UserError(
            f"{task.name} has 1 {examples.split} row, so none can be held out; give more rows"
        )
    if examples.has_gold and len(np.unique(examples.labels_B)) == 1:
        label = examples.labels_B[0]
        name = repr(task.labels[int(label)]) if task.labels else label
        raise UserError(
            f"all {len(examples)} {examples.split} rows of {task.name} are {name}; give rows of "
            "other labels too"
        )
    size = round(fraction * len(examples))
    held_B = _choose(examples, _tied(examples), size, seed)
    what = f"{key}={fraction} of {counted(len(examples), f'{examples.split} row')} of {task.name}"
    if not held_B.any():
        raise UserError(f"{what} holds out no rows; raise {key}")
    if examples.has_gold and len(np.unique(examples.labels_B[held_B])) < 2:
        raise UserError(
            f"{what} holds out rows of one label only (rows that share a text stay "
            f"together); raise {key}"
        )
    return subset(examples, ~held_B), replace(subset(examples, held_B), split=split)


def _tied(examples: ExampleSet) -> np.ndarray:
    """A number per example, equal where examples share a sentence, an identity or a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(examples)
    rows, columns = np.nonzero(examples.sentences_BS)  # a blank text ties nothing
    edges = [
        (rows, examples.sentences_BS[rows, columns]),
        (np.arange(count), entries(examples.ids_B2)[1]),
    ]
    if examples.groups_B is not None:
        edges.append((np.arange(count), examples.groups_B))
    sources, targets, offset = [], [], count
    for source, key in edges:  # a node per example, then one per sentence, identity, group
        unique, node = np.unique(key, return_inverse=True)
        sources.append(source)
        targets.append(node + offset)
        offset += len(unique)
    source, target = np.concatenate(sources), np.concatenate(targets)
    graph = coo_array((np.ones(len(source), np.int8), (source, target)), shape=(offset, offset))
    return connected_components(graph, directed=False)[1][:count]


def _choose(examples: ExampleSet, units_B: np.ndarray, size: int, seed: int) -> np.ndarray:
    """chosen_B: True for examples of chosen units. Units are tried in the order of hash(seed,
    contents). Each is taken whole, if it still fits into `size`."""
    # A unit's contents are its smallest identity; ties (equal rows) go by label, then position.
    order_B = np.lexsort((examples.labels_B, examples.ids_B2[:, 1], examples.ids_B2[:, 0]))
    _, first_U, unit_B, size_U = np.unique(
        units_B[order_B], return_index=True, return_inverse=True, return_counts=True
    )
    salt = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    ids = np.ascontiguousarray(examples.ids_B2[order_B[first_U]].astype(">i8"))
    digests = [hashlib.blake2b(id_.tobytes(), digest_size=8, key=salt).digest() for id_ in ids]
    taken_U, room = np.zeros(len(first_U), bool), size
    for unit in np.lexsort((first_U, _as_int64(digests))).tolist():
        if size_U[unit] <= room:
            taken_U[unit] = True
            room -= int(size_U[unit])
            if room == 0:
                break
    chosen_B = np.empty(len(examples), bool)
    chosen_B[order_B] = taken_U[unit_B]
    return chosen_B


def without_labels(examples: ExampleSet, unlabelled: float) -> ExampleSet:
    """The same examples as rows of unlabelled text."""
    return replace(examples, labels_B=np.full_like(examples.labels_B, unlabelled))


def known_sentences(parts: Sequence[ExampleSet]) -> np.ndarray:
    """The hashes of all sentences of these examples, ascending, blank ones left out."""
    found: np.ndarray = np.unique(np.concatenate([part.sentences_BS.ravel() for part in parts]))
    known: np.ndarray = found[found != 0]
    return known


def shares_sentence(examples: ExampleSet, known: np.ndarray) -> np.ndarray:
    """shares_B: True for an example with a sentence (of a pair, either one) among these hashes."""
    return np.asarray(np.isin(examples.sentences_BS, known).any(axis=1))


def count_overlap(dev: ExampleSet, *others: ExampleSet) -> int:
    """How many examples of `dev` have exact texts that occur in `others`."""
    known = {tuple(id_2) for other in others for id_2 in other.ids_B2.tolist()}
    return sum(tuple(id_2) in known for id_2 in dev.ids_B2.tolist())


def entries(ids_B2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids_U2, entry_B): the unique identities in lexicographic order, and each example's place
    among them."""
    order_B = np.lexsort((ids_B2[:, 1], ids_B2[:, 0]))
    sorted_B2 = ids_B2[order_B]
    new_B = np.ones(len(ids_B2), dtype=bool)
    new_B[1:] = (sorted_B2[1:] != sorted_B2[:-1]).any(axis=1)
    entry_B = np.empty(len(ids_B2), dtype=np.int64)
    entry_B[order_B] = np.cumsum(new_B) - 1
    return sorted_B2[new_B], entry_B


def fingerprint(examples: ExampleSet) -> str:
    """A hash of identities, labels, routes, groups, accepted answers and their order."""
    # examples have no kind; the type of their labels is its `label_type`
    kind = "<f8" if examples.labels_B.dtype.kind == "f" else "<i8"
    digest = hashlib.blake2b(examples.ids_B2.astype("<i8").tobytes(), digest_size=16)
    digest.update(examples.labels_B.astype(kind).tobytes())
    for numbers_B in (examples.routes_B, examples.groups_B):
        if numbers_B is not None:
            digest.update(numbers_B.astype("<i8").tobytes())
    if examples.answers is not None:
        digest.update(repr(examples.answers).encode())
    return digest.hexdigest()


def with_teacher_labels(task: TaskSpec, examples: ExampleSet, said_BC: np.ndarray) -> ExampleSet:
    """The same examples with the ensemble's answers as labels: the class of the highest logit or
    probability, or the score. A row where said_BC is NaN has no label."""
    absent_B = np.isnan(said_BC).any(axis=1)
    kind = task.task_kind
    said_B = np.nan_to_num(said_BC).argmax(axis=1) if kind.has_classes else said_BC[:, 0]
    labels_B = np.where(absent_B, kind.unlabelled, said_B).astype(examples.labels_B.dtype)
    return replace(examples, labels_B=labels_B, by_teachers=True)


def metric_names(task: TaskSpec, examples: ExampleSet) -> list[str]:
    """The names of the task's metrics on this split."""
    return [name_of(name) for name in task.metrics] if examples.by_teachers else list(task.metrics)


def name_of(metric: str) -> str:
    """The name of a metric where the labels are the ensemble's answers."""
    return "agreement" if metric == "accuracy" else f"agreement_{metric}"


def score(task: TaskSpec, logits_BC: np.ndarray, examples: ExampleSet) -> dict[str, float]:
    """The task's metrics of a model on a split, by the names of `metric_names`. Without gold labels
    only rows that the ensemble answers count. {} where there are none, or none are known yet."""
    if examples.has_gold:
        return compute_metrics(task, logits_BC, examples)
    rows_B = has_label(examples.labels_B)
    if not rows_B.any():
        return {}
    found = compute_metrics(task, logits_BC[rows_B], subset(examples, rows_B))
    return dict(zip(metric_names(task, examples), found.values(), strict=True))
