"""Bytes that this process holds, and the most that it has held since a given moment.

On a GPU these are the bytes that PyTorch has taken there, as in a run's summary. On a CPU they are
those of the whole process.
"""

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held(device: torch.device) -> int | None:
    """Bytes held now; None where the system does not report it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def reset_peak(device: torch.device) -> bool:
    """Begin a new peak; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak(device: torch.device) -> int | None:
    """The most bytes held since the last `reset_peak`; None where the system does not report it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else 1024 * int(found)
