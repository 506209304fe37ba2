"""The rows of a split, all at once."""

from itertools import chain

from sead_dist.data.loading import split_chunks


def load_split(task, split, path, file, revision, skip_malformed):
    chunks = split_chunks(task, split, path, file, revision, skip_malformed, None)
    return list(chain.from_iterable(chunks))
