"""Support for jobs that an older version submitted. Their pickles name `Launch` of this module, and
their words hold old names of keys. The next version removes this module."""

from typing import Any

from sead_dist.config.names import renamed_words
from sead_dist.slurm import submit

__all__ = ["Launch"]


class Launch(submit.Launch):
    """A pickled launch whose words get the present names of their keys."""

    def __call__(self) -> None:
        print(
            "sead-dist: this job was submitted by an older version; keys that its command does not "
            "set have the defaults of this version",
            flush=True,
        )
        super().__call__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "words": renamed_words(tuple(state["words"]))})
