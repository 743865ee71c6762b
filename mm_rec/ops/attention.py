"""Attention over the window of recent tokens; formula in :mod:`mm_rec.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import fits, runs_native
from mm_rec.ops.checks import check_context, check_float, check_shape, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["window_attention"]

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor position, float rotary_base"
_attention = define(
    f"window_attention({_INPUTS}) -> (Tensor, Tensor)",
    # the result and, for the backward pass, the log of the softmax's denominator (B, H, T) in float32
    lambda args: (args.q, args.q[..., 0].transpose(1, 2).float()),
)
_attention_backward = define(
    f"window_attention_backward(Tensor dout, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    lambda args: (args.q, args.k, args.v),  # their gradients
)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, lse = _attention(*inputs)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *inputs[:-1])
        ctx.rotary_base = inputs[-1]
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 5
        return *_attention_backward(dout, *ctx.saved_tensors, ctx.rotary_base), None, None


differentiable(_attention, _WindowAttention)


def window_attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor, rotary_base: float = 1000.0) -> Tensor:
    """Softmax attention of each token over the last W tokens of its document.

    Defined by :func:`mm_rec.ops.reference.window_attention`. Scores are the plain products of queries and keys.

    Args:
        q: (B, T, H, d), un-rotated, d even.
        k, v: (B, W + T, H, d), un-rotated: the last W tokens, oldest first, then the chunk.
        position: (B, T) int64, position of each token of the chunk in its document.
        rotary_base: see :func:`mm_rec.ops.rotate`.

    Returns:
        (B, T, H, d) in the type of ``q``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_context("k", k, position)
    check_shape("v", v, k.shape, k)
    check_float("q", q, 4)
    check_shape("q", q, (*position.shape, *k.shape[2:]), k)
    head_dim = q.shape[3]
    if head_dim % 2:
        raise ValueError(f"q must have heads of even size, got {head_dim}")
    if not runs_native("window_attention", q, k, v) or not fits("window_attention", k, head_dim):
        return reference.window_attention(q, k, v, position, rotary_base)
    out_dtype = q.dtype
    out, _ = _attention(*one_type(q, k, v), position, rotary_base)
    return out.to(out_dtype)  # type: ignore[no-any-return]
