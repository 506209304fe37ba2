"""Unlabelled text: rows of the train file that the sample left out, and rows of a further file.

The text shares no sentence with rows by which students are selected or scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sead_dist.config.automatic import most_rows_read
from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import (
    ExampleSet,
    build_examples,
    concatenate,
    known_sentences,
    sample,
    shares_sentence,
    subset,
    without_labels,
)
from sead_dist.data.formats import Route
from sead_dist.data.loading import naming_source, row_chunks
from sead_dist.data.tasks import TaskSpec
from sead_dist.data.text_files import readable
from sead_dist.errors import UserError
from sead_dist.runtime.console import counted

# rows of a file that are in memory at once, beside those that are kept
CHUNK = 50_000


@dataclass(frozen=True)
class UnlabelledText:
    """examples: None where there are none. rest: how many of them, the first ones, are of the train
    file. removed: rows that share a sentence with held-out ones. left_out: rows beyond those that
    the longest run of its kind reads."""

    examples: ExampleSet | None
    rest: int
    removed: int
    left_out: int = 0

    def describe(self, path: str | None) -> str:
        """A line for the log."""
        count = 0 if self.examples is None else len(self.examples)
        if not count and path is not None:
            return (
                f"unlabelled text: 0 rows, because each of {counted(self.removed, 'row')} shares a "
                "sentence with selection or held-out rows; give a file of other text: "
                "unlabeled.path=FILE"
            )
        if not count:
            return (
                f"unlabelled text: 0 rows ({self.removed} removed), because the sample leaves out "
                "no other row of the train file; give a file of text: unlabeled.path=FILE"
            )
        return (
            f"unlabelled text: {counted(self.rest, 'row')} of the train file, "
            f"{count - self.rest} of unlabeled.path; {self.removed} removed, which share a "
            "sentence with selection or held-out rows"
            + (f"; {self.left_out} more left out: no run is that long" if self.left_out else "")
        )


def chunk_size(task: TaskSpec) -> int | None:
    """How many rows of a file are read at once. None: all of them, because groups of rows must not
    be cut."""
    return None if task.reader in ("multirc", "record") else CHUNK


def gather_text(
    config: RunConfig,
    task: TaskSpec,
    labelled: int,
    rest: ExampleSet,
    held: Sequence[ExampleSet],
    route: Route | None,
) -> UnlabelledText:
    """The unlabelled text of a run with `labelled` labelled rows. rest: the training rows that the
    sample left out. held: rows with which no text may share a sentence.

    Raises UserError for whatever is wrong with the file.
    """
    known, seed = known_sentences(held), config.selection.seed
    ratio, read_most = config.unlabeled.ratio, most_rows_read(config, labelled)
    wanted = None if ratio is None else max(1, round(ratio * labelled))
    most = read_most if wanted is None else min(wanted, read_most)
    shared_B = shares_sentence(rest, known) if config.uses_rest else np.ones(len(rest), bool)
    removed = int(shared_B.sum()) if config.uses_rest else 0
    text = without_labels(subset(rest, ~shared_B), task.task_kind.unlabelled)
    own = found = len(text)
    if config.unlabeled.path is not None:
        other, read, more = text_of_file(config, task, known, most, route)
        removed += more
        found += read - more
        text = concatenate(text, other)
    if most < len(text):
        # rows are numbered, so that the two kinds can be distinguished after the sample
        marked = replace(text, rows_B=np.arange(len(text)))
        places_B = sample(marked, most, seed).rows_B
        own = int((places_B < own).sum())
        text = subset(text, places_B)
    left_out = 0
    if wanted is None or wanted > read_most:
        left_out = (found if wanted is None else min(wanted, found)) - len(text)
    return UnlabelledText(text if len(text) else None, own, removed, left_out)


def text_of_file(
    config: RunConfig, task: TaskSpec, known: np.ndarray, most: int, route: Route | None
) -> tuple[ExampleSet, int, int]:
    """(kept rows of `unlabeled.path`, how many rows it has, how many were removed). The file is
    read in chunks, so that only a chunk and the kept rows are in memory. At most `most` rows are
    kept, drawn by `sample`."""
    path, seed = Path(config.unlabeled.path or ""), config.selection.seed
    parts: list[ExampleSet] = []
    place = read = removed = 0
    for rows in row_chunks(path, task, config.data.skip_malformed, chunk_size(task)):
        place += len(rows)
        if not (count := len(readable(rows))):
            continue
        with naming_source(f"unlabeled.path={path}"):
            first = place - len(rows)
            part = build_examples(task, rows, "unlabelled text", False, route, first)
        read += count
        shared_B = shares_sentence(part, known)
        removed += int(shared_B.sum())
        parts.append(subset(part, ~shared_B))
        if sum(map(len, parts)) > most + CHUNK:
            parts = [sample(concatenate(*parts), most, seed)]
    if not parts:
        raise UserError(f"unlabeled.path={path} has no rows; give a file that has some")
    return sample(concatenate(*parts), most, seed), read, removed
