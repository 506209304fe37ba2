"""Write what a benchmark measured: results/<date>_<hardware>_<name>.md, or a part of a page of
docs/results.

A file names the hardware, the versions and the command line, and holds no path of the machine.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import sead_dist
from sead_dist.teachers.teacher import device_model

RESULTS = Path(__file__).parent / "results"
# the name of the part of a page that `write_page` writes
MEASURED = "measured"


def common_arguments(description: str | None, rows: int, repeat: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=(description or "").strip().splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=rows, help="training rows of SST-2")
    parser.add_argument("--repeat", type=int, default=repeat, help="interleaved repetitions")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--work", type=Path, help="working folder to keep; default: a temporary")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    smoke_argument(parser)
    return parser


def smoke_argument(parser: argparse.ArgumentParser) -> None:
    """What every benchmark must have: tests/project/test_benchmarks.py runs each with it."""
    parser.add_argument(
        "--smoke", action="store_true",
        help="run with tiny inputs made on the spot, offline, and write no result",
    )  # fmt: skip


def page_arguments(parser: argparse.ArgumentParser, page: Path) -> None:
    """For the benchmarks whose result is a page of docs/results."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary")
    parser.add_argument("--page", type=Path, default=page, help="where the page is written")
    smoke_argument(parser)


def device_argument(parser: argparse.ArgumentParser) -> None:
    """For the benchmarks that a GPU can run."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def set_threads(threads: int, device: str = "cpu") -> None:
    """Set the threads of torch and the tokenisers, in this process and its children, and whether
    these use GPUs. Ends the script where the device is cuda and there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU on this machine; give --device cpu")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    torch.set_num_threads(threads)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def spread(values: Sequence[float]) -> str:
    """Median and, in brackets, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def write_result(
    name: str, title: str, text: str, raw: Any, args: argparse.Namespace, dated: bool = True
) -> Path:
    """Print the result, and write it with the hardware and the raw measurements. dated: the
    file's name says day and hardware; else it is a page (`write_page`)."""
    device = device_model(torch.device("cpu"))
    about = f"{device} {os.cpu_count()} cores"
    gpu = None
    if getattr(args, "device", "cpu") == "cuda":
        about = gpu = torch.cuda.get_device_name()
    hardware = re.sub(r"[^a-z0-9]+", "-", about.lower()).strip("-")
    today = datetime.now(UTC).date().isoformat()
    setting = table(
        ["what", "value"],
        [
            *([["GPU", gpu]] if gpu else []),
            ["processor", device],
            ["cores", os.cpu_count() or 0],
            ["threads of each process", args.threads],
            ["load average before the end", _load()],
            ["Python", platform.python_version()],
            ["torch", torch.__version__],
            ["transformers", transformers.__version__],
            ["sead_dist", sead_dist.__version__],
        ],
    )
    content = "\n\n".join(
        [
            f"{today}. `{command_line()}`",
            text,
            "## Setting",
            setting,
            "## Raw measurements",
            f"```json\n{json.dumps(raw, indent=1)}\n```",
        ]
    )
    args.results.mkdir(parents=True, exist_ok=True)
    path: Path = args.results / (f"{today}_{hardware}_{name}.md" if dated else f"{name}.md")
    print(text)
    if not args.smoke:
        if dated:
            path.write_text(f"# {title}\n\n{content}\n", encoding="utf-8")
        else:
            write_page(path, title, content)
        print(f"written to {path.name}")
    return path


def marks(name: str) -> tuple[str, str]:
    """The lines of a page between which a script writes; what is outside is written by hand."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put_into(page: Path, text: str, name: str) -> None:
    """Write the text between the two lines of this name. Ends the script where the page lacks
    them."""
    first, last = marks(name)
    before, begin, rest = page.read_text("utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        sys.exit(f"{page} lacks the lines {first} and {last}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")


def write_page(page: Path, title: str, text: str) -> None:
    """Write what was measured into a page of docs/results, and keep what was written by hand."""
    if page.exists():
        put_into(page, text, MEASURED)
        print(f"{page.name}: what stands outside the measured part is kept; read it again")
        return
    page.parent.mkdir(parents=True, exist_ok=True)
    first, last = marks(MEASURED)
    page.write_text(f"# {title}\n\n{first}\n\n{text}\n\n{last}\n", "utf-8")


def _load() -> str:
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def command_line() -> str:
    """How this was started, folders left out."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    words += ["DIR" if "/" in word else word for word in sys.argv[1:]]
    return shlex.join(words)
