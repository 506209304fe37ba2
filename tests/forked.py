"""The command line in forked processes: what `python -m sead_dist` does, without its seconds of
imports. For what the words of a command do; the process itself is tested by real ones.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ranks import CONTEXT, serve


def run_command(
    words: Sequence[str],
    ranks: int,
    cwd: Path,
    env: Mapping[str, str],
    folder: Path,
    stdin: Path | None = None,
) -> "subprocess.CompletedProcess[str]":
    """The command on that many ranks, as under a launcher that ends nobody; what all of them print,
    and rank 0's exit code. env: the whole environment; what is read when a library is imported (as
    HF_HOME is) must be as it is here. folder: for what they print; stdin: what rank 0 reads.

    Raises TimeoutError.
    """
    serve()
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    out.unlink(missing_ok=True)
    err.unlink(missing_ok=True)
    port = free_port()
    started = []
    for rank in range(ranks):
        place: dict[str, object] = {}
        if ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        own = {**env, **{name: str(value) for name, value in place.items()}}
        started.append(
            CONTEXT.Process(
                target=_command, args=(list(words), cwd, own, out, err, None if rank else stdin)
            )
        )
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    late = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    said = [path.read_text("utf-8") for path in (out, err)]
    if late:
        raise TimeoutError(f"ranks {late} of {ranks} still at work: {said}")
    code = started[0].exitcode
    assert code is not None
    return subprocess.CompletedProcess(list(words), code, *said)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _command(
    words: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path, stdin: Path | None
) -> None:
    import torch

    from sead_dist.cli.commands import main

    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    if stdin is not None:  # as a forked process finds it, it is closed
        sys.stdin = stdin.open(encoding="utf-8")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = ["sead-dist", *words]
    main(words)
    sys.stdout.flush()
