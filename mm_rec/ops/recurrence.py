"""The nonlinear time loop; definition in :func:`mm_rec.ops.reference.recurrence`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape, check_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["recurrence"]


def _fake_forward(
    z: Tensor, u: Tensor, gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty((z.shape[0], z.shape[2]))


def _fake_backward(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    u: Tensor,
    gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = z.new_empty((z.shape[0], z.shape[2]))
    return z.new_empty(z.shape), u.new_empty(u.shape), z.new_empty(z.shape), w_g.new_empty(w_g.shape), last


_forward = define(
    "recurrence(Tensor z, Tensor u, Tensor gamma, Tensor w_g, Tensor? h0, Tensor? reset) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    "recurrence_backward(Tensor dh, Tensor? dh_last, Tensor h, Tensor z, Tensor u, Tensor gamma, Tensor w_g, "
    "Tensor? h0, Tensor? reset) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",  # dz, du, dgamma, dw_g, dh0
    _fake_backward,
)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, u: Tensor, gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            h, h_last = _forward(z, u, gamma, w_g, h0, reset)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, z, u, gamma, w_g, h0, reset)
        return h, h_last

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dh_last: Tensor | None) -> tuple[Tensor | None, ...]:
        if dh is None and dh_last is None:
            return (None,) * 6
        h, z, u, gamma, w_g, h0, reset = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else dh
        dz, du, dgamma, dw_g, dh0 = _backward(dh, dh_last, h, z, u, gamma, w_g, h0, reset)
        return dz, du, dgamma, dw_g, None if h0 is None else dh0, None


differentiable(_forward, _Recurrence)


def recurrence(
    z: Tensor,
    u: Tensor,
    gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The core recurrence, nonlinear in its state.

    i_t = sigmoid(u_t + W_g h_{t-1});  h_t = i_t * z_t + gamma_t * h_{t-1}

    Args:
        z: (B, T, D), the candidate, already scaled by :func:`mm_rec.ops.mdi`.
        u: (B, T, D), U_g n + b_g, float32 or bfloat16.
        gamma: (B, T, D), decay.
        w_g: (H, d, d) with H * d = D; head k maps its own slice of h through w_g[k].
        h0: (B, D), the state before the first step; zeros if None.
        reset: (B, T) bool; where true, h_{t-1} counts as 0, in the gate and in the decay.

    Returns:
        h: (B, T, D) and h_last: (B, D), a copy of h[:, -1]; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("z", z, 3)
    batch, time, width = z.shape
    check_shape("u", u, (batch, time, width), z)
    check_shape("gamma", gamma, (batch, time, width), z)
    check_float("w_g", w_g, 3)
    heads, head_dim, _ = w_g.shape
    if heads * head_dim != width:
        raise ValueError(f"w_g must be (H, d, d) with H * d = {width}, got {tuple(w_g.shape)}")
    check_shape("w_g", w_g, (heads, head_dim, head_dim), z)
    if h0 is not None:
        check_shape("h0", h0, (batch, width), z)
    if reset is not None:
        check_type("reset", reset, (batch, time), torch.bool, z)
    if not runs_native("recurrence", z, u, gamma, w_g, h0):
        return reference.recurrence(z, u, gamma, w_g, h0, reset)
    h: tuple[Tensor, Tensor] = _forward(
        z.float(), u, gamma.float(), w_g.float(), None if h0 is None else h0.float(), reset
    )
    return h
