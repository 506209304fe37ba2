"""The splits of a run: training (with unlabelled text), selection, and the official ones.

Shapes: B rows.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sead_dist.config.schema import DataConfig, RunConfig, teacher_names
from sead_dist.data.examples import (
    ExampleSet,
    build_examples,
    concatenate,
    count_overlap,
    divide,
    fingerprint,
    fold_numbers,
    has_label,
    hold_out,
    sample,
    subset,
)
from sead_dist.data.formats import Route
from sead_dist.data.loading import find_files, naming_source, source_of, split_chunks
from sead_dist.data.order import Split
from sead_dist.data.tasks import TaskSpec
from sead_dist.data.text_files import readable
from sead_dist.data.tokens import adds_tokens, describe_cuts, tokenless_row
from sead_dist.data.unlabeled import UnlabelledText, chunk_size, gather_text
from sead_dist.errors import UserError
from sead_dist.runtime.console import counted
from sead_dist.runtime.run_log import tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# after a mistake, rows with the same one are counted in so many further chunks of the file
COUNTED_CHUNKS = 4


@dataclass(frozen=True)
class RunExamples:
    """train holds labelled rows, then unlabelled text (the first rest_rows are of the train file),
    then copies. official: the task's evaluation splits, the first one first. dev_in_training:
    official texts that occur in the training rows or the text. copied: the operation of each copy.
    copies: a hash of them. removed: numbers of rows that were left out, by the reason. left_out:
    the fold that this run is not trained on, if any."""

    train: ExampleSet
    selection: ExampleSet
    official: dict[str, ExampleSet]
    unlabelled_rows: int
    dev_in_training: int
    rest_rows: int = 0
    copied: tuple[str, ...] = ()
    copies: str = ""
    removed: Mapping[str, int] = field(default_factory=dict)
    left_out: ExampleSet | None = None

    @property
    def labelled_rows(self) -> int:
        return len(self.train) - self.unlabelled_rows - len(self.copied)

    @property
    def rows_to_choose_by(self) -> int:
        """Rows of the selection split that have a gold label."""
        return int(has_label(self.selection.labels_B).sum())

    @property
    def labelled(self) -> ExampleSet:
        """The training rows with their gold labels."""
        return subset(self.train, np.arange(self.labelled_rows))

    def kind(self, index: int) -> str:
        """What a training row is: labelled, text of the train file or of a file, or the operation
        that made a copy."""
        place = index - self.labelled_rows
        if place < 0:
            return "labelled"
        if place < self.unlabelled_rows:
            return "rest" if place < self.rest_rows else "text"
        return self.copied[place - self.unlabelled_rows]

    def mean_score(self, task: TaskSpec) -> float | None:
        """The mean of the labelled training rows. None for classes, and where there are none."""
        labels_B = self.train.labels_B[: self.labelled_rows]
        if task.task_kind.has_classes or len(labels_B) == 0:
            return None
        return float(labels_B.mean())

    def fingerprint(self, task: TaskSpec) -> str:
        """The hash of every text and label in their order, and of the task. Copies follow from
        these, and have a hash of their own (`copies`)."""
        digest = hashlib.sha256(repr(task).encode())
        train = self.train
        if self.copied:
            train = subset(train, np.arange(len(train) - len(self.copied)))
        for part in (train, self.selection, *self.official.values()):
            digest.update(fingerprint(part).encode())
        return digest.hexdigest()


def route_of(config: RunConfig) -> Route | None:
    """How rows name their teachers, where the run is routed."""
    if not config.taught or not config.routed or config.teacher_column is None:
        return None
    return Route(config.teacher_column, tuple(teacher_names(config.teachers)))


def load_official(
    task: TaskSpec, data: DataConfig, split: str, may_lack: bool = False
) -> ExampleSet:
    """One split as its files have it, or as it is cut from a task's only file. may_lack: whether it
    may have no gold label at all."""
    if is_one_file(task, data) and split in task.splits:
        return split_one_file(task, data, None, may_lack)[split]
    return _read_split(task, data, split, None, may_lack)


def _read_split(
    task: TaskSpec, data: DataConfig, split: str, route: Route | None, may_lack: bool
) -> ExampleSet:
    path = Path(data.path) if data.path is not None else None
    file = file_of(task, data, split)
    chunks = split_chunks(
        task,
        split,
        path,
        file,
        data.revision,
        data.skip_malformed,
        chunk_size(task),
    )
    parts: list[ExampleSet] = []
    read = 0
    for rows in chunks:
        labels = None if may_lack else True
        with naming_source(source_of(task, split, path, file)):
            try:
                if readable(rows):
                    parts.append(build_examples(task, rows, split, labels, route, first=read))
            except UserError:
                # the message may count rows with this mistake: some later chunks are searched too
                with suppress(UserError):
                    rows += chain.from_iterable(islice(chunks, COUNTED_CHUNKS))
                build_examples(task, rows, split, labels, route, first=read)
                raise
        read += len(rows)
    found = concatenate(*parts)
    if found.has_gold and not has_label(found.labels_B).all():
        return _read_split(task, data, split, route, False)  # rejects the first row without one
    return found


def file_of(task: TaskSpec, data: DataConfig, split: str) -> Path | None:
    """The file that is named for a split."""
    given = {"train": data.train, list(task.splits)[1]: data.validation}.get(split)
    return None if given is None else Path(given)


def own_files(task: TaskSpec, data: DataConfig) -> list[Path]:
    """The files that the splits of a run are read from. Data of the hub have none."""
    found: list[Path] = []
    for split in task.splits:
        given = file_of(task, data, split)
        if given is not None:
            found.append(given.resolve())
        elif data.path is not None:
            found += [file.resolve() for file in find_files(task, split, Path(data.path))]
    return found


def is_one_file(task: TaskSpec, data: DataConfig) -> bool:
    """Whether training and validation rows come from one file. This is so where no other data are
    given, and the task is not on the hub."""
    alone = data.train is not None and data.validation is None and data.path is None
    return alone and task.hub is None and len(task.splits) == 2


def split_one_file(
    task: TaskSpec, data: DataConfig, route: Route | None, may_lack: bool
) -> dict[str, ExampleSet]:
    """The two splits of a task's only file, by its rows and data.validation_fraction alone."""
    both = _read_split(task, data, "train", route, may_lack)
    dev = list(task.splits)[1]
    key, seed = "data.validation_fraction", -1  # no selection.seed is below 0 by default
    train, held = hold_out(task, both, data.validation_fraction, seed, key, dev)
    return {"train": train, dev: held}


def split_off(
    config: RunConfig, task: TaskSpec, train: ExampleSet, dev: ExampleSet
) -> tuple[ExampleSet, ExampleSet, ExampleSet]:
    """(train, selection, the training rows that the sample left out). Rows are held out of the
    whole training split before it is sampled. So runs of different data.max_train_examples never
    select on each other's training rows, nor on each other's text."""
    most, seed = config.data.max_train_examples, config.selection.seed
    if config.selection.split == "dev":
        sampled, rest = divide(train, len(train) if most is None else most, seed)
        return sampled, replace(dev, split="selection"), rest
    share = config.selection.fraction
    kept, selection = hold_out(task, train, share, seed)
    size = len(kept)
    if most is not None:
        held = max(1, round(share * most))
        size, selection = max(1, most - held), sample(selection, held, seed)
    one_label = selection.has_gold and len(set(selection.labels_B.tolist())) < 2
    if task.task_kind.head_of_labels and one_label:
        raise UserError(
            f"the selection split has {counted(len(selection), 'row')}, all of one label; raise "
            f"selection.fraction={share} or data.max_train_examples={most}"
        )
    sampled, rest = divide(kept, size, seed)
    return sampled, selection, rest


def load_examples(config: RunConfig, task: TaskSpec) -> RunExamples:
    """All splits of a run, without copies. Where teachers predict, a split may have no gold
    labels at all. Raises UserError for what is wrong with the files."""
    names = [split for split in task.splits if split != "train"]
    route = route_of(config)
    lack, data = config.taught, config.data
    if not is_one_file(task, data):
        files = {split: _read_split(task, data, split, route, lack) for split in task.splits}
    else:
        files = split_one_file(task, data, route, lack)
        tell(
            f"data.train is the only file: {len(files[names[0]])} of its rows are the {names[0]} "
            f"split (data.validation_fraction={config.data.validation_fraction:g})"
        )
    official = {split: files[split] for split in names}
    train, selection, rest = split_off(config, task, files["train"], official[names[0]])
    left_out = None
    if config.folds is not None and config.fold is not None:
        train, left_out = without_fold(config, train, config.folds, config.fold)
        rows = counted(len(left_out), "labelled row")
        tell(f"fold {config.fold} of {config.folds}: {rows} left out")
    own, held = len(train), [selection, *official.values()]
    with_gold = own if train.has_gold else 0
    text = UnlabelledText(None, 0, 0)
    if config.unlabeled.path is not None or config.uses_rest:
        text = gather_text(config, task, own, rest, held, route)
    # where no training row has a label, the training rows themselves are the text
    asked = config.unlabeled.path is not None or config.unlabeled.rest
    if text.examples is not None or asked or (config.uses_rest and train.has_gold):
        tell(text.describe(config.unlabeled.path))
    if text.examples is not None:
        train = replace(concatenate(train, text.examples), split="train")
    text_rows = len(train) - with_gold
    overlap = sum(count_overlap(dev, train) for dev in official.values())
    sizes = ", ".join(f"{name} {len(dev)}" for name, dev in official.items())
    tell(
        f"task {task.name}: train {with_gold} labelled + {text_rows} unlabelled, "
        f"selection {len(selection)}, {sizes}; {overlap} dev texts occur in the training text"
    )
    if with_gold and (missing := without_rows(task, train)):
        classes = ", ".join(map(repr, missing[:10]))
        one = len(missing) == 1
        what, them = ("the label", "it") if one else ("one of the labels", "them")
        tell(
            f"WARNING: no training row has {what} {classes}, so no gold label teaches {them}; add "
            f"rows with {them}, or remove {them} from the task's labels"
        )
    if lacking := [part.split for part in (train, *held) if not part.has_gold]:
        alone = "" if with_gold else "; the student learns from the teachers' predictions alone"
        tell(
            f"WARNING: no gold labels in {', '.join(lacking)} (column {task.label_column!r} is "
            f"missing or empty): scores there measure agreement with the teachers{alone}; if "
            f"another column holds the labels, rename it to {task.label_column!r}"
        )
    removed = {"rows of text that share a sentence with selection or held-out rows": text.removed}
    return RunExamples(
        train, selection, official, text_rows, overlap, text.rest + own - with_gold,
        removed=removed, left_out=left_out,
    )  # fmt: skip


def without_rows(task: TaskSpec, train: ExampleSet) -> list[str]:
    """The task's classes that no training row has as its label; none for a task of scores."""
    if not task.task_kind.has_classes:
        return []
    return [name for n, name in enumerate(task.labels) if not (train.labels_B == n).any()]


def without_fold(
    config: RunConfig, train: ExampleSet, folds: int, fold: int
) -> tuple[ExampleSet, ExampleSet]:
    """(the training rows without a fold, those of the fold). Raises UserError where one is
    empty."""
    fold_B = fold_numbers(train, folds, config.selection.seed)
    if not (fold_B == fold).any() or (fold_B == fold).all():
        raise UserError(
            f"folds={folds} of {len(train)} labelled rows (those that share a text stay together): "
            f"fold {fold} has {int((fold_B == fold).sum())}; lower folds, or give more rows"
        )
    return subset(train, fold_B != fold), subset(train, fold_B == fold)


def check_tokens(
    examples: RunExamples, tokenizers: "Mapping[str, PreTrainedTokenizerBase]"
) -> None:
    """Raises UserError for a row of which one of `tokenizers` (owner -> tokeniser) makes no token.

    The check is quick, so it is done before a run directory is claimed: tokenisers that add special
    tokens always make some, and the others are tried only on texts without a letter or digit.
    """
    for whose, tokenizer in tokenizers.items():
        if adds_tokens(tokenizer):
            continue
        for part in (*examples.official.values(), examples.selection, examples.train):
            found = tokenless_row(part, tokenizer)
            if found is not None:
                raise UserError(
                    f"{source_row(examples, part, found)} has a text without a token for {whose}, "
                    "whose tokeniser adds no special tokens; fill in the text, or remove the row"
                )


def source_row(examples: RunExamples, part: ExampleSet, index: int) -> str:
    """Where a person finds an example: "row 4 of train"."""
    name = "train" if part is examples.selection else part.split
    kind = examples.kind(index) if part is examples.train else "labelled"
    if kind == "text":
        name = "the unlabelled text"
    elif kind not in ("labelled", "rest"):
        name = f"its file (a copy: {kind})"
    return f"row {int(part.rows_B[index]) + 1} of {name}"


@dataclass(frozen=True)
class RunSplits:
    """The splits of `RunExamples`, tokenised for the student."""

    train: Split
    selection: Split
    official: dict[str, Split]
    left_out: Split | None = None


def tokenize_splits(examples: RunExamples, tokenized: Callable[[ExampleSet], Split]) -> RunSplits:
    """A run's splits, each made of its examples by `tokenized`."""
    official = {name: tokenized(split) for name, split in examples.official.items()}
    left_out = None if examples.left_out is None else tokenized(examples.left_out)
    return RunSplits(tokenized(examples.train), tokenized(examples.selection), official, left_out)


def cut_lines(
    examples: RunExamples, splits: RunSplits, asked: int, max_length: int
) -> Iterator[str]:
    """Lines on the student's text rows that lost tokens, in every split, and on a maximum length
    that its positions do not reach."""
    if max_length < asked:
        yield f"max_length={asked}, but the student has positions for {max_length} tokens only"
    train = splits.train.tokens
    labelled, text = examples.labelled_rows, examples.labelled_rows + examples.unlabelled_rows
    counts = {"train": train.cut_of(slice(labelled))}
    if examples.unlabelled_rows:
        counts["unlabelled text"] = train.cut_of(slice(labelled, text))
    if examples.copied:
        counts["copies"] = train.cut_of(slice(text, None))
    counts["selection"] = splits.selection.tokens.cut_of()
    counts |= {name: split.tokens.cut_of() for name, split in splits.official.items()}
    line = describe_cuts(counts, max_length)
    if line is None:
        return
    cut, rows = map(sum, zip(*counts.values(), strict=True))
    if 2 * cut <= rows:
        yield f"student: {line}"
    else:
        fix = "; raise max_length" if max_length == asked else ""
        yield f"WARNING: student: {line}: more than half of all rows lose text{fix}"
