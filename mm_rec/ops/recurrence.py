"""The nonlinear time loop; its formula is that of :func:`mm_rec.ops.reference.recurrence`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape, check_start
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["recurrence"]

_INPUTS = "Tensor z, Tensor u, Tensor gamma, Tensor w_g, Tensor? h0, Tensor? reset"
_forward = define(f"recurrence({_INPUTS}) -> (Tensor, Tensor)", lambda args: (args.z, args.z[:, 0]))
_backward = define(
    f"recurrence_backward(Tensor dh, Tensor? dh_last, Tensor h, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda args: (args.z, args.u, args.gamma, args.w_g, args.z[:, 0]),  # dz, du, dgamma, dw_g, dh0
)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        with below_autograd():
            h, h_last = _forward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, *inputs)
        return h, h_last

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dh_last: Tensor | None) -> tuple[Tensor | None, ...]:
        if dh is None and dh_last is None:
            return (None,) * 6
        saved = ctx.saved_tensors
        h, h0 = saved[0], saved[5]
        dh = torch.zeros_like(h) if dh is None else dh
        dz, du, dgamma, dw_g, dh0 = _backward(dh, dh_last, *saved)
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
    """The core recurrence, nonlinear in its state, see :func:`mm_rec.ops.reference.recurrence`.

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
    shape = z.shape
    width = shape[2]
    check_shape("u", u, shape, z)
    check_shape("gamma", gamma, shape, z)
    check_float("w_g", w_g, 3)
    heads, head_dim, _ = w_g.shape
    if heads * head_dim != width:
        raise ValueError(f"w_g must be (H, d, d) with H * d = {width}, got {tuple(w_g.shape)}")
    check_shape("w_g", w_g, (heads, head_dim, head_dim), z)
    check_start("h0", h0, reset, shape, z)
    if not runs_native("recurrence", z, u, gamma, w_g, h0):
        return reference.recurrence(z, u, gamma, w_g, h0, reset)
    h: tuple[Tensor, Tensor] = _forward(
        z.float(), u, gamma.float(), w_g.float(), None if h0 is None else h0.float(), reset
    )
    return h
