"""What a block keeps of its recent tokens, and attention over them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, empty_like, rows_of, workspace_of
from mm_rec.ops.cuda.load_library import cuda_library
from mm_rec.ops.reference import RUN, rotary_angles

__all__ = ["KERNELS", "memory_attention", "memory_attention_backward", "retain"]


def retain(score: Tensor, position: Tensor, kept_score: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the slot that each token takes when it leaves the window, and what the slots hold between runs."""
    score, position, kept_score = all_dense(score, position, kept_score)
    (batch, heads, slots), time = kept_score.shape, position.shape[1]
    slot = common.empty(score, batch, heads, time, dtype=torch.int32)
    held = common.empty(score, batch, heads, -(-time // RUN) + 1, slots, dtype=torch.int32)
    cuda_library().call(
        "retain", score, score, position, kept_score, slot, held, batch, time, heads, score.shape[1] - time, slots
    )
    return slot, held


def memory_attention(*inputs: Tensor | float) -> tuple[Tensor, Tensor]:
    """Returns what is read, and the logarithm of each softmax's denominator (B, H, T) float32."""
    q, k, v, score, slot, held, position, kept_k, kept_v, kept_score, rotary_base = all_dense(*inputs)
    sizes = batch, time, heads, dim, window = _sizes(k, position)
    out, lse = empty_like(q), common.empty(q, batch, heads, time, dtype=torch.float32)
    rotary = _rotary_table(window, dim, rotary_base, q.device)
    cuda_library().call("window_attention_forward", q, q, k, v, TYPE_CODES[q.dtype], position, rotary, out, lse, *sizes)
    slots = kept_k.shape[2]
    workspace = workspace_of("retained_attention_forward", q, *sizes, slots)
    cuda_library().call(
        "retained_attention_forward", q, q, k, v, kept_k, kept_v, TYPE_CODES[q.dtype], score, kept_score, slot, held,
        position, out, lse, workspace, *sizes, slots,
    )  # fmt: skip
    return out, lse


def memory_attention_backward(*inputs: Tensor | float) -> tuple[Tensor, ...]:
    """Returns the gradients of q, k, v, score, kept_k, kept_v and kept_score.

    With the result and the denominator of the whole softmax, the window's own kernels give its part of the gradients;
    those of the pairs are added.
    """
    dout, out, lse, q, k, v, score, slot, held, position, kept_k, kept_v, kept_score, rotary_base = all_dense(*inputs)
    sizes = *_, dim, window = _sizes(k, position)
    gradients, inner = empty_like(q, k, v), empty_like(lse)
    of_kept = empty_like(score, kept_k, kept_v, kept_score)
    rotary = _rotary_table(window, dim, rotary_base, q.device)
    cuda_library().call(
        "window_attention_backward", q, dout, out, lse, q, k, v, TYPE_CODES[q.dtype], position, rotary, *gradients,
        inner, *sizes,
    )  # fmt: skip
    slots = kept_k.shape[2]
    workspace = workspace_of("retained_attention_backward", q, *sizes, slots)
    cuda_library().call(
        "retained_attention_backward", q, dout, lse, inner, q, k, v, kept_k, kept_v, TYPE_CODES[q.dtype], score,
        kept_score, slot, held, position, *gradients, *of_kept, workspace, *sizes, slots,
    )  # fmt: skip
    return (*gradients, *of_kept)


def _sizes(k: Tensor, position: Tensor) -> tuple[int, int, int, int, int]:
    """Returns B, T, H, d and W; the kernels are written for even d up to 256."""
    batch, time = position.shape
    if k.shape[3] % 2 or k.shape[3] > 256:
        raise ValueError(f"the CUDA kernels take heads of even size up to 256, got {k.shape[3]}")
    return batch, time, k.shape[2], k.shape[3], k.shape[1] - time


@functools.lru_cache(maxsize=16)
def _rotary_table(window: int, dim: int, base: float, device: torch.device) -> Tensor:
    """Returns cosine and sine of distance times frequency, (W + 2176, 2, d / 2): 34 tiles of 64 tokens need no more."""
    angle = rotary_angles(torch.arange(window + 2176), dim, base)
    return torch.stack([angle.cos(), angle.sin()], dim=1).float().to(device)


def memory_context(qkv: Tensor, recent: Tensor, ring_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    recent, ring_v = all_dense(recent, ring_v)
    qkv, stride = rows_of(qkv)
    batch, window, heads, dim = ring_v.shape
    time, n_recent = qkv.shape[1], recent.shape[1]
    q = common.empty(qkv, batch, time, heads, dim)
    k, v = (common.empty(qkv, batch, before + time, heads, dim) for before in (n_recent, window))
    cuda_library().call(
        "memory_context_forward", qkv, qkv, stride, recent, ring_v, TYPE_CODES[qkv.dtype], q, k, v, batch, time,
        heads, dim, n_recent, window,
    )  # fmt: skip
    return q, k, v


def memory_context_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor) -> Tensor:
    dq, dk, dv = all_dense(dq, dk, dv)
    qkv, stride = rows_of(qkv)
    batch, time, heads, dim = dq.shape
    dqkv = common.empty(qkv, *qkv.shape)
    cuda_library().call(
        "memory_context_backward", qkv, dq, dk, dv, qkv, stride, TYPE_CODES[qkv.dtype], dqkv, batch, time, heads, dim,
        dk.shape[1] - time, dv.shape[1] - time,
    )  # fmt: skip
    return dqkv


KERNELS = (retain, memory_attention, memory_attention_backward, memory_context, memory_context_backward)
