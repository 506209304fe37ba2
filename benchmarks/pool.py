"""A pool of four workers that are killed in turn, each 20 s after it is ready, against one in which
none is killed.

Both pools fill an empty store for a student that reads it. The rows that the workers recorded as
computed are counted. For each kill the whole work item of the killed worker's lease is counted too.
Target: at most 5% extra rows, one work item for each kill and one for each worker; and the
student's parameters equal bit for bit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inputs import laid_out, random_classifier
from result_file import common_arguments, set_threads, table, write_result

from sead_dist.runs.pool_worker import worker_folder
from sead_dist.runtime.run_log import is_finished, read_json

ALLOWED_SHARE = 0.05
# dead after so long; long enough for four workers and a student on one core
LEASE_S = 10.0


@dataclass
class Member:
    """A worker: its process, how often it was started, and where what it says goes."""

    number: int
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0

    def is_ready(self) -> bool:
        """Whether the process that was started last has begun to compute."""
        log = self.log.read_text(encoding="utf-8", errors="replace")
        return log.count(f"worker {self.number} of ") == self.starts

    def is_at_work(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class Pool:
    """The workers of one run; `lost` holds the rows of work items that dead ones had a lease on."""

    words: list[str]
    run: Path
    store: Path
    members: list[Member]
    item_rows: int
    lost: list[int] = field(default_factory=list)

    def start(self, member: Member) -> None:
        which = f"{member.number}/{len(self.members)}"
        member.starts += 1
        with member.log.open("ab") as log:
            member.process = subprocess.Popen(
                [*sead_dist("teach"), *self.words, "--worker", which], stdout=log, stderr=log
            )

    def kill(self, member: Member) -> None:
        assert member.process is not None
        member.process.kill()
        member.process.wait()
        leases = (self.store / "leases").iterdir()
        held = [one for one in leases if f" {member.process.pid} " in text_of(one)]
        self.lost += [self.item_rows] * len(held)

    def computed(self) -> int:
        """Rows that the workers wrote down, over all their starts."""
        folders = [worker_folder(self.run, one.number, len(self.members)) for one in self.members]
        lines = [
            line
            for folder in folders
            for path in (folder / "teacher_rows").glob("rank-*.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        return sum(int(json.loads(line)["rows"]) for line in lines)

    def end(self) -> None:
        for member in self.members:
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
                member.process.wait()


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def sead_dist(command: str) -> list[str]:
    return [sys.executable, "-m", "sead_dist", command]


def one_run(
    root: Path, words: list[str], setting: argparse.Namespace, every_s: float | None
) -> Any:
    """Figures of a student and its pool, a worker killed every so many seconds."""
    root.mkdir(parents=True)
    run, store = root / "run", root / "store"
    words = [*words, f"output_dir={run}", f"store={store}"]
    members = [Member(n, root / f"worker-{n}.log") for n in range(1, setting.workers + 1)]
    pool = Pool(words, run, store, members, setting.item_rows)
    kills = 0
    began = time.monotonic()
    kill_at: float | None = None
    with (root / "student.log").open("wb") as log:
        student = subprocess.Popen([*sead_dist("distill"), *words], stdout=log, stderr=log)
    try:
        for member in members:
            pool.start(member)
        while any(member.is_at_work() for member in members):
            time.sleep(0.1)
            victim = members[kills % len(members)]
            if every_s is None or kills == setting.kills:
                continue
            if not victim.is_at_work() or not victim.is_ready():
                continue
            kill_at = kill_at or time.monotonic() + every_s
            if time.monotonic() > kill_at:
                pool.kill(victim)
                pool.start(victim)
                kills, kill_at = kills + 1, None
        pool_s = time.monotonic() - began
        if student.wait() != 0 or not is_finished(run):
            sys.exit((root / "student.log").read_text(encoding="utf-8"))
    finally:
        pool.end()
        if student.poll() is None:
            student.kill()
            student.wait()
    summary = read_json(run / "run_summary.json")
    return {
        "kills": kills,
        "pairs": summary["store_hits"],
        "computed": pool.computed(),
        "lost_at_most": sum(pool.lost),
        "pool_s": round(pool_s, 1),
        "student_waited_s": summary["teacher_wait_s"],
        "model": (run / "model" / "model.safetensors").read_bytes().hex(),
    }


def report(peace: dict[str, Any], killed: dict[str, Any], args: argparse.Namespace) -> None:
    equal = peace.pop("model") == killed.pop("model")
    rows = []
    for name, one, kills in (("in peace", peace, 0), ("killed", killed, killed["kills"])):
        extra = one["computed"] - one["pairs"] + one["lost_at_most"]
        allowed = ALLOWED_SHARE * one["pairs"] + (kills + args.workers) * args.item_rows
        one |= {"extra": extra, "allowed": round(allowed)}
        share = f"{100 * extra / one['pairs']:.1f}%"
        row: list[object] = [name, kills, one["pairs"], one["computed"], one["lost_at_most"]]
        rows.append([*row, extra, share, one["allowed"], one["pool_s"]])
    columns = ["pool", "kills", "rows needed", "rows kept", "lost in kills, at most"]
    columns += ["extra rows", "extra", "allowed", "until all workers ended, s"]
    verdict = "reached" if equal and killed["extra"] <= killed["allowed"] else "MISSED"
    same = "equal bit for bit" if equal else "NOT equal"
    text = (
        f"{args.workers} workers with {args.threads} thread each on the cores that this benchmark "
        f"may use ({len(os.sched_getaffinity(0))}), one after the other killed (SIGKILL) "
        f"{args.every_s:g} s after it is ready, and started again; {args.teachers} teachers "
        f"{args.shape} with random weights, work items of {args.item_rows} rows, a lease is broken "
        f"after {LEASE_S:g} s, student L2-H128, {args.rows} rows of SST-2.\n\n"
        f"{table(columns, rows)}\n\n"
        f"The students' parameters are {same}. Target (5% + a work item for each kill + one for "
        f"each worker, and equal parameters): {verdict}."
    )
    raw = {"in peace": peace, "killed": killed, "parameters equal": equal}
    write_result("pool", "A pool whose workers are killed", text, raw, args)


def main() -> None:
    parser = common_arguments(__doc__, rows=8000, repeat=1)
    parser.add_argument("--shape", default="L4-H256", help="of the teachers, random weights")
    parser.add_argument("--teachers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--item-rows", type=int, default=256)
    parser.add_argument("--every-s", type=float, default=20.0, help="seconds from ready to kill")
    parser.add_argument("--kills", type=int, help="largest number of kills; default: no limit")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.shape, args.teachers, args.every_s = 300, "L1-H32", 1, 0.0
        args.workers, args.item_rows, args.kills = 1, 64, 1
    set_threads(args.threads)
    # ended from outside, it ends its workers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with laid_out(args) as (folder, data, tokenizer):
        teachers = [
            str(random_classifier(folder / f"{args.shape}-{n}", args.shape, tokenizer, n))
            for n in range(args.teachers)
        ]
        words = [
            "sst2",
            f"data.path={data}",
            f"student={random_classifier(folder / 'student', 'L2-H128', tokenizer, 0)}",
            f"teachers=[{','.join(teachers)}]",
            "placement=pool",
            f"pool.item_rows={args.item_rows}",
            f"pool.lease_s={LEASE_S}",
            "num_train_epochs=1",
            "teacher_validation=off",
        ]
        root = Path(tempfile.mkdtemp(dir=folder))
        peace = one_run(root / "peace", words, args, None)
        killed = one_run(root / "killed", words, args, args.every_s)
        report(peace, killed, args)


if __name__ == "__main__":
    main()
