"""Runs another module with models whose long-term memory stays empty, for comparison with those that have it.

    python -m benchmarks.without_memory mm_rec.cli train --preset 100m ...
    python -m benchmarks.without_memory benchmarks.recall trained --model RUN ...

No token is kept when it leaves the window wherever a model runs by whole ops: in training, in evaluation and on a GPU.
The one native call that generates a token on the CPU is not changed, so samples in a log still keep some.
"""

from __future__ import annotations

import math
import runpy
import sys
from typing import Any

from torch import Tensor

from mm_rec import ops

_memory_attention = ops.memory_attention


def window_alone(q: Tensor, k: Tensor, v: Tensor, score: Tensor, *others: Any) -> Any:
    """Stands in for :func:`mm_rec.ops.memory_attention`: no score is high enough for a slot, even an empty one."""
    return _memory_attention(q, k, v, score * 0.0 - math.inf, *others)  # with gradients, of 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    ops.memory_attention = window_alone  # type: ignore[assignment]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
