"""Splits one wide product into what attention reads; defined by :func:`mm_rec.ops.reference.memory_context`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_fused
from mm_rec.ops.checks import check_float, check_shape
from mm_rec.ops.norm import rms_norm
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["memory_context"]


_context = define(
    "memory_context(Tensor qkv, Tensor ring_k, Tensor ring_v) -> (Tensor, Tensor, Tensor)",
    lambda args: reference.memory_context(args.qkv, args.ring_k, args.ring_v),
    fused=True,
)
_context_backward = define(
    "memory_context_backward(Tensor dq, Tensor dk, Tensor dv, Tensor qkv) -> Tensor",
    lambda args: args.qkv,
    fused=True,
)


class _MemoryContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, ring_k: Tensor, ring_v: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            q, k, v = _context(qkv, ring_k, ring_v)
        ctx.save_for_backward(qkv)
        ctx.window = ring_k.shape[1]
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,) = ctx.saved_tensors
        _, learns_k, learns_v = ctx.needs_input_grad
        dring_k, dring_v = (x[:, : ctx.window] if learns else None for x, learns in ((dk, learns_k), (dv, learns_v)))
        return _context_backward(dq, dk, dv, qkv), dring_k, dring_v


differentiable(_context, _MemoryContext)


def memory_context(qkv: Tensor, ring_k: Tensor, ring_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values that they may see: the last W tokens, then the chunk.

    Args:
        qkv: (B, T, 3 D), the products q, k and v of D columns each.
        ring_k, ring_v: (B, W, H, d) with H * d = D, of the tokens before, keys normed.

    Returns:
        q (B, T, H, d), normed per head; k and v (B, W + T, H, d), the ring and then the chunk, its keys normed.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("qkv", qkv, 3)
    check_float("ring_k", ring_k, 4)
    batch, window, heads, head_dim = ring_k.shape
    check_shape("qkv", qkv, (batch, qkv.shape[1], 3 * heads * head_dim), ring_k)
    check_shape("ring_v", ring_v, (batch, window, heads, head_dim), ring_k)
    one_type = qkv.dtype == ring_k.dtype == ring_v.dtype
    if one_type and head_dim % 8 == 0 and head_dim <= 256 and runs_fused("memory_context", qkv, ring_k, ring_v):
        context: tuple[Tensor, Tensor, Tensor] = _context(qkv, ring_k, ring_v)
        return context
    q, k, v = reference.split_qkv(qkv, heads)
    return rms_norm(q), torch.cat([ring_k, rms_norm(k)], dim=1), torch.cat([ring_v, v], dim=1)
