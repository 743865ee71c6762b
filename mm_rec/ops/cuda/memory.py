"""Writing and reading the memories."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, empty_like, rows_of, workspace_of
from mm_rec.ops.cuda.load_library import DoesNotFitError, cuda_library
from mm_rec.ops.reference import memory_versions, rotary_angles

__all__ = ["KERNELS", "fits"]


def memory_update(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v, address, rate, position, *before = all_dense(*inputs)
    sizes = batch, time, heads, dim, slots, window = _memory_sizes(k, position, address.shape[1])
    versions = memory_versions(time, window)
    key, value = (common.empty(address, batch, versions, heads, slots, dim) for _ in range(2))
    mass = common.empty(address, batch, versions, heads, slots)
    workspace = workspace_of("memory_update", k, batch, time, window)
    cuda_library().call(
        "memory_update_forward", k, k, v, TYPE_CODES[k.dtype], address, rate, position, *before, key, value, mass,
        workspace, *sizes,
    )  # fmt: skip
    return key, value, mass


def memory_update_backward(*inputs: Tensor) -> tuple[Tensor, ...]:
    dkey, dvalue, dmass, key, value, mass, k, v, address, rate, position = all_dense(*inputs)
    sizes = _memory_sizes(k, position, address.shape[1])
    gradients = empty_like(k, v, address, rate, key[:, 0], value[:, 0], mass[:, 0])
    cuda_library().call(
        "memory_update_backward", k, dkey, dvalue, dmass, key, value, mass, k, v, TYPE_CODES[k.dtype], address, rate,
        position, *gradients, workspace_of("memory_update_backward", k, *sizes), *sizes,
    )  # fmt: skip
    return tuple(gradients)


def memory_read(*inputs: Tensor | float) -> tuple[Tensor, Tensor]:
    q, k, v, key, value, mass, position, rotary_base = all_dense(*inputs)
    sizes = batch, time, heads, dim, _, window = _memory_sizes(k, position, key.shape[3])
    out, lse = empty_like(q), common.empty(mass, batch, heads, time)
    rotary = _rotary_table(window, dim, rotary_base, q.device)
    workspace = workspace_of("memory_read", q, batch, time, heads, window)
    cuda_library().call(
        "memory_read_forward", q, q, k, v, TYPE_CODES[q.dtype], key, value, mass, position, rotary, out, lse,
        workspace, *sizes,
    )  # fmt: skip
    return out, lse


def memory_read_backward(*inputs: Tensor | float) -> tuple[Tensor, ...]:
    dout, out, lse, q, k, v, key, value, mass, position, rotary_base = all_dense(*inputs)
    sizes = batch, time, heads, dim, _, window = _memory_sizes(k, position, key.shape[3])
    gradients = empty_like(q, k, v, key, value, mass)
    rotary = _rotary_table(window, dim, rotary_base, q.device)
    workspace = workspace_of("memory_read", q, batch, time, heads, window)
    cuda_library().call(
        "memory_read_backward", q, dout, out, lse, q, k, v, TYPE_CODES[q.dtype], key, value, mass, position, rotary,
        *gradients, workspace, *sizes,
    )  # fmt: skip
    return tuple(gradients)


def _memory_sizes(k: Tensor, position: Tensor, slots: int) -> tuple[int, int, int, int, int, int]:
    """Returns B, T, H, d, S and W of the memory ops; the kernels are written for even d up to 256."""
    batch, time = position.shape
    if k.shape[3] % 2 or k.shape[3] > 256:
        raise ValueError(f"the CUDA kernels take heads of even size up to 256, got {k.shape[3]}")
    return batch, time, k.shape[2], k.shape[3], slots, k.shape[1] - time


@functools.lru_cache(maxsize=16)
def _rotary_table(window: int, dim: int, base: float, device: torch.device) -> Tensor:
    """Returns cosine and sine of distance times frequency, (W + 2176, 2, d / 2): 34 tiles of 64 tokens need no more."""
    angle = rotary_angles(torch.arange(window + 2176), dim, base)
    return torch.stack([angle.cos(), angle.sin()], dim=1).float().to(device)


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


def fits(op: str, dtype: torch.dtype, dim: int, slots: int) -> bool:
    """Whether the current device has enough shared memory for a memory op, forward and backward."""
    limit = os.environ.get("MM_REC_CUDA_SHARED_MEMORY")  # read by device.cuh
    return _fits(op, dtype, dim, slots, torch.cuda.current_device(), limit)


@functools.cache
def _fits(op: str, dtype: torch.dtype, dim: int, slots: int, device: int, limit: str | None) -> bool:
    """Try the kernels on one token that writes: whether they fit is known only when they are launched."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    window, context, memory = 2, zeros(1, 3, 1, dim, dtype=dtype), zeros(1, 2, 1, slots, dim)
    mass, position = zeros(1, 2, 1, slots), torch.full((1, 1), window, device=device)
    try:
        if op == "memory_update":
            inputs = (context, context, memory[0, 0], zeros(1), position)
            memory_update(*inputs, memory[:, 0], memory[:, 0], mass[:, 0])
            memory_update_backward(memory, memory, mass, memory, memory, mass, *inputs)
        else:
            read = (context[:, 2:], context, context, memory, memory, mass, position, 1000.0)
            out, lse = memory_read(*read)
            memory_read_backward(out, out, lse, *read)
    except DoesNotFitError:
        return False
    return True


KERNELS = (
    memory_update, memory_update_backward, memory_read, memory_read_backward, memory_context, memory_context_backward,
)  # fmt: skip
