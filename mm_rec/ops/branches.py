"""Whole branches of a block, products and all; definitions in :mod:`mm_rec.ops.reference`.

Where a back end has them (the CPU), each is one op: one entry into autograd, and gradients of slices of a product are
written where the product's gradient is wanted. Elsewhere they are the sum of their parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec.ops.backend import runs_fused
from mm_rec.ops.checks import check_float, check_shape, check_type
from mm_rec.ops.gated_recurrence import gated_recurrence
from mm_rec.ops.norm import relu_squared
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["feed_forward", "linear_branch"]


def _fake_linear(
    n: Tensor,
    in_proj: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    out_proj: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, ...]:
    batch, time, width = n.shape
    product, activated = (n.new_empty((batch * time, weight)) for weight in (in_proj.shape[0], decay_proj.shape[1]))
    state = n.new_empty((batch, width), dtype=torch.float32)
    h = n.new_empty(n.shape, dtype=torch.float32)
    return n.new_empty(n.shape), state, product, activated, n.new_empty((batch * time, width)), h, n.new_empty(n.shape)


def _fake_linear_backward(
    ddelta: Tensor,
    dh_last: Tensor | None,
    product: Tensor,
    activated: Tensor,
    decay_logits: Tensor,
    h: Tensor,
    y: Tensor,
    n: Tensor,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    weights = [x.new_empty(x.shape) for x in (n, *inputs[:5])]
    return *weights, h.new_empty((h.shape[0], h.shape[2]))


def _fake_feed_forward(n: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = n.new_empty((n.shape[0] * n.shape[1], up.shape[0]))
    return n.new_empty(n.shape), hidden, torch.empty_like(hidden)


def _fake_feed_forward_backward(
    ddelta: Tensor, hidden: Tensor, squared: Tensor, n: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return n.new_empty(n.shape), up.new_empty(up.shape), down.new_empty(down.shape)


_INPUTS = (
    "Tensor n, Tensor in_proj, Tensor decay_proj, Tensor decay_bias, Tensor gate_bias, Tensor out_proj, "
    "Tensor? h0, Tensor? reset, int heads"
)
_linear = define(
    f"linear_branch({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # delta, h_last, and what the gradient needs: the wide product, gelu of its hidden part, decay logits, h, readout
    _fake_linear,
    fused=True,
)
_linear_backward = define(
    "linear_branch_backward(Tensor ddelta, Tensor? dh_last, Tensor product, Tensor activated, Tensor decay_logits, "
    f"Tensor h, Tensor y, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # gradients of the inputs in order, up to h0
    _fake_linear_backward,
    fused=True,
)
_feed_forward = define(
    "feed_forward(Tensor n, Tensor up, Tensor down) -> (Tensor, Tensor, Tensor)",
    # delta, and what the gradient needs: the hidden layer before and after its nonlinearity
    _fake_feed_forward,
    fused=True,
)
_feed_forward_backward = define(
    "feed_forward_backward(Tensor ddelta, Tensor hidden, Tensor squared, Tensor n, Tensor up, Tensor down) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_feed_forward_backward,
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
    def forward(ctx: Any, n: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            delta, hidden, squared = _feed_forward(n, up, down)
        ctx.mark_non_differentiable(hidden, squared)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, squared, n, up, down)
        return delta, hidden, squared

    @staticmethod
    def backward(ctx: Any, ddelta: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if ddelta is None:
            return (None,) * 3
        gradients: tuple[Tensor, ...] = _feed_forward_backward(ddelta, *ctx.saved_tensors)
        return gradients


differentiable(_linear, _LinearBranch)
differentiable(_feed_forward, _FeedForward)


def _is_one_op(op: str, n: Tensor, *weights: Tensor) -> bool:
    return all(w.dtype == n.dtype for w in weights) and runs_fused(op, n)


def feed_forward(n: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The feed-forward part of a block: down relu(up n)^2.

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
    """The recurrent part of a block that is linear in its state.

    One product gives candidate z, readout gate r, integration gate u and the decay's hidden layer; then
    :func:`~mm_rec.ops.gated_recurrence` and the product with ``out_proj``.

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
    batch, time, width = n.shape
    check_float("decay_proj", decay_proj, 2)
    hidden_width = decay_proj.shape[1]
    check_shape("decay_proj", decay_proj, (width, hidden_width), n)
    check_shape("in_proj", in_proj, (3 * width + hidden_width, width), n)
    check_shape("decay_bias", decay_bias, (width,), n)
    check_shape("gate_bias", gate_bias, (width,), n)
    check_shape("out_proj", out_proj, (width, width), n)
    if h0 is not None:
        check_shape("h0", h0, (batch, width), n)
    if reset is not None:
        check_type("reset", reset, (batch, time), torch.bool, n)
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
