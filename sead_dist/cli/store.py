"""`sead-dist store ls | verify | compact | rm | export | import`: commands on the prediction
store."""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

from rich.filesize import decimal

from sead_dist.errors import RunError
from sead_dist.runtime.console import AGE_S, counted, parse_age, parse_size, print_table
from sead_dist.store.compaction import compact
from sead_dist.store.layout import store_folder
from sead_dist.store.maintenance import Bad, Row, list_store, verify
from sead_dist.store.removal import plan_removal, remove
from sead_dist.store.transfer import Carried, carry


def run(args: argparse.Namespace) -> None:
    """Run the verb that the command line named. Raises UserError where there is no store, RunError
    (exit code 3) where `verify` found bad files."""
    folder = store_folder(args.store)
    if args.verb == "ls":
        show(folder)
    elif args.verb == "verify":
        check(folder, args.repair)
    elif args.verb == "compact":
        merge(folder)
    elif args.verb == "export":
        print_copied(args.folder, carry(folder, Path(args.folder), args.task, args.teacher))
    elif args.verb == "import":
        print_copied(str(folder), carry(Path(args.folder), folder))
    else:
        older_than_s = parse_age(args.older_than) if args.older_than else None
        keep_bytes = parse_size(args.keep) if args.keep else None
        drop(folder, args.teacher, args.task, older_than_s, keep_bytes, args.yes)


def age(seconds: float) -> str:
    """The largest unit that fits, rounded down: "3d", "12h", "0s"."""
    seconds = max(seconds, 0.0)
    unit = next((u for u in ("d", "h", "m") if seconds >= AGE_S[u]), "s")
    return f"{int(seconds // AGE_S[unit])}{unit}"


def count(number: int, what: str) -> str:
    return counted(number, what, form=",")


def print_rows(title: str, rows: Iterable[Row]) -> None:
    columns = ["teacher", "fingerprint", "task", "split", "examples", "blocks", "size", "age"]
    now = time.time()
    cells = [
        [
            row.teacher,
            row.fingerprint[:12],
            row.task,
            row.split,
            f"{row.num_rows:,}",
            row.num_blocks,
            decimal(row.num_bytes),
            age(now - row.newest),
        ]
        for row in rows
    ]
    print_table(title, columns, cells)


def show(folder: Path) -> None:
    found = list_store(folder)
    size = decimal(found.value_bytes + found.key_bytes)
    print_rows(f"{folder}: {size}", found.rows)
    if len({row.numerics for row in found.rows}) > 1:
        print(
            "teachers with the same fingerprint differ in numerics class (device, precision, "
            "versions), so their predictions are kept apart"
        )
    if found.quarantined:
        print(f"{count(found.quarantined, 'bad file')} in {folder / 'quarantine'}, not used")
    for hold in found.holds:
        print(f"in use by {hold.run} (process {hold.pid} on {hold.host})")


def print_bad(bad: Iterable[Bad]) -> None:
    for one in bad:
        print(f"{one.path}: {one.reason}{'; moved to quarantine/' if one.moved else ''}")


def check(folder: Path, repair: bool) -> None:
    found = verify(folder, repair)
    print_bad(found.bad)
    left = [one for one in found.bad if not one.moved]
    if left:
        raise RunError(
            f"{count(len(left), 'bad file')} in the prediction store {folder}: "
            f"{', '.join(one.path.name for one in left[:3])}{', ...' if left[3:] else ''}; move "
            "them to quarantine/ with sead-dist store verify --repair; the next run computes their "
            "predictions again"
        )
    print(
        f"{folder}: {count(found.num_value_blocks, 'block')} and "
        f"{count(found.num_key_blocks, 'key block')} checked, {decimal(found.num_bytes)} intact"
        + (f"; {count(found.unfinished, 'unfinished file')}" if found.unfinished else "")
        + (f"; {count(len(found.bad), 'bad file')} moved to quarantine/" if found.bad else "")
    )


def merge(folder: Path) -> None:
    done = compact(folder)
    print_bad(done.bad)
    print(
        f"{folder}: {count(done.blocks_before, 'block')} merged into {done.blocks_after:,}, "
        f"{decimal(done.bytes_before)} into {decimal(done.bytes_after)}"
    )
    if done.left_in_use:
        blocks = count(done.left_in_use, "large merged block")
        print(f"{blocks} not removed yet: runs use them now")
    if done.differing:
        print(f"stored twice, with unequal predictions: {count(done.differing, 'example')}")


def print_copied(target: str, found: Carried) -> None:
    """Print what was copied. Raises RunError where bad blocks were left out of the target."""
    print_bad(found.bad)
    known = f", {count(found.known, 'block')} already there" if found.known else ""
    print(
        f"{target}: {count(found.num_rows, 'prediction')} in {count(found.blocks, 'block')} copied"
        f"{known}, {decimal(found.num_bytes)}"
    )
    if found.bad:
        raise RunError(
            f"{count(len(found.bad), 'bad block')} left out; a run that needs these predictions "
            "computes them again"
        )


def drop(
    folder: Path,
    teacher: str | None,
    task: str | None,
    older_than_s: float | None,
    keep_bytes: int | None,
    yes: bool,
) -> None:
    """Print what is to be removed. Remove it where `yes` is True."""
    plan = plan_removal(
        folder, teacher=teacher, task=task, older_than_s=older_than_s, keep_bytes=keep_bytes
    )
    for row, hold in plan.kept:
        print(f"kept: {row.teacher}, {row.task} {row.split}: {hold.run} uses it now")
    if not plan.paths:
        print(f"{folder}: nothing to remove")
        return
    print_rows("removing" if yes else "would be removed", plan.rows)
    if not yes:
        blocks = count(len(plan.paths), "block")
        print(f"{blocks}, {decimal(plan.num_bytes)}; nothing is removed without --yes")
        return
    done = remove(plan)
    print(f"{folder}: {count(done.num_blocks, 'block')} removed, {decimal(done.num_bytes)} freed")
    if done.kept:
        print(f"{count(done.kept, 'block')} kept: a run has begun to use them")
    if done.changed:
        print(
            f"{count(done.changed, 'block')} removed or merged by another process; list what is "
            "left with sead-dist store ls"
        )
