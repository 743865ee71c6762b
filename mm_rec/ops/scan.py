"""The linear time loop; its formula is that of :func:`mm_rec.ops.reference.scan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape, check_start
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["scan"]

_forward = define("scan(Tensor a, Tensor x, Tensor? s0, Tensor? reset) -> Tensor", lambda args: args.x)
_backward = define(
    "scan_backward(Tensor ds, Tensor s, Tensor a, Tensor? s0, Tensor? reset) -> (Tensor, Tensor, Tensor)",
    lambda args: (args.a, args.a, args.a[:, 0]),  # da, dx, ds0
)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        with below_autograd():
            s: Tensor = _forward(*inputs)
        a, _, s0, reset = inputs
        ctx.save_for_backward(s, a, s0, reset)
        return s

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        s, a, s0, reset = ctx.saved_tensors
        da, dx, ds0 = _backward(ds, s, a, s0, reset)
        return da, dx, None if s0 is None else ds0, None


differentiable(_forward, _Scan)


def scan(a: Tensor, x: Tensor, s0: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """Linear recurrence over time, see :func:`mm_rec.ops.reference.scan`.

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
    shape = a.shape
    check_shape("x", x, shape, a)
    check_start("s0", s0, reset, shape, a)
    if not runs_native("scan", a, x, s0):
        return reference.scan(a, x, s0, reset)
    s: Tensor = _forward(a.float(), x.float(), None if s0 is None else s0.float(), reset)
    return s
