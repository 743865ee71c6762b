"""Which kernels of the memory ops the current device has enough shared memory for."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from mm_rec.ops.cuda.delta_rule import delta_keys, delta_keys_backward, delta_rule, delta_rule_backward
from mm_rec.ops.cuda.load_library import DoesNotFitError
from mm_rec.ops.cuda.memory import window_attention, window_attention_backward

__all__ = ["fits"]


def fits(op: str, dtype: torch.dtype, dim: int, taps: int) -> bool:
    """Whether the current device has enough shared memory for a memory op, forward and backward.

    Only ``delta_keys`` has ``taps``; with others they are 0.
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
        if op == "delta_keys":
            keys = (zeros(1, 1 + taps, 1, dim, dtype=dtype), zeros(1, dim, taps), position)
            delta_keys_backward(delta_keys(*keys), *keys)
        elif op == "delta_rule":
            inputs = (tokens, tokens, tokens, zeros(1, 2, 1), zeros(1, 2, 1), position)
            out, states = delta_rule(*inputs, zeros(1, 1, dim, dim))
            delta_rule_backward(out, None, states, *inputs)
        else:
            read = (tokens, context, context, position, 1000.0)
            out, lse = window_attention(*read)
            window_attention_backward(out, out, lse, *read)
    except DoesNotFitError:
        return False
    return True
