"""Runs another module with models whose long-term memory is never read, for comparison with those that have it.

    python -m benchmarks.without_memory mm_rec.cli train --preset 100m ...
    python -m benchmarks.without_memory benchmarks.recall trained --model RUN ...

What is read from the matrices is replaced by zeros wherever a model runs by whole ops: in training, in evaluation and
on a GPU. The one native call that generates a token on the CPU is not changed, so samples in a log still read them.
"""

from __future__ import annotations

import runpy
import sys

import torch
from torch import Tensor

from mm_rec import ops

_mix_memories = ops.mix_memories


def window_alone(near: Tensor, far: Tensor, gate: Tensor) -> Tensor:
    """Stands in for :func:`mm_rec.ops.mix_memories` and adds nothing to what was read from the window."""
    return _mix_memories(near, torch.zeros_like(far), gate)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    ops.mix_memories = window_alone
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
