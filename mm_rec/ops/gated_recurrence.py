"""A block's recurrence from its wide product to its readout; definition in :func:`reference.gated_recurrence`.

Where there is a fused kernel (CUDA), this is one op: the decays, the candidate and the state of a linear block never
go through memory, and the gradient of the wide product is written in place, part by part. Elsewhere it is the sum of
its parts, each with the back end that it has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_fused
from mm_rec.ops.checks import check_float, check_shape, check_type
from mm_rec.ops.linear import linear
from mm_rec.ops.mdi import mdi
from mm_rec.ops.norm import readout
from mm_rec.ops.recurrence import recurrence
from mm_rec.ops.registry import below_autograd, define, differentiable
from mm_rec.ops.scan import scan

__all__ = ["gated_recurrence"]

_TILE = 64  # columns that a block of the fused linear kernel takes: whole heads


def _fake_scan(
    projected: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, ...]:
    batch, time, _ = projected.shape
    width, hidden = decay_proj.shape
    y = projected.new_empty((batch, time, width))
    starts = decay_bias.new_empty((batch, -(-time // _TILE), width))
    return y, decay_bias.new_empty((batch, width)), y.clone(), projected.new_empty((batch, time, hidden)), starts


def _fake_scan_backward(
    dy: Tensor,
    dh_last: Tensor | None,
    projected: Tensor,
    decay: Tensor,
    hidden: Tensor,
    starts: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, ...]:
    like = (projected, decay_proj, decay_bias, gate_bias, starts[:, 0])
    return tuple(x.new_empty(x.shape) for x in like)


def _fake_loop(
    projected: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    batch, time, _ = projected.shape
    width, hidden = decay_proj.shape
    y = projected.new_empty((batch, time, width))
    state = decay_bias.new_empty(y.shape)
    last, activation = decay_bias.new_empty((batch, width)), projected.new_empty((batch, time, hidden))
    return y, last, y.clone(), activation, state, state.clone(), state.clone()


def _fake_loop_backward(
    dy: Tensor,
    dh_last: Tensor | None,
    projected: Tensor,
    decay: Tensor,
    hidden: Tensor,
    gamma: Tensor,
    x: Tensor,
    h: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    like = (projected, decay_proj, decay_bias, gate_bias, w_g, h[:, 0])
    return tuple(x.new_empty(x.shape) for x in like)


_scan = define(
    "gated_scan(Tensor projected, Tensor decay_proj, Tensor decay_bias, Tensor gate_bias, Tensor? h0, Tensor? reset, "
    "int heads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # y and h_last; for the backward pass decay logits, gelu of the decay's hidden layer, states at the starts of tiles
    _fake_scan,
    fused=True,
)
_scan_backward = define(
    "gated_scan_backward(Tensor dy, Tensor? dh_last, Tensor projected, Tensor decay, Tensor hidden, Tensor starts, "
    "Tensor decay_proj, Tensor decay_bias, Tensor gate_bias, Tensor? reset, int heads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",  # dprojected, ddecay_proj, ddecay_bias, dgate_bias, dh0
    _fake_scan_backward,
    fused=True,
)
_loop = define(
    "gated_loop(Tensor projected, Tensor decay_proj, Tensor decay_bias, Tensor gate_bias, Tensor w_g, Tensor? h0, "
    "Tensor? reset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # y and h_last; for the backward pass decay logits, gelu of the decay's hidden layer, gamma, scaled candidate, h
    _fake_loop,
    fused=True,
)
_loop_backward = define(
    "gated_loop_backward(Tensor dy, Tensor? dh_last, Tensor projected, Tensor decay, Tensor hidden, Tensor gamma, "
    "Tensor x, Tensor h, Tensor decay_proj, Tensor decay_bias, Tensor gate_bias, Tensor w_g, Tensor? h0, "
    "Tensor? reset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_loop_backward,  # dprojected, ddecay_proj, ddecay_bias, dgate_bias, dw_g, dh0
    fused=True,
)


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        decay_proj: Tensor,
        decay_bias: Tensor,
        gate_bias: Tensor,
        h0: Tensor | None,
        reset: Tensor | None,
        heads: int,
    ) -> tuple[Tensor, ...]:
        with below_autograd():
            results: tuple[Tensor, ...] = _scan(projected, decay_proj, decay_bias, gate_bias, h0, reset, heads)
        ctx.mark_non_differentiable(*results[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projected, *results[2:], decay_proj, decay_bias, gate_bias, reset)
        ctx.heads, ctx.has_state = heads, h0 is not None
        return results

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None and dh_last is None:
            return (None,) * 7
        dy = torch.zeros_like(ctx.saved_tensors[1]) if dy is None else dy
        *gradients, dh0 = _scan_backward(dy, dh_last, *ctx.saved_tensors, ctx.heads)
        return *gradients, dh0 if ctx.has_state else None, None, None


class _GatedLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        decay_proj: Tensor,
        decay_bias: Tensor,
        gate_bias: Tensor,
        w_g: Tensor,
        h0: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with below_autograd():
            results: tuple[Tensor, ...] = _loop(projected, decay_proj, decay_bias, gate_bias, w_g, h0, reset)
        ctx.mark_non_differentiable(*results[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projected, *results[2:], decay_proj, decay_bias, gate_bias, w_g, h0, reset)
        return results

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None and dh_last is None:
            return (None,) * 7
        dy = torch.zeros_like(ctx.saved_tensors[1]) if dy is None else dy
        *gradients, dh0 = _loop_backward(dy, dh_last, *ctx.saved_tensors)
        return *gradients, None if ctx.saved_tensors[-2] is None else dh0, None


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

    With z, r, u and hidden the parts of ``projected``, and gamma = clamp(sigmoid(gelu(hidden) decay_proj^T +
    decay_bias)): without ``w_g`` the state is linear, h_t = gamma_t h_{t-1} + sqrt(1 - gamma_t^2) z_t sigmoid(u_t +
    gate_bias), else :func:`mm_rec.ops.recurrence` runs. The result is rms_norm(h) per head times silu(r).

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
    width, hidden = decay_proj.shape
    if columns != 3 * width + hidden:
        raise ValueError(f"projected must have 3 D + K = {3 * width + hidden} columns, got {columns}")
    check_shape("decay_proj", decay_proj, (width, hidden), projected)
    check_shape("decay_bias", decay_bias, (width,), projected)
    check_shape("gate_bias", gate_bias, (width,), projected)
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}")
    if w_g is not None:
        check_shape("w_g", w_g, (heads, width // heads, width // heads), projected)
    if h0 is not None:
        check_shape("h0", h0, (batch, width), projected)
    if reset is not None:
        check_type("reset", reset, (batch, time), torch.bool, projected)

    biases = decay_bias.float(), gate_bias.float()
    state = None if h0 is None else h0.float()
    fusible = projected.dtype == decay_proj.dtype and width % 8 == 0 and hidden % 8 == 0  # parts begin at 16 bytes
    if w_g is not None and fusible and runs_fused("gated_loop", projected, decay_bias, gate_bias, w_g, h0):
        y, h_last, *_ = _loop(projected, decay_proj, *biases, w_g.float(), state, reset)
        return y, h_last
    fusible = fusible and width % _TILE == 0 and width // heads in (2, 4, 8, 16, 32, 64)
    if w_g is None and fusible and runs_fused("gated_scan", projected, decay_bias, gate_bias, h0):
        y, h_last, *_ = _scan(projected, decay_proj, *biases, state, reset, heads)
        return y, h_last
    return _in_parts(projected, decay_proj, decay_bias, gate_bias, heads, w_g, h0, reset)


def _in_parts(
    projected: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    heads: int,
    w_g: Tensor | None,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same by the other ops."""
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
