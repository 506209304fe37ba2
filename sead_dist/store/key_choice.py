"""Which key blocks the compacted blocks of a task and split use, so that no id is kept too often.

K ids of a key block, T teachers of a task and split, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sead_dist.store.ids import Bools, Ints, positions, union
from sead_dist.store.key_blocks import read_key_block, write_key_block
from sead_dist.store.layout import Layout

ID_BYTES = 16
# Key blocks as runs wrote them are kept, since runs with the same examples then find every row in
# its place, unless they make the store larger than this many times what it need be.
SPARE = 1.2


@dataclass(frozen=True)
class Need:
    """What one teacher holds: of each key block the ids that it has logits of, and their width."""

    masks: Mapping[str, Bools]
    classes: int


def choose_keys(layout: Layout, keys: dict[str, Ints], needs: Sequence[Need]) -> list[str]:
    """The hash of the key block for each teacher, [T]; new ones are written and put into `keys`.

    Raises RunError.
    """
    chosen = [_own_keys(layout, keys, need) for need in needs]
    held: dict[str, Bools] = {}
    for need in needs:
        for key_hash, mask_K in need.masks.items():
            held[key_hash] = held[key_hash] | mask_K if key_hash in held else mask_K
    num_ids = _count(keys, held)
    values = sum(4 * need.classes * _count(keys, need.masks) for need in needs)
    now = values + sum(ID_BYTES * len(keys[key_hash]) for key_hash in set(chosen))
    if now <= SPARE * (values + ID_BYTES * num_ids):
        return chosen
    return [_write_union(layout, keys, held)] * len(needs)


def _count(keys: Mapping[str, Ints], masks: Mapping[str, Bools]) -> int:
    """How many different ids the masks hold."""
    if len(masks) == 1:
        return sum(int(np.count_nonzero(mask_K)) for mask_K in masks.values())
    return sum(len(piece) for piece in union([(keys[key], mask) for key, mask in masks.items()]))


def _own_keys(layout: Layout, keys: dict[str, Ints], need: Need) -> str:
    """The smallest key block of a teacher that has every id it holds, else one of just those."""
    if len(need.masks) == 1:
        return next(iter(need.masks))
    for key_hash in sorted(need.masks, key=lambda key_hash: len(keys[key_hash])):
        others = [(keys[key], mask_K) for key, mask_K in need.masks.items() if key != key_hash]
        if all((positions(ids_K2[mask_K], keys[key_hash]) >= 0).all() for ids_K2, mask_K in others):
            return key_hash
    return _write_union(layout, keys, need.masks)


def _write_union(layout: Layout, keys: dict[str, Ints], masks: Mapping[str, Bools]) -> str:
    """Write the key block of the ids that the masks hold, and put it into `keys`; its hash."""
    key_hash = write_key_block(layout, union([(keys[key], mask) for key, mask in masks.items()]))
    keys.setdefault(key_hash, read_key_block(layout.key_path(key_hash), check=False))
    return key_hash
