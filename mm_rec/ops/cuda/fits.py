"""Which kernels of the memory ops the current device has enough shared memory for."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from mm_rec.ops.cuda.load_library import DoesNotFitError
from mm_rec.ops.cuda.memory import memory_attention, memory_attention_backward, retain
from mm_rec.ops.cuda.mixed_keys import mixed_keys, mixed_keys_backward

__all__ = ["fits"]


def fits(op: str, dtype: torch.dtype, dim: int, taps: int) -> bool:
    """Whether the current device has enough shared memory for a memory op, forward and backward.

    Only ``mixed_keys`` has ``taps``; with others they are 0.
    """
    limit = os.environ.get("MM_REC_CUDA_SHARED_MEMORY")  # read by device.cuh
    return _fits(op, dtype, dim, taps, torch.cuda.current_device(), limit)


@functools.cache
def _fits(op: str, dtype: torch.dtype, dim: int, taps: int, device: int, limit: str | None) -> bool:
    """Try the kernels on two tokens: whether they fit is known only when they are launched."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    tokens, context = zeros(1, 2, 1, dim, dtype=dtype), zeros(1, 4, 1, dim, dtype=dtype)
    position = torch.zeros((1, 2), dtype=torch.int64, device=device)
    try:
        if op == "mixed_keys":
            keys = (zeros(1, 1 + taps, 1, dim, dtype=dtype), zeros(1, dim, taps), position)
            mixed_keys_backward(mixed_keys(*keys), *keys)
        else:
            score, kept, kept_score = zeros(1, 4, 1), zeros(1, 1, 2, dim, dtype=dtype), zeros(1, 1, 2)
            held = retain(score, position, kept_score)
            read = (tokens, context, context, score, *held, position, kept, kept, kept_score, 1000.0)
            out, lse = memory_attention(*read)
            memory_attention_backward(out, out, lse, *read)
    except DoesNotFitError:
        return False
    return True
