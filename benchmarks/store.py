"""The prediction store at 1, 10 and 100 million rows: building, compacting, opening, reading, size.

Ids and logits are synthetic. Ids are spread as evenly as the hashes of real rows. Logits are
computed from the ids, so that what is read is also checked. Every measurement has a process of its
own. The states of the page cache: `cold`, the store's files were dropped from it before; `hot`,
they were read just before. Ids that a table is opened with are in memory, as in a run.

Targets, after `store compact`: 100 million rows open in 2 seconds, 2 million rows/s in random
batches, at most 1.3 x (16 bytes an example + 4 x C bytes an example and teacher).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from result_file import RESULTS, set_threads, smoke_argument, table, write_result

from sead_dist.store.compaction import compact
from sead_dist.store.store import StoreFolder, Table, TeacherKey

OPEN_S, READS_PER_S, SIZE = 2.0, 2e6, 1.3
BATCH = 4096
READS = 4_000_000
# As many rows as a run keeps at a time, more where that made a great many files.
LEAST_BLOCK, MOST_BLOCKS = 4096, 1000
Seconds = dict[str, float]


def make_ids(path: Path, rows: int) -> None:
    """Sorted unique ids, int64 [rows, 2], in a file of NumPy's."""
    rng = np.random.default_rng(rows)
    limits = np.iinfo(np.int64)
    ids_U2 = np.empty((rows, 2), np.int64)
    for word in (0, 1):
        ids_U2[:, word] = rng.integers(limits.min, limits.max, rows, np.int64)
    ids_U2[:, 0].sort()
    np.save(path, ids_U2)


def make_key(teacher: int, classes: int) -> TeacherKey:
    return TeacherKey(
        f"{teacher:016x}" * 2, '{"device":"synthetic"}', f"teacher-{teacher}", classes
    )


def logits_of(ids_R2: np.ndarray, teacher: int, classes: int) -> np.ndarray:
    """float32 [R, C], different for every id, teacher and class."""
    seed = (ids_R2[:, :1] >> 20) + teacher + 7 * np.arange(classes)
    return ((seed % 100_003) / 1000).astype(np.float32)


def open_table(store: Path, ids_U2: np.ndarray, teacher: int, classes: int) -> Table:
    key = make_key(teacher, classes)
    return StoreFolder(store).table(key, ids_U2, "synthetic", "train", "benchmark")


@contextmanager
def timed(into: Seconds, name: str) -> Iterator[None]:
    """Add the seconds that pass, and those of them that this process had a processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into[f"{name}_s"] = into.get(f"{name}_s", 0.0) + time.perf_counter() - wall
    into[f"{name}_cpu_s"] = into.get(f"{name}_cpu_s", 0.0) + time.process_time() - cpu


def memory_mb(field: str) -> float:
    """RssAnon: memory of this process alone; RssFile: pages of files that it has mapped."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1e3


# ---------------------------------------------------------------- each in a process of its own


def build(store: Path, ids: Path, teachers: int, classes: int) -> Seconds:
    """Write all rows of all teachers in an arbitrary order, block by block."""
    taken: Seconds = {}
    ids_U2 = np.load(ids, mmap_mode="r")
    block = max(LEAST_BLOCK, len(ids_U2) // MOST_BLOCKS)
    order_U = np.random.default_rng(0).permutation(np.arange(len(ids_U2), dtype=np.int32))
    for teacher in range(teachers):
        rows = open_table(store, ids_U2, teacher, classes)
        for start in range(0, len(ids_U2), block):
            entries = order_U[start : start + block]
            logits = logits_of(ids_U2[entries], teacher, classes)
            with timed(taken, "build"):
                rows.write(entries, logits)
    return taken


def compact_it(store: Path) -> Seconds:
    """Compact, and measure the memory that is this process's own."""
    taken: Seconds = {}
    before = most = memory_mb("RssAnon")
    ended = threading.Event()

    def measure() -> None:
        nonlocal most
        while not ended.wait(0.05):
            most = max(most, memory_mb("RssAnon"))

    thread = threading.Thread(target=measure)
    thread.start()
    with timed(taken, "compact"):
        compact(store)
    ended.set()
    thread.join()
    return {**taken, "compact_mb": most - before}


def open_and_read(
    store: Path, ids: Path, teacher: int, classes: int, every: int, in_order: bool
) -> Seconds:
    """Open a table on every `every`-th id and read batches, twice."""
    taken: Seconds = {}
    ids_U2 = np.ascontiguousarray(np.load(ids)[::every])
    own, mapped = memory_mb("RssAnon"), memory_mb("RssFile")
    with timed(taken, "open"):
        rows = open_table(store, ids_U2, teacher, classes)
    taken["open_mb"] = memory_mb("RssAnon") - own
    taken["mapped_mb"] = memory_mb("RssFile") - mapped
    rng = np.random.default_rng(1)
    num_batches = -(-min(READS, 4 * len(ids_U2)) // BATCH)
    for turn in ("first", "second"):
        for number in range(num_batches):
            if in_order:
                entries = (np.arange(BATCH) + number * BATCH) % len(ids_U2)
            else:
                entries = rng.integers(0, len(ids_U2), BATCH)
            with timed(taken, turn):
                logits, present = rows.lookup(entries)
            if number % 50 == 0:
                assert present.all()
                np.testing.assert_array_equal(logits, logits_of(ids_U2[entries], teacher, classes))
        for kind in ("", "cpu_"):
            seconds = taken.pop(f"{turn}_{kind}s")
            taken[f"{turn}_{kind}rows_per_s"] = num_batches * BATCH / seconds
    taken["read_mb"] = memory_mb("RssAnon") - own
    return taken


def alone(do: Callable[..., Seconds], *args: object) -> Seconds:
    """`do(*args)` in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(do, args)


# ---------------------------------------------------------------- the page cache


def files_of(store: Path) -> list[Path]:
    return sorted(store.glob("*/**/*.safetensors"))


def drop_from_cache(store: Path) -> float:
    """Drop the store's files from the page cache; the share of them that is still there."""
    os.sync()
    for path in files_of(store):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return share_in_cache(store)


def share_in_cache(store: Path) -> float:
    """Of a few hundred places in the store's files."""
    found: list[bool] = []
    paths = files_of(store)
    for path in paths[:: max(1, len(paths) // 100)]:
        with open(path, "rb", buffering=0) as file:
            for place in np.linspace(0, path.stat().st_size - 1, 8).astype(int).tolist():
                try:
                    os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT)
                    found.append(True)
                except BlockingIOError:
                    found.append(False)
    return float(np.mean(found))


def read_all(store: Path) -> None:
    for path in files_of(store):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(bytearray(1 << 24)):
                pass


# ---------------------------------------------------------------- all of it


def measure(work: Path, rows: int, teachers: int, classes: int) -> dict[str, Any]:
    """Everything about a store of `rows` examples; its files are removed at the end."""
    store, ids = work / f"store-{rows}", work / f"ids-{rows}.npy"
    make_ids(ids, rows)
    raw: dict[str, Any] = {"rows": rows, "teachers": teachers, "classes": classes}
    try:
        raw["build"] = alone(build, store, ids, teachers, classes)
        raw["blocks"] = len(list(store.glob("values/*/*.safetensors")))
        raw["parts_hot"] = alone(open_and_read, store, ids, 0, classes, 1, False)
        raw["compact"] = alone(compact_it, store)
        raw["bytes"] = sum(path.stat().st_size for path in files_of(store))
        for name, every, in_order in (
            ("", 1, False),
            ("in_order_", 1, True),
            ("part_", 100, False),
        ):
            raw[f"{name}cold_share_cached"] = drop_from_cache(store)
            raw[f"{name}cold"] = alone(open_and_read, store, ids, 0, classes, every, in_order)
            if not in_order:
                read_all(store)
                raw[f"{name}hot_share_cached"] = share_in_cache(store)
                raw[f"{name}hot"] = alone(open_and_read, store, ids, 0, classes, every, in_order)
    finally:
        shutil.rmtree(store, ignore_errors=True)
        ids.unlink()
    return raw


def report(cases: list[dict[str, Any]]) -> str:
    """The tables."""
    first, last = cases[0], cases[-1]
    teachers, classes = first["teachers"], first["classes"]
    columns = ["", *(f"{case['rows']:,} rows" for case in cases)]

    def line(name: str, value: Callable[[dict[str, Any]], object]) -> list[object]:
        return [name, *(value(case) for case in cases)]

    def seconds(where: str, what: str) -> Callable[[dict[str, Any]], str]:
        return lambda case: f"{case[where][f'{what}_s']:.3f} ({case[where][f'{what}_cpu_s']:.3f})"

    def rate(where: str, turn: str) -> Callable[[dict[str, Any]], str]:
        return lambda case: " ".join(
            text.format(case[where][f"{turn}_{kind}rows_per_s"] / 1e6)
            for kind, text in (("", "{:.2f}"), ("cpu_", "({:.2f})"))
        )

    def megabytes(where: str, what: str) -> Callable[[dict[str, Any]], str]:
        return lambda case: f"{case[where][what]:,.0f}"

    def build_rate(case: dict[str, Any]) -> str:
        stored = case["rows"] * teachers / 1e6
        return (
            f"{stored / case['build']['build_s']:.2f} ({stored / case['build']['build_cpu_s']:.2f})"
        )

    need = 16 + 4 * classes * teachers
    lines = [
        line("blocks before compacting", lambda case: case["blocks"]),
        line("**before compacting:** building, million rows/s", build_rate),
        line("open, hot, s", seconds("parts_hot", "open")),
        line("memory of its own when open, MB", megabytes("parts_hot", "open_mb")),
        line("random rows, hot, million/s", rate("parts_hot", "second")),
        line("**compacting**, s", seconds("compact", "compact")),
        line("memory of its own at most, MB", megabytes("compact", "compact_mb")),
        line("**after:** bytes an example", lambda case: f"{case['bytes'] / case['rows']:.2f}"),
        line("times the least size", lambda case: f"{case['bytes'] / case['rows'] / need:.3f}"),
        line(
            "share of the files in the page cache, cold and hot",
            lambda case: f"{case['cold_share_cached']:.2f}, {case['hot_share_cached']:.2f}",
        ),
        line("open, cold, s", seconds("cold", "open")),
        line("open, hot, s", seconds("hot", "open")),
        line("memory of its own when open, MB", megabytes("hot", "open_mb")),
        line("the same after reading, MB", megabytes("hot", "read_mb")),
        line("random rows, hot, touched first, million/s", rate("hot", "first")),
        line("random rows, hot, touched before, million/s", rate("hot", "second")),
        line("random rows, cold, million/s", rate("cold", "first")),
        line("rows in order, cold, million/s", rate("in_order_cold", "first")),
        line("open on every 100th example, cold, s", seconds("part_cold", "open")),
        line("open on every 100th example, hot, s", seconds("part_hot", "open")),
        line("its random rows, hot, million/s", rate("part_hot", "second")),
    ]
    reached = [
        ("open, hot, s", last["hot"]["open_s"], OPEN_S, last["hot"]["open_s"] <= OPEN_S),
        ("open, cold, s", last["cold"]["open_s"], OPEN_S, last["cold"]["open_s"] <= OPEN_S),
        (
            "random rows/s, hot, touched before",
            last["hot"]["second_rows_per_s"],
            READS_PER_S,
            last["hot"]["second_rows_per_s"] >= READS_PER_S,
        ),
        (
            "bytes, times the least size",
            last["bytes"] / last["rows"] / need,
            SIZE,
            last["bytes"] / last["rows"] / need <= SIZE,
        ),
    ]
    goals = [[what, got, goal, "yes" if ok else "no"] for what, got, goal, ok in reached]
    return "\n\n".join(
        [
            f"{__doc__.strip()}\n\nTeachers: {teachers}, classes: {classes}; batches of {BATCH:,} "
            f"rows, {READS:,} rows a measurement. In brackets: by the time that the process had a "
            "processor, which other work on the machine does not lengthen.",
            table(columns, lines),
            f"## Targets, at {last['rows']:,} rows",
            table(["what", "measured", "target", "reached"], goals),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--teachers", type=int, default=2)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--work", type=Path, help="where the stores are made; default: a temporary")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    smoke_argument(parser)
    args = parser.parse_args()
    if args.smoke:
        args.rows = [20_000]
    set_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        cases = []
        for rows in sorted(args.rows):
            cases.append(measure(Path(work), rows, args.teachers, args.classes))
            print(json.dumps(cases[-1]), flush=True)
    name = "_".join(["store", *(f"{case['rows'] // 10**6}m" for case in cases)])
    write_result(name, "The store of predictions, by size", report(cases), {"cases": cases}, args)


if __name__ == "__main__":
    main()
