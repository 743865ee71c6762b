"""The most memory that training steps take, measured in a process of its own, which runs this module."""

from __future__ import annotations

import subprocess
import sys

import torch

from mm_rec import system
from mm_rec.bench.training import mm_rec, random_batch
from mm_rec.config import PRESETS

__all__ = ["peak_memory"]

STEPS = 3


def peak_memory(preset: str, precision: str, batch_size: int, seq_len: int) -> int:
    """Returns the most bytes that a fresh process has, or takes on the GPU, in three training steps of one expert."""
    device = str(torch.get_default_device())
    command = [sys.executable, "-m", "mm_rec.bench.memory", device, preset, precision, str(batch_size), str(seq_len)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout)


def main(device: str, preset: str, precision: str, batch_size: str, seq_len: str) -> None:
    """Take some training steps with one expert and print the peak: of this process, or of what it has on a GPU."""
    torch.set_default_device(device)
    config = PRESETS[preset]
    contender = mm_rec(config, precision)["one_domain"]
    batch = random_batch(config, int(batch_size), int(seq_len))
    for _ in range(STEPS):
        contender.step(*batch)
    if torch.device(device).type == "cuda":
        sys.stdout.write(f"{torch.cuda.max_memory_allocated()}\n")
        return
    sys.stdout.write(f"{system.peak_memory()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
