"""Prompts of language models: a text row in the user's template, and the words of the classes.

Shapes: R text rows, W words of all classes, K classes in the order of the entry.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sead_dist.config.schema import RunConfig, TeacherConfig
from sead_dist.data.examples import ExampleSet
from sead_dist.data.kinds import align_name
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import RunError, UserError
from sead_dist.models.sequence_classifier import align_classes

# comes between the rows that are shown, and before the row that is to be predicted
BETWEEN = "\n\n"
# the fix for a prompt that is too long
SHORTEN = "shorten the prompt, or show fewer rows (shots)"
# texts to try prompts with before there are rows
TRIAL = ("a plain text", "another text")


@dataclass(frozen=True)
class Opening:
    """All that a teacher other than a classifier is made from.

    train: the labelled training rows, of which a prompt may show some; None where they are not
    known.
    """

    entry: TeacherConfig
    name: str
    task: TaskSpec
    config: RunConfig
    device: torch.device
    train: ExampleSet | None


class Texts(NamedTuple):
    """The texts of one text row. For tasks with one text the second is empty."""

    first: str
    second: str


class Shot(NamedTuple):
    """A training row that is shown with its label's word."""

    texts: Texts
    word: str


@dataclass(frozen=True)
class Words:
    """The words of all classes, words_W, and the class of each, class_W, in the order of
    `labels`."""

    labels: list[str]
    words_W: list[str]
    class_W: np.ndarray

    def of_classes(self, scores_RW: np.ndarray) -> np.ndarray:
        """The logits_RK: the logarithm of the sum of the probabilities of each class's words."""
        parts = [scores_RW[:, self.class_W == k] for k in range(len(self.labels))]
        return np.stack([np.logaddexp.reduce(part, axis=1) for part in parts], axis=1)


@dataclass(frozen=True)
class Prompt:
    """A template, and the rows that it shows with their labels' words.

    parts: pairs of a literal text and the number of the row's text that follows it (None: none).
    shots: one row more than is shown, or empty, so that a row is never shown with its own label.
    """

    parts: tuple[tuple[str, int | None], ...]
    shots: tuple[Shot, ...]

    def fill(self, texts: Texts) -> str:
        return "".join(
            literal + ("" if place is None else texts[place]) for literal, place in self.parts
        )

    def shown(self, texts: Texts) -> list[Shot]:
        return [shot for shot in self.shots if shot.texts != texts][: max(len(self.shots) - 1, 0)]

    def text(self, texts: Texts) -> str:
        """The prompt of one text row. A word is to follow it."""
        shots = (self.fill(shot.texts) + shot.word + BETWEEN for shot in self.shown(texts))
        return "".join(shots) + self.fill(texts)

    def messages(self, texts: Texts) -> list[dict[str, str]]:
        """The prompt of one text row as a conversation."""
        said = [
            {"role": role, "content": content}
            for shot in self.shown(texts)
            for role, content in (
                ("user", self.fill(shot.texts)),
                ("assistant", shot.word.strip()),
            )
        ]
        return [*said, {"role": "user", "content": self.fill(texts)}]


def rows_of(texts_a: Sequence[str], texts_b: Sequence[str] | None) -> list[Texts]:
    """The texts of each row; the second is empty where there is none."""
    return [Texts(*both) for both in zip(texts_a, texts_b or [""] * len(texts_a), strict=True)]


def fields_of(task: TaskSpec) -> dict[str, int]:
    """The names that a template may use, and the number of the text that each stands for.

    A column of the data has a name here only if it is the whole of a text, since an example keeps
    nothing of its row but the texts.
    """
    fields = {"text_a": 0, **({"text_b": 1} if task.is_pair else {})}
    for place, template in enumerate((task.text_a, task.text_b or "")):
        parts = list(string.Formatter().parse(template))
        if len(parts) == 1 and not parts[0][0] and parts[0][1]:
            fields[parts[0][1]] = place
    return fields


def read_template(template: str, task: TaskSpec, name: str) -> tuple[tuple[str, int | None], ...]:
    """The parts of a prompt. Raises UserError for braces that name no text of the task, and for a
    template without a text."""
    fields = fields_of(task)
    known = ", ".join(f"{{{field}}}" for field in fields)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"teacher {name}: its prompt {template!r} has a single brace ({error}); write {{{{ or "
            f"}}}} for a brace itself, and {known} for texts"
        ) from error
    parts: list[tuple[str, int | None]] = []
    for literal, field, spec, conversion in parsed:
        if field is not None and (field not in fields or spec or conversion):
            said = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"teacher {name}: its prompt names {{{said}}}, which is not a text of task "
                f"{task.name}; it may name {known}"
            )
        parts.append((literal, None if field is None else fields[field]))
    if all(place is None for _, place in parts):
        raise UserError(
            f"teacher {name}: its prompt {template!r} names no text, so it is the same for every "
            f"row; put {known} into it"
        )
    return tuple(parts)


def read_prompt(opening: Opening) -> tuple[Prompt, Words]:
    """The prompt and the words of an entry.

    Raises UserError for a task whose labels are not classes, for a template that cannot be used,
    and for words of other classes than the task's.
    """
    entry, name, task = opening.entry, opening.name, opening.task
    if not task.task_kind.head_of_labels:
        raise UserError(
            f"teacher {name} scores the words of classes, and the labels of task {task.name} "
            f"({task.kind}) are not classes; leave it out, or score the rows with it elsewhere and "
            "give a file of predictions"
        )
    assert entry.prompt is not None
    assert entry.words is not None
    parts = read_template(entry.prompt, task, name)
    labels = list(entry.words)
    check_classes(entry, entry.words, task, name)
    order_C = align_classes(
        task, entry.path, labels, entry.class_names, "words: {CLASS: [WORDS], ...}"
    )
    words = Words(
        labels,
        [word for label in labels for word in entry.words[label]],
        np.array([k for k, label in enumerate(labels) for _ in entry.words[label]]),
    )
    first_C = [entry.words[labels[own]][0] for own in order_C]
    return Prompt(parts, _choose_shots(opening, first_C)), words


def check_classes(
    entry: TeacherConfig, words: Mapping[str, Sequence[str]], task: TaskSpec, name: str
) -> None:
    """Raises UserError where the classes that have words are not those of the task. Where the entry
    has `labels`, only their number is compared."""
    its = ", ".join(task.labels)
    if entry.class_names is not None:
        if len(words) != len(task.labels):
            raise UserError(
                f"teacher {name}: words names {len(words)} classes, and task {task.name} has "
                f"{len(task.labels)}; give words for each of: {its}"
            )
        return
    found = {label: align_name(task, label) for label in words}
    wrong = [label for label, index in found.items() if index is None]
    if wrong:
        raise UserError(
            f"teacher {name}: words names {wrong[0]!r}, which is not a label of task {task.name}; "
            f"its labels: {its}"
        )
    lacking = [label for index, label in enumerate(task.labels) if index not in found.values()]
    if lacking:
        raise UserError(
            f"teacher {name}: words lacks the class {lacking[0]!r}; give words for each of: {its}"
        )


def _choose_shots(opening: Opening, first_C: Sequence[str]) -> tuple[Shot, ...]:
    """One training row more than is shown, drawn with the seed that also samples and holds out
    rows."""
    count, train = opening.entry.shots, opening.train
    if count == 0:
        return ()
    if train is None:
        raise ValueError("shots come from training rows, which are not known here")
    texts = rows_of(train.texts_a, train.texts_b)
    # of rows with equal texts only the first is used
    rows = list({text: row for row, text in reversed(list(enumerate(texts)))}.values())
    rows.sort(key=lambda row: tuple(train.ids_B2[row]))
    if len(rows) <= count:
        raise UserError(
            f"teacher {opening.name}: shots={count} needs {count + 1} labelled training rows with "
            f"different texts, and there are {len(rows)}; give fewer shots"
        )
    drawn = np.random.default_rng(opening.config.selection.seed).permutation(len(rows))
    chosen = [rows[place] for place in drawn[: count + 1]]
    return tuple(Shot(texts[row], first_C[int(train.labels_B[row])]) for row in chosen)


class Reader:
    """Makes the tokens of prompts.

    render: gives the whole prompt of a text row. marks: tokens before every prompt. limit: the most
    tokens of a prompt and a word together.

    Raises UserError where the tokens of the prompt and of a word cannot be distinguished, or
    two words have the same tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        render: Callable[[Texts], str],
        marks: list[int],
        words: Words,
        name: str,
    ) -> None:
        self.tokenizer, self.render, self.marks = tokenizer, render, marks
        self.words, self.name = words, name
        text = render(Texts(*TRIAL))
        prompt = self.ids(text)
        self.words_W: list[tuple[int, ...]] = []
        for word in words.words_W:
            whole = self.ids(text + word)
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise UserError(self._joined(text, word, "its prompt"))
            self.words_W.append(tuple(whole[len(prompt) :]))
        for place, tokens in enumerate(self.words_W):
            if tokens in self.words_W[:place]:
                twin = words.words_W[self.words_W.index(tokens)]
                raise UserError(
                    f"teacher {name}: the words {twin!r} and {words.words_W[place]!r} are the same "
                    "tokens; leave one out"
                )
        longest = max(map(len, self.words_W))
        # the number of tokens of a prompt without texts and of the longest word
        self.fixed = len(self.ids(render(Texts("", "")))) + longest
        self.limit, self.longest = self.fixed, longest
        # what a person can do where the limit is too low
        self.fix = SHORTEN

    def set_limit(self, limit: int, key: str) -> None:
        """Set the limit. Raises UserError where it leaves no token for a text. key: what sets the
        limit, for messages; only `max_length` can be raised."""
        if key == "max_length":
            self.fix = f"{SHORTEN}, or raise max_length"
        if limit <= self.fixed:
            raise UserError(
                f"teacher {self.name}: its prompt without a text takes {self.fixed} tokens, and "
                f"{key} is {limit}; {self.fix}"
            )
        self.limit = limit

    def ids(self, text: str) -> list[int]:
        return [*self.marks, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def prompt(self, texts: Texts) -> list[int]:
        """The tokens of a row's prompt. Raises RunError where a word's tokens would be joined with
        it."""
        text = self.render(self.cut(texts))
        found = self.ids(text)
        wholes = self.tokenizer(
            [text + word for word in self.words.words_W], add_special_tokens=False
        )["input_ids"]
        for word, tokens, whole in zip(self.words.words_W, self.words_W, wholes, strict=True):
            if [*self.marks, *whole] != [*found, *tokens]:
                raise RunError(self._joined(text, word, f"the prompt of {texts.first[:60]!r}"))
        return found

    def _joined(self, text: str, word: str, what: str) -> str:
        fix = "end the prompt with fixed text (such as 'Answer:'), and begin each word with a blank"
        if text[-1:].isspace() and text[-1:] != "\n":
            fix = "end the prompt without a blank, and begin each word with a blank"
        return (
            f"teacher {self.name}: {what} ends in {text[-12:]!r}, and with the word {word!r} it "
            f"has other tokens than the two have alone, so the word has no probability of its own; "
            f"{fix}"
        )

    def cut(self, texts: Texts) -> Texts:
        """The texts of a row. While the prompt is too long, the text with more tokens is cut at its
        end. Raises RunError where nothing is left to cut."""
        parts = list(texts)
        while (over := len(self.ids(self.render(Texts(*parts)))) + self.longest - self.limit) > 0:
            found = [
                self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
                for part in parts
            ]
            counts = [len(one["input_ids"]) for one in found]
            place = counts.index(max(counts))
            if counts[place] == 0:
                raise RunError(
                    f"teacher {self.name}: its prompt without a text takes over {self.limit} "
                    f"tokens; {self.fix}"
                )
            less = min(over, max(counts[place] - counts[1 - place], -(-over // 2)))
            kept = max(counts[place] - less, 0)
            end = found[place]["offset_mapping"][kept - 1][1] if kept else 0
            # several tokens may lie in one letter
            parts[place] = parts[place][: min(end, len(parts[place]) - 1)]
        return Texts(*parts)
