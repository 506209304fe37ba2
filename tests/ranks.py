"""Ranks for tests: gloo processes that plain pytest starts, watches and, if need be, kills.

They are forked from a server that has imported everything and computed nothing (`warm.py`). They
meet over a file, so there are no ports to collide.
"""

import multiprocessing
import os
import pickle
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm"])


def serve() -> None:
    """Start the server that ranks are forked from, where it does not run yet."""
    here = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = here if before is None else f"{here}{os.pathsep}{before}"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(
    size: int, folder: Path, work: Callable[..., Any], *args: Any, **env: str
) -> list[BaseProcess]:
    """Start `size` ranks that each call `work(world, *args)`. `work` is a module's function.

    rank r writes what it returned or raised to folder/rank-r.pkl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        (folder / f"rank-{rank}.pkl").unlink(missing_ok=True)
    meeting = folder / f"meet-{uuid.uuid4().hex}"
    serve()
    ranks = [
        CONTEXT.Process(target=_rank, args=(rank, size, meeting, env, work, args))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def finish(ranks: list[BaseProcess], folder: Path, timeout_s: float) -> list[Any]:
    """What each rank returned, or the exception it ended with. All are dead afterwards.

    Raises TimeoutError, naming the ranks that were still at work.
    """
    end = time.monotonic() + timeout_s
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    late = [number for number, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        rank.kill()
        rank.join()
    if late:
        raise TimeoutError(f"ranks {late} of {len(ranks)} still at work after {timeout_s} s")
    return [_outcome(folder / f"rank-{number}.pkl", rank) for number, rank in enumerate(ranks)]


def try_ranks(
    size: int, folder: Path, work: Callable[..., Any], *args: Any, timeout_s: float = 90.0
) -> list[Any]:
    """As `run_ranks`, but a rank's exception takes the place of its result."""
    return finish(start(size, folder, work, *args), folder, timeout_s)


def run_ranks(
    size: int, folder: Path, work: Callable[..., Any], *args: Any, timeout_s: float = 90.0
) -> list[Any]:
    """What `work(world, *args)` returned on each rank; the first rank's exception otherwise."""
    outcomes = try_ranks(size, folder, work, *args, timeout_s=timeout_s)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _outcome(path: Path, rank: BaseProcess) -> Any:
    if not path.exists():
        return RuntimeError(f"the rank ended with {rank.exitcode} and said nothing")
    return pickle.loads(path.read_bytes())


def _rank(
    rank: int, size: int, meeting: Path, env: dict[str, str], work: Callable[..., Any], args: Any
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if size > 1:
        fixed.update({name: str(value) for name, value in place.items()})
    os.environ.update({**fixed, **env})
    import torch
    import torch.distributed as dist

    from sead_dist.runtime.distributed import World, join_world, leave_world

    torch.set_num_threads(1)
    world = World(0, 1, torch.device("cpu"))
    result: Any
    try:
        if size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
            )
            world = join_world()
        result = work(world, *args)
    except BaseException as error:
        traceback.print_exc()
        result = error
    aside = meeting.with_name(f"rank-{rank}.part")
    aside.write_bytes(_packed(result))
    aside.rename(meeting.with_name(f"rank-{rank}.pkl"))
    if not isinstance(result, BaseException):
        leave_world(world)


def _packed(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
