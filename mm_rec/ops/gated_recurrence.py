"""A block's recurrence from its wide product to its readout; defined by :func:`reference.gated_recurrence`.

Where there is a fused kernel (CUDA), this is one op: the decays, the candidate and the state of a linear block never
go through memory, and the gradient of the wide product is written in place, part by part. Elsewhere the other ops
compute it in parts, each with the back end that it has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_fused
from mm_rec.ops.checks import check_float, check_shape, check_start
from mm_rec.ops.linear import linear
from mm_rec.ops.mdi import mdi
from mm_rec.ops.norm import readout
from mm_rec.ops.recurrence import recurrence
from mm_rec.ops.registry import below_autograd, define, differentiable
from mm_rec.ops.scan import scan

__all__ = ["gated_recurrence"]

_TILE = 64  # columns, and steps of time, that a block of threads of the fused linear kernel takes: whole heads
_HIDDEN = "Tensor projected, Tensor decay, Tensor hidden"  # the wide product, decay logits, gelu of its hidden layer
_DECAY = "Tensor decay_proj, Tensor decay_bias, Tensor gate_bias"


def _like_results(args: Any) -> tuple[Tensor, ...]:
    """Tensors like y and h_last; for the gradient like the decay logits and gelu(hidden)."""
    z, _, _, hidden = reference.split_projected(args.projected, args.decay_proj)
    return z, z[:, 0].float(), z, hidden


def _like_scan(args: Any) -> tuple[Tensor, ...]:
    """Tensors like the results of gated_scan: the last holds the states at the starts of tiles."""
    y, *others = _like_results(args)
    return y, *others, y[:, ::_TILE].float()


def _like_loop(args: Any) -> tuple[Tensor, ...]:
    """Tensors like the results of gated_loop: the last three are gamma, the scaled candidate and h."""
    y, *others = _like_results(args)
    return y, *others, *(y.float() for _ in range(3))


_scan = define(
    f"gated_scan(Tensor projected, {_DECAY}, Tensor? h0, Tensor? reset, int heads)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _like_scan,
    fused=True,
)
_scan_backward = define(
    f"gated_scan_backward(Tensor dy, Tensor? dh_last, {_HIDDEN}, Tensor starts, {_DECAY}, Tensor? reset, int heads)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",  # dprojected, ddecay_proj, ddecay_bias, dgate_bias, dh0
    lambda args: (args.projected, args.decay_proj, args.decay_bias, args.gate_bias, args.starts[:, 0]),
    fused=True,
)
_loop = define(
    f"gated_loop(Tensor projected, {_DECAY}, Tensor w_g, Tensor? h0, Tensor? reset)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _like_loop,
    fused=True,
)
_loop_backward = define(
    f"gated_loop_backward(Tensor dy, Tensor? dh_last, {_HIDDEN}, Tensor gamma, Tensor x, Tensor h, {_DECAY}, "
    "Tensor w_g, Tensor? h0, Tensor? reset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # dprojected, ddecay_proj, ddecay_bias, dgate_bias, dw_g, dh0
    lambda args: (args.projected, args.decay_proj, args.decay_bias, args.gate_bias, args.w_g, args.h[:, 0]),
    fused=True,
)


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            results: tuple[Tensor, ...] = _scan(*inputs)
        ctx.mark_non_differentiable(*results[2:])
        ctx.set_materialize_grads(False)
        projected, decay_proj, decay_bias, gate_bias, h0, reset, heads = inputs
        ctx.save_for_backward(projected, *results[2:], decay_proj, decay_bias, gate_bias, reset)
        ctx.heads, ctx.has_state = heads, h0 is not None
        return results

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None and dh_last is None:
            return (None,) * 7
        saved = ctx.saved_tensors  # once: gradient checkpointing gives them out a single time
        dy = torch.zeros_like(saved[1]) if dy is None else dy
        *gradients, dh0 = _scan_backward(dy, dh_last, *saved, ctx.heads)
        return *gradients, dh0 if ctx.has_state else None, None, None


class _GatedLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            results: tuple[Tensor, ...] = _loop(*inputs)
        ctx.mark_non_differentiable(*results[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *results[2:], *inputs[1:])
        return results

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None and dh_last is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        dy = torch.zeros_like(saved[1]) if dy is None else dy
        *gradients, dh0 = _loop_backward(dy, dh_last, *saved)
        return *gradients, None if saved[-2] is None else dh0, None


differentiable(_scan, _GatedScan)
differentiable(_loop, _GatedLoop)


def gated_recurrence(
    projected: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    heads: int,
    w_g: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A block's recurrence: decays, candidate, the time loop and the gated readout.

    Defined by :func:`mm_rec.ops.reference.gated_recurrence`.

    Args:
        projected: (B, T, 3 D + K), the products z, r, u of D columns each, and the decay's hidden layer of K.
        decay_proj: (D, K), in the type of ``projected``.
        decay_bias, gate_bias: (D,).
        heads: H, divides D.
        w_g: (H, d, d), or None for a state that is not fed back.
        h0: (B, D), the state before the first step; zeros if None.
        reset: (B, T) bool; where true, the state before the step counts as 0.

    Returns:
        y (B, T, D) in the type of ``projected``, and h_last (B, D), the state after the last step, float32 (float64
        for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("projected", projected, 3)
    check_float("decay_proj", decay_proj, 2)
    batch, time, columns = projected.shape
    width, hidden_width = decay_proj.shape
    if columns != 3 * width + hidden_width:
        raise ValueError(f"projected must have 3 D + K = {3 * width + hidden_width} columns, got {columns}")
    check_shape("decay_proj", decay_proj, (width, hidden_width), projected)
    check_shape("decay_bias", decay_bias, (width,), projected)
    check_shape("gate_bias", gate_bias, (width,), projected)
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}")
    if w_g is not None:
        check_shape("w_g", w_g, (heads, width // heads, width // heads), projected)
    check_start("h0", h0, reset, (batch, time, width), projected)

    biases = decay_bias.float(), gate_bias.float()
    state = None if h0 is None else h0.float()
    aligned = width % 8 == 0 and hidden_width % 8 == 0  # every part of a row begins at a multiple of 16 bytes
    fusible = projected.dtype == decay_proj.dtype and aligned
    if w_g is not None and fusible and runs_fused("gated_loop", projected, decay_bias, gate_bias, w_g, h0):
        y, h_last, *_ = _loop(projected, decay_proj, *biases, w_g.float(), state, reset)
        return y, h_last
    fusible = fusible and width % _TILE == 0 and width // heads in (2, 4, 8, 16, 32, 64)
    if w_g is None and fusible and runs_fused("gated_scan", projected, decay_bias, gate_bias, h0):
        y, h_last, *_ = _scan(projected, decay_proj, *biases, state, reset, heads)
        return y, h_last
    # In parts, each with the back end that it has.
    z, r, u, hidden = reference.split_projected(projected, decay_proj)
    decay = linear(F.gelu(hidden), decay_proj)
    if w_g is None:
        gamma, x = mdi(decay, decay_bias, z, u, gate_bias)
        h = scan(gamma, x, h0, reset)
        h_last = h[:, -1]
    else:
        gamma, x = mdi(decay, decay_bias, z)
        h, h_last = recurrence(x, u + gate_bias, gamma, w_g, h0, reset)
    return readout(h, r, heads), h_last
