"""World: which rank this process is, and the few things that ranks agree on.

A world of one needs no process group. gloo and NCCL differ in backend and device only.
"""

import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from sead_dist.errors import LostRankError, RunError, UserError, rejection
from sead_dist.runtime.heartbeat import DefaultLimits, Heartbeat, Limits

T = TypeVar("T")
# A rank may compute a whole window of a large teacher while the others wait.
TIMEOUT = timedelta(hours=2)
# Ranks wait at least so long for each other at the start, however short their limits are.
LEAST_START_WAIT_S = 60.0
# A network file system may show a new file to other nodes late.
SHOWN_LATE_S = 10.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SecondCtrlC = signal.Handlers | Callable[[int, FrameType | None], Any]
LAUNCHER_FIX = "start with torchrun or accelerate launch, or unset it"
# variables in which starters other than torch's launchers give the number of processes
STARTERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}


@dataclass(frozen=True)
class World:
    """This process is rank `rank` of `size`, on `device`. exchange: the process group of teacher
    logits. It is not the student's, so that their collectives never wait for each other. control: a
    gloo group for what ranks agree on. heartbeat: this rank's signs of life. All three are None
    without a process group. command: the words of the command line; none in a call from Python."""

    rank: int
    size: int
    device: torch.device
    exchange: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None
    command: tuple[str, ...] = ()

    def set_activity(self, doing: str) -> None:
        """Note what this rank is doing, for a message in case it stops there."""
        if self.heartbeat is not None:
            self.heartbeat.set_activity(doing)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(limits: Limits | None = None) -> World:
    """The world that the launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK) describe.

    limits: when a rank counts as lost. A process group that is already there is used. Raises
    UserError where variables are missing or wrong, RunError where a rank does not start.
    """
    reject_other_world()
    reject_lone_process()
    limits = limits or DefaultLimits()
    size = number_from("WORLD_SIZE", 1, 1)
    # `accelerate launch --cpu` writes True
    cpu_only = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    on_gpu = torch.cuda.is_available() and not cpu_only
    if size == 1 and not dist.is_initialized():
        # set_device needs a GPU with its number
        number = torch.cuda.current_device() if on_gpu else None
        return World(0, 1, torch.device("cpu" if number is None else f"cuda:{number}"))
    place = local_rank(size)
    device = torch.device("cuda", place) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    heartbeat = start_heartbeat(size, backend, limits)
    exchange = dist.new_group(backend=backend, timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    heartbeat.set_activity("starting")
    return World(dist.get_rank(), dist.get_world_size(), device, exchange, control, heartbeat)


def local_rank(size: int) -> int:
    """LOCAL_RANK. Raises UserError where the launcher's variables are missing or do not fit."""
    number_from("RANK", 0, 0, size - 1)
    needed = ["RANK", "LOCAL_RANK"]
    if not dist.is_initialized():
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} but {', '.join(missing)} is not set; start with torchrun or "
            "accelerate launch, or unset WORLD_SIZE"
        )
    return number_from("LOCAL_RANK", 0, 0)


def start_heartbeat(size: int, backend: str, limits: Limits) -> Heartbeat:
    """Start this rank's heartbeat, and wait until all ranks are there. Then make the process group
    where there is none. Raises RunError, naming the rank, where one does not start."""
    if dist.is_initialized():  # ranks may come late, from long work of their own
        store, wait_s = _get_default_store(), TIMEOUT.total_seconds()
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        rank, wait_s = number_from("RANK", 0, 0), max(LEAST_START_WAIT_S, 5 * limits.timeout_s)
        store = _launcher_store(rank, wait_s)
    # a world may be joined again in the same processes
    times_joined = store.add(f"joined by {rank}", 1)
    # A call that waits blocks its connection, so the heartbeat has one of its own. Stores of some
    # versions of PyTorch have no `clone`.
    own = store.clone() if hasattr(store, "clone") else store
    signs = PrefixStore(f"heartbeat {times_joined}", own)
    # the stub of PyTorch lacks has_extended_api
    heartbeat = Heartbeat(rank, size, signs, limits)  # type: ignore[arg-type]
    heartbeat.start(wait_s)
    if not dist.is_initialized():
        heartbeat.set_activity("making the process group")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return heartbeat


def _launcher_store(rank: int, wait_s: float) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's own, else one that rank 0 holds."""
    host, port = os.environ["MASTER_ADDR"], number_from("MASTER_PORT", 0, 1, 65535)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=rank == 0 and not by_agent,
            timeout=timedelta(seconds=wait_s),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        what = "rank 0 has not started" if rank else "rank 0 cannot open the store of the ranks"
        kind = LostRankError if rank == 1 else RunError  # of ranks 1 and more only rank 1 prints
        raise kind(
            f"{what} at {host}:{port} ({str(error).splitlines()[0][:120]}); check that process and "
            "address, then give the same command again"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"sead-dist {attempt}", store)


@contextmanager
def in_world(limits: Limits | None = None, command: Sequence[str] = ()) -> Iterator[World]:
    """The launcher's world for a whole command. A collective that breaks because a rank is gone
    ends this process with a line that names it."""
    world = replace(join_world(limits), command=tuple(command))
    try:
        yield world
    except RuntimeError as error:
        end_if_rank_lost(world, error)
        raise
    leave_world(world)


def end_if_rank_lost(world: World, error: RuntimeError) -> None:
    """End this process where a collective broke because another rank is gone."""
    if world.heartbeat is not None:
        world.heartbeat.end_if_rank_lost(error)


def number_from(name: str, default: int, lowest: int, highest: int | None = None) -> int:
    """The whole number in the variable `name`, which a launcher sets; `default` where it is not
    set. Raises UserError for another text, and for a number below `lowest` or above `highest`."""
    text = os.environ.get(name, str(default))
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if number < lowest or (highest is not None and number > highest):
        upto = "" if highest is None else f" to {highest}"
        size = f" (WORLD_SIZE={os.environ.get('WORLD_SIZE')})" if name == "RANK" else ""
        raise UserError(
            f"{name}={text!r} is not a whole number from {lowest}{upto}{size}; {LAUNCHER_FIX}"
        )
    return number


def reject_other_world() -> None:
    """Raises UserError where processes were started without a common world: each would train
    alone, or in a world of another size than the launcher's."""
    for name, starter in STARTERS.items():
        count = os.environ.get(name, "1")
        if re.fullmatch("[0-9]{1,9}", count) and int(count) > 1 and "WORLD_SIZE" not in os.environ:
            raise UserError(
                f"{starter} started {count} processes ({name}={count}) but WORLD_SIZE is not set, "
                "so each would train alone; start with torchrun --nproc_per_node N -m sead_dist ..."
            )
    asked = os.environ.get("WORLD_SIZE")
    size = dist.get_world_size() if dist.is_initialized() else None
    if size is not None and asked is not None and number_from("WORLD_SIZE", 1, 1) != size:
        raise UserError(
            f"WORLD_SIZE={asked}, but the process group has {size} ranks; start "
            "every process by one launcher"
        )


def reject_lone_process() -> None:
    """Raises UserError where `accelerate launch` started one process in place of several.

    `--cpu --num_processes 2` without MPI does so silently. The variables show it: for several
    processes it sets MASTER_PORT, but no WORLD_SIZE.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and not dist.is_initialized()
    if by_accelerate and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes but started this one alone "
            "(MASTER_PORT is set, WORLD_SIZE is not); on CPU start with torchrun --standalone "
            "--nproc_per_node N -m sead_dist ..., or a config file of `accelerate config`"
        )


def leave_world(world: World) -> None:
    """End this rank's heartbeat and its process group."""
    if world.heartbeat is not None:
        world.heartbeat.finish()
    if world.size > 1 and dist.is_initialized():
        # after a rank failed, others are inside a collective; they report that themselves
        with suppress(RuntimeError):
            dist.destroy_process_group()


def gather_objects(world: World, mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank gave, in rank order, on every rank. group: None: the control group."""
    if world.size == 1:
        return [mine]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, mine, group=group or world.control)
    return gathered


def from_main(world: World, make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank; its UserError, RunError or OSError too."""
    made: tuple[T | None, Exception | None] = (None, None)
    if world.is_main:
        try:
            made = (make(), None)
        except (UserError, RunError, OSError) as error:
            made = (None, error)
    if world.size > 1:
        box: list[Any] = [made]
        dist.broadcast_object_list(box, src=0, group=world.control)
        made = box[0]
    if made[1] is not None:
        raise raised_here(world, made[1])
    return made[0]  # type: ignore[return-value]


def on_every_rank(world: World, do: Callable[[], T]) -> T:
    """`do()` on this rank. A UserError, RunError or OSError of any rank is raised on all ranks."""
    result: T | None = None
    failure: Exception | None = None
    try:
        result = do()
    except (UserError, RunError, OSError) as error:
        failure = error
    failures = gather_objects(world, failure)
    raise_first([error and raised_here(world, error) for error in failures])
    return result  # type: ignore[return-value]


def raised_here(world: World, error: Exception) -> Exception:
    """An agreed failure as this rank raises it. The command line prints a RunError on rank 0 alone,
    but an OSError on any rank. So on other ranks than 0 an agreed OSError becomes a RunError."""
    if isinstance(error, OSError) and not world.is_main:
        return RunError(str(error))
    return error


def raise_first(failures: Sequence[Exception | None]) -> None:
    """Raise the lowest rank's failure. Every rank calls this with the same list."""
    for failure in failures:
        if failure is not None:
            raise failure


def barrier(world: World) -> None:
    """Wait until all ranks have come here."""
    if world.size > 1:
        dist.barrier(group=world.control)


def node_name() -> str:
    """The name of the node that this rank runs on: SLURM's, else the host's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_shared(world: World, folders: Mapping[str, Path]) -> None:
    """Check at the start that every node of a run has the same `folders` (key -> folder): every
    rank looks for a file that rank 0 writes into each of them.

    Nothing is written where all ranks run on one node. Raises UserError on every rank, naming the
    node and the folder, where the file is missing.
    """
    nodes = gather_objects(world, node_name())
    if len(set(nodes)) == 1:
        return
    token = from_main(world, lambda: f".mark-{uuid.uuid4().hex}")
    try:
        from_main(world, lambda: _write_mark(folders, token))
        missing = gather_objects(world, _first_missing(folders, token))
    finally:
        if world.is_main:
            for folder in folders.values():
                with suppress(OSError):
                    (folder / token).unlink()
    for node, key in zip(nodes, missing, strict=True):
        if key is not None:
            if world.is_main:  # the folder may be new; one that holds files stays
                with suppress(OSError):
                    folders[key].rmdir()
            raise UserError(
                f"{key}={folders[key]}: a file that node {nodes[0]} wrote there is missing on node "
                f"{node}; give a folder on a file system that all nodes share"
            )


def _write_mark(folders: Mapping[str, Path], token: str) -> None:
    for key, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).touch()
        except OSError as error:
            raise rejection(
                f"{key}={folder} cannot be written: {error.strerror}; give another folder", error
            ) from None


def _first_missing(folders: Mapping[str, Path], token: str) -> str | None:
    end = time.monotonic() + SHOWN_LATE_S
    for key, folder in folders.items():
        while not (folder / token).exists():
            if time.monotonic() > end:
                return key
            time.sleep(0.1)
            with suppress(OSError):
                os.listdir(folder)  # makes a network file system look again
    return None


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR2 (a scheduler's notice) on any rank; the ranks agree on it
    at a step boundary. Further signals change nothing, but `second` handles a second Ctrl-C. By
    default it ends the process. Calls from Python give a handler that raises instead."""

    def __init__(self, second: SecondCtrlC = signal.SIG_DFL) -> None:
        self.signal: int | None = None
        self.second = second

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals set this flag. Afterwards their handlers are as before. Only the main
        thread can do this. A handler that is not Python's stays in place."""
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            before = {number: own for number, own in handlers.items() if own is not None}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if number == signal.SIGINT:
            signal.signal(number, self.second)

    def agreed(self, world: World) -> bool:
        """True on all ranks when any rank has a signal to stop."""
        return self.agreed_with(world, False)[0]

    def agreed_with(self, world: World, flag: bool) -> tuple[bool, bool]:
        """(whether any rank has a signal to stop, whether `flag` is true on any), the same on all
        ranks. It costs one small message."""
        mine = [self.signal is not None, flag]
        if world.size == 1:
            return mine[0], mine[1]
        flags_2 = torch.tensor(mine, dtype=torch.int64)
        dist.all_reduce(flags_2, op=dist.ReduceOp.MAX, group=world.control)
        return bool(flags_2[0]), bool(flags_2[1])
