"""`sead-dist data`: what goes into a run, before it starts."""

from collections.abc import Sequence

from sead_dist.config.load import read_layers, resolve
from sead_dist.runs.quiet import quiet_libraries
from sead_dist.runs.shown import show_data
from sead_dist.runtime.console import print_table
from sead_dist.runtime.distributed import World


def show(words: Sequence[str], count: int, world: World) -> None:
    """Print the training rows by kind, what was left out, and some rows of each kind."""
    # nothing is written, so a run need not be named
    config = resolve([{"output_dir": "unnamed"}, *read_layers(words)])
    quiet_libraries(world)
    found = show_data(config, count)
    if not world.is_main:
        return
    for note in found.notes:
        print(note)
    print_table("training rows", ["kind", "rows"], list(found.rows.items()))
    if found.removed:
        print_table("left out", ["what", "rows"], list(found.removed.items()))
    for row in found.shown:
        print(f"[{row.kind}] {row.label}: {row.texts}")
