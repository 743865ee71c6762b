"""The linear time loop; definition in :func:`mm_rec.ops.reference.scan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape, check_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["scan"]


def _fake_forward(a: Tensor, x: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    ds: Tensor, s: Tensor, a: Tensor, s0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty((a.shape[0], a.shape[2]))


_forward = define("scan(Tensor a, Tensor x, Tensor? s0, Tensor? reset) -> Tensor", _fake_forward)
_backward = define(
    "scan_backward(Tensor ds, Tensor s, Tensor a, Tensor? s0, Tensor? reset) -> (Tensor, Tensor, Tensor)",
    _fake_backward,  # da, dx, ds0
)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
        with below_autograd():
            s: Tensor = _forward(a, x, s0, reset)
        ctx.save_for_backward(s, a, s0, reset)
        return s

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        s, a, s0, reset = ctx.saved_tensors
        da, dx, ds0 = _backward(ds, s, a, s0, reset)
        return da, dx, None if s0 is None else ds0, None


differentiable(_forward, _Scan)


def scan(a: Tensor, x: Tensor, s0: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """Linear recurrence s_t = a_t * s_{t-1} + x_t, elementwise.

    Cumulative products are the case x = 0, s0 = 1.

    Args:
        a, x: (B, T, D).
        s0: (B, D), the state before the first step; zeros if None.
        reset: (B, T) bool; where true, a counts as 0. None means nowhere.

    Returns:
        s: (B, T, D), float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("a", a, 3)
    batch, time, width = a.shape
    check_shape("x", x, (batch, time, width), a)
    if s0 is not None:
        check_shape("s0", s0, (batch, width), a)
    if reset is not None:
        check_type("reset", reset, (batch, time), torch.bool, a)
    if not runs_native("scan", a, x, s0):
        return reference.scan(a, x, s0, reset)
    s: Tensor = _forward(a.float(), x.float(), None if s0 is None else s0.float(), reset)
    return s
