"""The most memory that training steps take, measured in a process of its own, which runs this module."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch

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
    sys.stdout.write(f"{_peak()}\n")


def _peak() -> int:
    """Most bytes that this process had resident; the system's own count may start at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main(*sys.argv[1:])
