"""The mean of the student's weights over the last steps of a run (Izmailov et al. 2018; here with
the run's own learning-rate schedule).

The running sum is fp32 and part of every checkpoint, so that a resumed run has the same mean to the
last bit.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FILE = "average.safetensors"


class WeightAverage:
    """Sums of the floating-point tensors of a student, after each step from `first` (from 1) on.
    Rank 0 alone has them: all ranks have equal weights after every step (invariant 7)."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Count the weights that the student has now."""
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                mine = tensor.detach().float()
                if name in self.sums:
                    self.sums[name] += mine.to(self.sums[name].device)
                else:
                    self.sums[name] = mine.clone()
        self.count += 1

    def mean(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean; of tensors that are no floating-point numbers those of `weights`."""
        means = {name: total / self.count for name, total in self.sums.items()}
        return {n: means[n].to(w.dtype) if n in means else w for n, w in weights.items()}

    def save(self, folder: Path) -> None:
        """Write the sums into a checkpoint, where there are any."""
        if self.count:
            sums = {name: total.contiguous() for name, total in self.sums.items()}
            save_file(sums, folder / FILE, metadata={"steps": str(self.count)})

    def load(self, folder: Path, device: torch.device) -> None:
        """Take the sums of a checkpoint; none where it has none."""
        path = folder / FILE
        self.count, self.sums = 0, {}
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                self.count = int((file.metadata() or {})["steps"])
            self.sums = {name: total.to(device) for name, total in load_file(path).items()}
