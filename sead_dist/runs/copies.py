"""The augmented copies of a run's rows, and what the student and the teachers provide for them."""

import re
from collections import Counter
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sead_dist.config.registered import MODEL
from sead_dist.config.schema import RunConfig
from sead_dist.data.augmentation import (
    Material,
    WantedCopies,
    automatic_copies,
    fitting_operations,
    make_copies,
)
from sead_dist.data.examples import ExampleSet, concatenate
from sead_dist.data.neighbors import embedding_table, near_words, table_hash
from sead_dist.data.splits import RunExamples
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError
from sead_dist.models.pretrained import TOKENIZER_FILES, load_tokenizer, locate
from sead_dist.runtime.console import counted_rows
from sead_dist.runtime.run_log import tell


def add_copies(
    config: RunConfig,
    task: TaskSpec,
    examples: RunExamples,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> RunExamples:
    """The examples with the copies that `augment` sets. Copies are the last training rows.

    tokenizer, model: of the student before its first step. Raises UserError for an operation that
    does not fit.
    """
    asked = config.augment.copies
    if asked is None or not config.uses_copies:
        return examples
    in_all = automatic_copies(examples.labelled_rows, examples.unlabelled_rows)
    if asked == "auto" and in_all == 0:
        return examples
    # a run without teachers has no unlabelled text among these rows
    sources = examples.train
    # The embeddings of a new shape are random. With another tokeniser they belong to other tokens.
    own = config.student.shape is None and config.student.tokenizer is None
    table = embedding_table(model) if own else None
    operations = fitting_operations(
        config.augment.operations, task, table is not None, gold_alone=not config.taught
    )
    material = Material(mask_token_of(config, tokenizer) if "mask" in operations else None)
    if table is not None and "neighbor" in operations:
        near = near_words(table, tokenizer, words_of(sources))
        material = replace(material, neighbors=near, table=table_hash(table))
    of_each = None if asked == "auto" else asked
    wanted = WantedCopies(
        operations, config.selection.seed, of_each, in_all, config.augment.gold_labels
    )
    held = [examples.selection, *examples.official.values()]
    copies = make_copies(task, sources, held, wanted, material)
    counts = Counter(copies.operations)
    made = ", ".join(f"{name} {counts[name]}" for name in operations) or "no operation fits"
    gone = "".join(f"; {counted_rows(count, reason)}" for reason, count in copies.removed.items())
    tell(f"copies: {len(copies.operations)} ({made}){gone}")
    if copies.examples is None:
        return examples
    return replace(
        examples,
        train=replace(concatenate(examples.train, copies.examples), split="train"),
        copied=copies.operations,
        copies=copies.fingerprint,
        removed={**examples.removed, **copies.removed},
    )


def mask_token_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The student's mask token where every teacher has the same mask token, else None.

    A teacher with another mask token would read the student's as an ordinary word.
    """
    mask: str | None = tokenizer.mask_token
    for entry in config.teachers if mask is not None else ():
        if entry.predictions is not None:  # a file of predictions reads no copy
            continue
        if entry.kind != MODEL:  # how another kind of teacher reads text is unknown
            return None
        try:
            found = locate(entry.path, entry.revision, marks=TOKENIZER_FILES)
            theirs = load_tokenizer(found, config.trust_remote_code)
        except UserError:  # the mistake is raised again where the teacher is loaded
            return None
        if theirs.mask_token != mask:
            return None
    return mask


def words_of(examples: ExampleSet) -> set[str]:
    """The words of all texts."""
    texts = [*examples.texts_a, *(examples.texts_b or ())]
    return {word for text in texts for word in re.findall(r"\w+", text)}
