"""Writing and reading the memories."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, rows_of
from mm_rec.ops.cuda.load_library import cuda_library

__all__ = ["KERNELS", "fits"]


def memory_context(qkv: Tensor, ring_k: Tensor, ring_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ring_k, ring_v = all_dense(ring_k, ring_v)
    qkv, stride = rows_of(qkv)
    batch, window, heads, dim = ring_k.shape
    time = qkv.shape[1]
    q = common.empty(qkv, batch, time, heads, dim)
    k, v = (common.empty(qkv, batch, window + time, heads, dim) for _ in range(2))
    cuda_library().call(
        "memory_context_forward", qkv, qkv, stride, ring_k, ring_v, TYPE_CODES[qkv.dtype], q, k, v, batch, time,
        heads, dim, window,
    )  # fmt: skip
    return q, k, v


def memory_context_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor) -> Tensor:
    dq, dk, dv = all_dense(dq, dk, dv)
    qkv, stride = rows_of(qkv)
    batch, time, heads, dim = dq.shape
    dqkv = common.empty(qkv, *qkv.shape)
    cuda_library().call(
        "memory_context_backward", qkv, dq, dk, dv, qkv, stride, TYPE_CODES[qkv.dtype], dqkv, batch, time, heads, dim,
        dk.shape[1] - time,
    )  # fmt: skip
    return dqkv


def fits(op: str, dtype: torch.dtype, dim: int) -> bool:
    return True


KERNELS = (memory_context, memory_context_backward)
