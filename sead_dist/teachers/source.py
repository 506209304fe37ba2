"""The teacher source looks predictions up, computes and keeps missing ones, and exchanges them.

One thread serves requests in the order in which they were submitted. It alone uses the exchange
process group, so collectives are issued in one order on every rank (invariant 8). Within a request
sharded teachers come first: all ranks compute them together, and the others each by itself.

Shapes: N teachers, R requested examples, U unique examples of a split, C classes (task order), M
examples of one rank.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from sead_dist.data.order import Split
from sead_dist.data.tokens import TokenTable, describe_cuts
from sead_dist.errors import RunError
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.inputs_check import CheckRows
from sead_dist.runtime.distributed import World, gather_objects
from sead_dist.runtime.heartbeat import StopRequestedError
from sead_dist.runtime.run_log import append_line, tell
from sead_dist.store.store import StoreFolder, Table
from sead_dist.teachers.base import Request
from sead_dist.teachers.inference import NotFiniteError, predict
from sead_dist.teachers.kinds import FileAnswers, answer_rows
from sead_dist.teachers.placement import Placement, exchange
from sead_dist.teachers.pool_client import Awaited, PoolClient
from sead_dist.teachers.sharding import agreed, build_sharded, check_sharded, predict_together
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.whole import load_whole

# predictions of a teacher in one block; a killed run loses at most these and two batches
ROWS_PER_BLOCK = 4096
# a slow teacher's predictions are kept after so many seconds, so that a killed run loses no more
KEEP_S = 20.0


class StoredSource:
    """Serves requests from the store and, where rows are missing, from the teachers.

    A model is loaded when one of its rows is first missing. progress_or_stop: gets the progress
    after every batch, and may raise StopRequestedError. pool_client: waits for teachers whose
    placement is `pool`.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        placement: Placement,
        world: World,
        store: StoreFolder,
        task: str,
        run: Path,
        accept_any: bool,
        trust_remote_code: bool,
        progress_or_stop: Callable[[str], None],
        pool_client: PoolClient | None = None,
    ) -> None:
        self.teachers, self.placement = teachers, placement
        self.world, self.store, self.task, self.run = world, store, task, run
        self.accept_any, self.trust_remote_code = accept_any, trust_remote_code
        self.progress_or_stop, self.pool_client = progress_or_stop, pool_client
        self.journal = Journal(run / "teacher_rows", world)
        self.models: dict[int, PreTrainedModel] = {}
        self.empty: dict[str, PreTrainedModel] = {}
        self.tables: dict[tuple[int, int], Table] = {}
        self.tokens: dict[tuple[tuple[str, int], int], TokenTable] = {}
        self.touched: dict[str, np.ndarray] = {}
        # for files of predictions: where the predictions of a split's examples are, place_U
        self.places: dict[tuple[int, int], np.ndarray] = {}
        # seconds since this start for serving requests: loading, forwards, waiting for others
        self.spent_s = 0.0
        threads = torch.get_num_threads()
        self.thread = ThreadPoolExecutor(1, "teachers", lambda: set_up_thread(threads, world))
        on_gpu = world.device.type == "cuda"
        self.stream: torch.cuda.Stream | None = (
            torch.cuda.Stream(world.device) if on_gpu else None  # type: ignore[no-untyped-call]
        )

    def submit(self, request: Request) -> "Future[TeacherLogits]":
        self.touch(request.split, request.entries_R, request.needed_NR)
        # lines of the thread go where those of this call go
        return self.thread.submit(copy_context().run, self._serve_aside, request)

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    # what was needed, and what was computed

    def touch(self, split: Split, entries_R: np.ndarray, needed_NR: np.ndarray | None) -> None:
        """Note the (teacher, example) pairs that this run needs."""
        name = split.examples.split
        if name not in self.touched:
            self.touched[name] = np.zeros((len(self.teachers), len(split.ids_U2)), bool)
        self.touched[name][:, entries_R] |= True if needed_NR is None else needed_NR
        # predictions of a file are neither computed nor kept
        self.touched[name][[teacher.file is not None for teacher in self.teachers]] = False

    def counts(self) -> tuple[int, int]:
        """(pairs computed by all ranks and restarts of this run, pairs read instead).

        Every rank calls this.
        """
        needed = sum(int(pairs.sum()) for pairs in self.touched.values())
        computed = min(self.journal.rows(), needed)
        return computed, needed - computed

    def numerics_read(self) -> list[str]:
        """The numerics classes from which any rank read kept predictions. Every rank calls this."""
        mine = {numerics for table in self.tables.values() for numerics in table.classes_read}
        return sorted(set().union(*gather_objects(self.world, mine)))

    # serving a request, in the source's own thread

    def _serve_aside(self, request: Request) -> TeacherLogits:
        """Serve a request. On a GPU loading, forwards and exchange use one stream beside the
        student's."""
        began = time.perf_counter()
        with torch.cuda.stream(self.stream):
            answer = self._serve(request)
        self.spent_s += time.perf_counter() - began
        return answer

    def _serve(self, request: Request) -> TeacherLogits:
        owner_NR = self.placement.owners(request)
        needed_NR = self._answered(request)
        own_NR = needed_NR & (owner_NR == self.world.rank)
        for n, together in enumerate(self.placement.together_N):
            if together:
                self._compute_together(n, request, np.flatnonzero(own_NR[n]))

        def answers() -> list[np.ndarray]:
            found: dict[int, np.ndarray] = {}
            # this rank's own work comes before waiting for others
            for n in sorted(range(len(own_NR)), key=self.placement.awaits):
                if self.placement.awaits(n):
                    self._wait_for_pool(request, own_NR)
                found[n] = self._answer(n, request, np.flatnonzero(own_NR[n]))
            return [found[n] for n in range(len(own_NR))]

        mine = agreed(self.world, request.what, answers)
        classes = self.teachers[0].key.classes
        logits_NRC = exchange(mine, owner_NR, needed_NR, classes, self.world)
        return TeacherLogits(torch.from_numpy(logits_NRC), torch.from_numpy(needed_NR))

    def _answered(self, request: Request) -> np.ndarray:
        """The answered_NR: which teachers are to predict which examples, and can. It is the same
        on every rank."""
        shape = (len(self.teachers), len(request.entries_R))
        answered_NR = (
            np.ones(shape, bool) if request.needed_NR is None else request.needed_NR.copy()
        )
        for n, teacher in enumerate(self.teachers):
            if teacher.file is not None:
                answered_NR[n] &= self._places(n, request.split)[request.entries_R] >= 0
        return answered_NR

    def _places(self, n: int, split: Split) -> np.ndarray:
        """The place_U: where a file's predictions of the examples of a split are (-1: there
        is none)."""
        key, file = (n, id(split)), self.teachers[n].file
        assert file is not None
        if key not in self.places:
            self.places[key] = file.places(split.ids_U2)
        return self.places[key]

    def _compute_together(self, n: int, request: Request, positions_M: np.ndarray) -> None:
        """Compute the rows of a split teacher that any rank lacks. All ranks forward together, each
        its own rows. They agree whether there is work (invariant 8). All that may fail on one rank
        alone comes before the forwards."""
        entries_M = request.entries_R[positions_M]
        missing_K = agreed(self.world, request.what, lambda: self._missing(n, request, entries_M))
        if any(gather_objects(self.world, len(missing_K) > 0, self.world.exchange)):
            rows = agreed(self.world, request.what, lambda: self._make_ready(n, request.split))
            if rows is not None:
                check = partial(check_sharded, self.models[n], self.teachers[n], rows)
                agreed(self.world, request.what, check)
            agreed(self.world, request.what, lambda: self._compute(n, request, missing_K))

    def _make_ready(self, n: int, split: Split) -> CheckRows | None:
        """Do this rank's own work before the common forwards. Returns rows to try a teacher on, if
        it is loaded here."""
        rows = None if n in self.models else self._check_rows(n, split)
        self._load(n, split)
        self._tokens(n, split)
        return rows

    def _check_rows(self, n: int, split: Split) -> CheckRows:
        """Rows of a split to try a teacher on, the same on every rank."""
        inputs, tokens = self.teachers[n].inputs, self._tokens(n, split)
        return inputs.real_rows(split.examples, self.world.device, tokens)

    def _wait_for_pool(self, request: Request, own_NR: np.ndarray) -> None:
        """Wait for this rank's share of the rows of all teachers in the pool."""
        if self.pool_client is None:
            raise ValueError("a teacher's placement is pool, and there is no pool client")
        touched_NU = self.touched[request.split.examples.split]
        awaited = [
            Awaited(
                self.teachers[n].name,
                self.table(n, request.split),
                request.entries_R[own_NR[n]],
                touched_NU[n],
            )
            for n in range(len(self.teachers))
            if self.placement.awaits(n)
        ]
        self.pool_client.wait(awaited, request.what)
        if request.step_of is not None:
            self.pool_client.tell_ahead(awaited, request.what)

    def _missing(self, n: int, request: Request, entries_M: np.ndarray) -> np.ndarray:
        """Which of these entries are not in the store."""
        if len(entries_M) == 0:
            return entries_M
        table = self.table(n, request.split)
        if not table.lookup(entries_M)[1].all():
            table.refresh()
        return entries_M[~table.lookup(entries_M)[1]]

    def _load(self, n: int, split: Split) -> PreTrainedModel:
        """The model of teacher n. The first call loads it and makes it ready for rows of this
        split."""
        if n not in self.models:
            teacher = self.teachers[n]
            if self.placement.together_N[n]:
                self.models[n] = build_sharded(teacher, self.world, self.trust_remote_code)
            else:
                self.models[n] = load_whole(
                    teacher, self.world.device, self.trust_remote_code, self.empty,
                    self._check_rows(n, split),
                )  # fmt: skip
        return self.models[n]

    def _answer(self, n: int, request: Request, positions_M: np.ndarray) -> np.ndarray:
        """Task-order logits_MC of teacher n for these positions of the request."""
        teacher = self.teachers[n]
        order_C = list(range(teacher.key.classes))
        if len(teacher.order_C) == len(order_C):
            order_C = teacher.order_C
        entries_M = request.entries_R[positions_M]
        if len(entries_M) == 0:
            return np.zeros((0, len(order_C)), np.float32)
        if teacher.file is not None:
            return np.asarray(teacher.file.values_KC[self._places(n, request.split)[entries_M]])
        # a teacher of the pool is never computed here; its rows were waited for
        if self.placement.is_alone(n):
            missing_K = self._missing(n, request, entries_M)
            if len(missing_K):
                self._compute(n, request, missing_K)
        logits_MC, present_M = self.table(n, request.split).lookup(entries_M)
        if not present_M.all():
            raise RunError(
                f"teacher {teacher.name} at {request.what}: {int((~present_M).sum())} predictions "
                f"were lost from the store {self.store.layout.root} while it was read; check the "
                "disk, then give the same command again to resume"
            )
        return np.ascontiguousarray(logits_MC[:, order_C], dtype=np.float32)

    def _compute(self, n: int, request: Request, entries_M: np.ndarray) -> None:
        """Compute these examples and keep their predictions, block by block."""
        teacher, table, split = self.teachers[n], self.table(n, request.split), request.split
        rows_M = split.row_U[entries_M]
        held: list[tuple[np.ndarray, np.ndarray]] = []
        kept_at = time.monotonic()

        def keep(at_least: int) -> None:
            nonlocal kept_at
            rows = sum(len(part) for part, _ in held)
            if rows > 0 and rows >= at_least:
                parts = np.concatenate([part for part, _ in held])
                table.write(entries_M[parts], np.concatenate([logits for _, logits in held]))
                self.journal.note(teacher.name, split.examples.split, rows)
                held.clear()
                kept_at = time.monotonic()

        def done(part: np.ndarray, logits_PC: np.ndarray) -> None:
            held.append((part, logits_PC))
            keep(1 if time.monotonic() - kept_at > KEEP_S else ROWS_PER_BLOCK)
            self.progress_or_stop(f"teacher {teacher.name}, {request.what}")

        limits = (teacher.cut, done)
        try:
            if teacher.answers is not None and not isinstance(teacher.answers, FileAnswers):
                classes = teacher.key.classes
                answer_rows(teacher.answers, teacher.name, split.examples, classes, rows_M, done)
                return keep(1)
            model, tokens = self._load(n, split), self._tokens(n, split)
            if self.placement.together_N[n]:
                predict_together(model, tokens, rows_M, self.world, *limits)
            else:
                predict(model, tokens, rows_M, self.world.device, *limits)
        except (StopRequestedError, RunError):
            keep(1)
            raise
        except NotFiniteError as error:
            row = int(rows_M[error.position])
            step_of = request.step_of
            what = f"step {step_of(entries_M[error.position])}" if step_of else request.what
            raise RunError(
                f"teacher {teacher.name} gave NaN or infinite logits at {what} for "
                f"{split.examples.split} row {row + 1} "
                f"({split.examples.texts_a[row * split.tokens.choices][:60]!r}); "
                "check its weights, or compute it in fp32 (teacher_precision=fp32)"
            ) from None
        keep(1)

    def table(self, n: int, split: Split) -> Table:
        """The kept predictions of a teacher on a split."""
        key = (n, id(split))
        if key not in self.tables:
            self.tables[key] = self.store.table(
                self.teachers[n].key,
                split.ids_U2,
                self.task,
                split.examples.split,
                str(self.run),
                self.accept_any,
            )
        return self.tables[key]

    def _tokens(self, n: int, split: Split) -> TokenTable:
        """The tokens of a split. Teachers with one tokeniser and maximum length share them."""
        teacher = self.teachers[n]
        key = (teacher.inputs.key, id(split))
        if key not in self.tokens:
            tokens = teacher.inputs.tokens(split.examples)
            cuts = {split.examples.split: tokens.cut_of()}
            line = describe_cuts(cuts, teacher.inputs.max_length)
            if line is not None:
                tell(f"teacher {teacher.name}: {line}")
            self.tokens[key] = tokens
        return self.tokens[key]

    def share_tokens(self, split: Split, inputs: ModelInputs) -> None:
        """Use the student's tokens of a split for teachers of the same tokeniser and length."""
        self.tokens[inputs.key, id(split)] = split.tokens


def set_up_thread(threads: int, world: World) -> None:
    """Give a new thread this process's number of threads and GPU instead of the defaults."""
    torch.set_num_threads(threads)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)


class Journal:
    """A log of the computed blocks: this rank's file in RUN/teacher_rows/, beside those of other
    ranks."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.path = folder / f"rank-{world.rank}.jsonl"

    def note(self, teacher: str, split: str, rows: int) -> None:
        """Log that so many rows of a teacher were put into the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"teacher": teacher, "split": split, "rows": rows, "time": round(time.time(), 3)}
        append_line(self.path, json.dumps(record))

    def rows(self) -> int:
        """Rows computed by all ranks and restarts of this run. Every rank calls this."""
        mine = _rows(self.path) if self.path.is_file() else 0
        return sum(gather_objects(self.world, mine)) + self._rows_of_other_worlds()

    def _rows_of_other_worlds(self) -> int:
        """Rows computed by ranks that this world no longer has."""
        paths = self.folder.glob("rank-*.jsonl")
        gone = [path for path in paths if int(path.stem.partition("-")[2]) >= self.world.size]
        return sum(_rows(path) for path in gone)


def _rows(path: Path) -> int:
    return sum(_rows_of(line) for line in path.read_text(encoding="utf-8").splitlines())


def _rows_of(line: str) -> int:
    """Rows of a line in the log. A line that a kill cut off counts as 0."""
    try:
        return int(json.loads(line)["rows"])
    except (ValueError, KeyError, TypeError):
        return 0
