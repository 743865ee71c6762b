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
    "memory_context(Tensor qkv, Tensor recent, Tensor ring_v) -> (Tensor, Tensor, Tensor)",
    lambda args: reference.memory_context(args.qkv, args.recent, args.ring_v),
    fused=True,
)
_context_backward = define(
    "memory_context_backward(Tensor dq, Tensor dk, Tensor dv, Tensor qkv) -> Tensor",
    lambda args: args.qkv,
    fused=True,
)


class _MemoryContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, recent: Tensor, ring_v: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            q, k, v = _context(qkv, recent, ring_v)
        ctx.save_for_backward(qkv)
        ctx.before = recent.shape[1], ring_v.shape[1]
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,) = ctx.saved_tensors
        drecent, dring_v = (
            x[:, :n] if learns else None
            for x, n, learns in zip((dk, dv), ctx.before, ctx.needs_input_grad[1:], strict=True)
        )
        return _context_backward(dq, dk, dv, qkv), drecent, dring_v


differentiable(_context, _MemoryContext)


def memory_context(qkv: Tensor, recent: Tensor, ring_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a chunk, behind those of the tokens before that are still needed.

    Args:
        qkv: (B, T, 3 D), the products q, k and v of D columns each.
        recent: (B, R, H, d) with H * d = D and R at most W, the normed keys of the last R tokens before the chunk.
        ring_v: (B, W, H, d), the values of the last W tokens.

    Returns:
        q (B, T, H, d), normed per head; k (B, R + T, H, d), the recent keys and then those of the chunk, normed;
        v (B, W + T, H, d), the ring and then the chunk.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("qkv", qkv, 3)
    check_float("ring_v", ring_v, 4)
    batch, window, heads, head_dim = ring_v.shape
    check_shape("qkv", qkv, (batch, qkv.shape[1], 3 * heads * head_dim), ring_v)
    check_shape("recent", recent, (batch, min(recent.shape[1], window), heads, head_dim), ring_v)
    one_type = qkv.dtype == recent.dtype == ring_v.dtype
    if one_type and head_dim % 8 == 0 and head_dim <= 256 and runs_fused("memory_context", qkv, recent, ring_v):
        context: tuple[Tensor, Tensor, Tensor] = _context(qkv, recent, ring_v)
        return context
    q, k, v = reference.split_qkv(qkv, heads)
    return rms_norm(q), torch.cat([recent, rms_norm(k)], dim=1), torch.cat([ring_v, v], dim=1)
