"""Reads the blocks of a store for its tables: checks them, sets bad ones aside, keeps joins.

U ids of a table, K ids of a key block, P ids that they share.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sead_dist.store import layout as _layout
from sead_dist.store.blocks import ValueBlock, read_value_block
from sead_dist.store.ids import Ints, Places, common, is_sorted_unique
from sead_dist.store.key_blocks import ensure_key_block, read_key_block
from sead_dist.store.layout import BLOCK_SUFFIX, Layout
from sead_dist.store.tensor_file import BadBlockError, digest


@dataclass(frozen=True, eq=False)
class IdSet:
    """The ids of a table, sorted and unique, int64 [U, 2], with the hash that names them."""

    ids_U2: Ints
    hash: str


class BlockReader:
    """What the tables of one process have in common. `report` receives one-line notices."""

    def __init__(self, layout: Layout, report: Callable[[str], None]) -> None:
        self.layout, self.report = layout, report
        self.sound_keys: set[str] = set()
        self._id_sets: dict[int, IdSet] = {}
        self._shared: dict[tuple[str, str], tuple[int, Places, Places]] = {}

    def id_set(self, ids_U2: Ints) -> IdSet:
        """Worked out once for an array, since the tables of all teachers have the same."""
        if id(ids_U2) not in self._id_sets or self._id_sets[id(ids_U2)].ids_U2 is not ids_U2:
            if ids_U2.ndim != 2 or ids_U2.shape[1] != 2 or not is_sorted_unique(ids_U2):
                raise ValueError(f"ids {ids_U2.shape} should be [U, 2], sorted and unique")
            self._id_sets[id(ids_U2)] = IdSet(ids_U2, digest("keys", ids_U2))
        return self._id_sets[id(ids_U2)]

    def set_aside(self, path: Path, reason: object) -> None:
        target = _layout.set_aside(self.layout, path)
        where = f"moved to {target.parent.name}/" if target else "could not be moved away"
        self.report(f"store: {path.parent.name}/{path.name} is bad ({reason}); {where}")

    def read_block(self, path: Path) -> ValueBlock | None:
        """The block at `path`, checked as far as its rows are not when they are read; None where it
        is bad (set aside) or gone."""
        try:
            return read_value_block(path, "touched")
        except FileNotFoundError:
            return None
        except BadBlockError as error:
            self.set_aside(path, error)
            return None
        except OSError as error:
            raise _layout.unreadable(path, error) from error

    def shared(self, block: ValueBlock, ids: IdSet) -> tuple[Places, Places]:
        """The ids that the block's key block and a set share: their places in either.

        Worked out once per pair of id sets. Raises BadBlockError, FileNotFoundError.
        """
        if (block.keys, ids.hash) not in self._shared:
            path = self.layout.key_path(block.keys)
            try:
                ids_K2 = read_key_block(path)
            except BadBlockError as error:
                self.set_aside(path, error)
                raise BadBlockError(f"its key block {block.keys} is bad") from error
            self._shared[block.keys, ids.hash] = (len(ids_K2), *common(ids_K2, ids.ids_U2))
        num_keys, places_P, entries_P = self._shared[block.keys, ids.hash]
        check_num_keys(block, num_keys)
        return places_P, entries_P

    def mend_keys(self, ids: IdSet) -> None:
        """Make sure that the key block of these ids is there, since blocks refer to it."""
        if ids.hash in self.sound_keys:
            return
        with self.layout.lock("store.lock", exclusive=False):
            trouble = ensure_key_block(self.layout, ids.hash, ids.ids_U2, self.sound_keys)
        if trouble:
            self.report(f"store: keys/{trouble}; moved to quarantine/ and written again")


def check_num_keys(block: ValueBlock, num_keys: int) -> None:
    """Raises BadBlockError where the block was made for another number of keys."""
    if num_keys != block.covers.num_keys:
        raise BadBlockError(f"{block.covers.num_keys} keys, its key block has {num_keys}")


def list_blocks(folder: Path) -> list[Path]:
    """Value blocks in a folder, largest first: one merged block may make the rest needless."""
    sizes: list[tuple[int, str]] = []
    try:
        for path in folder.iterdir():
            if path.suffix == BLOCK_SUFFIX:
                with suppress(FileNotFoundError):
                    sizes.append((-path.stat().st_size, path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _layout.unreadable(folder, error) from error
    return [folder / name for _, name in sorted(sizes)]
