"""Whole branches of a block, products and all; formulas in :mod:`mm_rec.ops.reference`.

Where a back end has them (the CPU), each is one op: one entry into autograd, and the gradients of the slices of a
product are written into the gradient of the whole product. Elsewhere a branch is computed by the ops it is made of.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec.ops.backend import runs_fused
from mm_rec.ops.checks import check_float, check_shape, check_start
from mm_rec.ops.gated_recurrence import gated_recurrence
from mm_rec.ops.norm import relu_squared
from mm_rec.ops.reference import split_projected
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["feed_forward", "linear_branch"]

_INPUTS = (
    "Tensor n, Tensor in_proj, Tensor decay_proj, Tensor decay_bias, Tensor gate_bias, Tensor out_proj, "
    "Tensor? h0, Tensor? reset, int heads"
)


def _like_linear(args: Any) -> tuple[Tensor, ...]:
    """Tensors like delta and h_last; for the gradient like the wide product, gelu(hidden), decay logits, h and y."""
    n, rows = args.n, args.n.flatten(0, 1)
    product = F.linear(rows, args.in_proj)
    *_, activated = split_projected(product, args.decay_proj)
    return n, n[:, 0].float(), product, activated, rows, n.float(), n


_linear = define(
    f"linear_branch({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _like_linear, fused=True
)
_linear_backward = define(
    "linear_branch_backward(Tensor ddelta, Tensor? dh_last, Tensor product, Tensor activated, Tensor decay_logits, "
    f"Tensor h, Tensor y, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda args: (args.n, args.in_proj, args.decay_proj, args.decay_bias, args.gate_bias, args.out_proj, args.h[:, 0]),
    fused=True,
)


def _like_feed_forward(args: Any) -> tuple[Tensor, ...]:
    """Tensors like delta; for the gradient like the hidden layer before and after its nonlinearity."""
    hidden = F.linear(args.n.flatten(0, 1), args.up)
    return args.n, hidden, hidden


_feed_forward = define(
    "feed_forward(Tensor n, Tensor up, Tensor down) -> (Tensor, Tensor, Tensor)", _like_feed_forward, fused=True
)
_feed_forward_backward = define(
    "feed_forward_backward(Tensor ddelta, Tensor hidden, Tensor squared, Tensor n, Tensor up, Tensor down) "
    "-> (Tensor, Tensor, Tensor)",
    lambda args: (args.n, args.up, args.down),
    fused=True,
)


class _LinearBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            delta, h_last, *kept = _linear(*inputs)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *inputs[:-1])
        ctx.heads = inputs[-1]
        return delta, h_last, *kept

    @staticmethod
    def backward(ctx: Any, ddelta: Tensor | None, dh_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if ddelta is None and dh_last is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        n, h0 = saved[5], saved[11]
        if ddelta is None:
            ddelta = torch.zeros_like(n)
        *gradients, dh0 = _linear_backward(ddelta, dh_last, *saved, ctx.heads)
        return *gradients, None if h0 is None else dh0, None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            delta, *kept = _feed_forward(*inputs)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *inputs)
        return delta, *kept

    @staticmethod
    def backward(ctx: Any, ddelta: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if ddelta is None:
            return (None,) * 3
        gradients: tuple[Tensor, ...] = _feed_forward_backward(ddelta, *ctx.saved_tensors)
        return gradients


differentiable(_linear, _LinearBranch)
differentiable(_feed_forward, _FeedForward)


def _is_one_op(op: str, n: Tensor, *weights: Tensor) -> bool:
    """Whether a back end has the branch as one op for these types."""
    return all(w.dtype == n.dtype for w in weights) and runs_fused(op, n)


def feed_forward(n: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The feed-forward part of a block, see :func:`mm_rec.ops.reference.feed_forward`.

    Args:
        n: (B, T, D).
        up: (F, D) and down: (D, F), in the type of ``n``.

    Returns:
        (B, T, D) in the type of ``n``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("n", n, 3)
    check_float("up", up, 2)
    check_shape("up", up, (up.shape[0], n.shape[2]), n)
    check_shape("down", down, (n.shape[2], up.shape[0]), n)
    if not _is_one_op("feed_forward", n, up, down):
        return F.linear(relu_squared(F.linear(n, up)), down)
    delta, _, _ = _feed_forward(n, up, down)
    return delta  # type: ignore[no-any-return]


def linear_branch(
    n: Tensor,
    in_proj: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    out_proj: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """The recurrent part of a block that is linear in its state, see :func:`mm_rec.ops.reference.linear_branch`.

    Args:
        n: (B, T, D).
        in_proj: (3 D + K, D), rows for z, r, u and the hidden layer of width K, in the type of ``n``.
        decay_proj: (D, K), in the type of ``n``.
        decay_bias, gate_bias: (D,), float32.
        out_proj: (D, D), in the type of ``n``.
        h0: (B, D), the state before the first step; zeros if None.
        reset: (B, T) bool; where true, the state before counts as 0. None means nowhere.
        heads: H, divides D.

    Returns:
        (B, T, D) in the type of ``n``, and the last state (B, D), float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("n", n, 3)
    width = n.shape[2]
    check_float("decay_proj", decay_proj, 2)
    hidden_width = decay_proj.shape[1]
    check_shape("decay_proj", decay_proj, (width, hidden_width), n)
    check_shape("in_proj", in_proj, (3 * width + hidden_width, width), n)
    check_shape("decay_bias", decay_bias, (width,), n)
    check_shape("gate_bias", gate_bias, (width,), n)
    check_shape("out_proj", out_proj, (width, width), n)
    check_start("h0", h0, reset, n.shape, n)
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}")
    if _is_one_op("linear_branch", n, in_proj, decay_proj, out_proj):
        biases = decay_bias.float().contiguous(), gate_bias.float().contiguous()
        h0 = None if h0 is None else h0.float().contiguous()
        reset = None if reset is None else reset.contiguous()
        delta, h_last, *_ = _linear(n, in_proj, decay_proj, *biases, out_proj, h0, reset, heads)
        return delta, h_last
    projected = F.linear(n, in_proj)
    y, h_last = gated_recurrence(projected, decay_proj, decay_bias, gate_bias, heads, None, h0, reset)
    return F.linear(y, out_proj), h_last
