"""The commands: each parses its arguments, calls the packages below and prints.

Others use `main`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # jobs that an older version submitted look it up under this name
    if name == "attempt_recipe":
        from sead_dist.cli.commands import attempt_recipe

        return attempt_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
