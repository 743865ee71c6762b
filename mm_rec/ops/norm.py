"""Norms, the gated readout and the feed-forward nonlinearity; formulas in :mod:`mm_rec.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["add_rms_norm", "readout", "relu_squared", "rms_norm"]

_OUT_DTYPES = (torch.float32, torch.bfloat16)

_rms_norm = define("rms_norm(Tensor x, ScalarType out_dtype) -> Tensor", lambda args: args.x.to(args.out_dtype))
_rms_norm_backward = define("rms_norm_backward(Tensor dy, Tensor x) -> Tensor", lambda args: args.x)
_add_rms_norm = define("add_rms_norm(Tensor x, Tensor delta) -> (Tensor, Tensor)", lambda args: (args.x, args.delta))
_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor? dtotal, Tensor dn, Tensor total) -> (Tensor, Tensor)",  # dx, ddelta
    lambda args: (args.total, args.dn),
)
_readout = define("readout(Tensor h, Tensor r, int heads) -> Tensor", lambda args: args.r)
_readout_backward = define(
    "readout_backward(Tensor dy, Tensor h, Tensor r, int heads) -> (Tensor, Tensor)",  # dh, dr
    lambda args: (args.h, args.r),
)
_relu_squared = define("relu_squared(Tensor x) -> Tensor", lambda args: args.x)
_relu_squared_backward = define("relu_squared_backward(Tensor dy, Tensor x) -> Tensor", lambda args: args.x)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        with below_autograd():
            y: Tensor = _rms_norm(x, out_dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _rms_norm_backward(dy, *ctx.saved_tensors), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        with below_autograd():
            total, normed = _add_rms_norm(x, delta)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total)
        ctx.delta_dtype = delta.dtype
        return total, normed

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        if dn is None:
            return dtotal, None if dtotal is None else dtotal.to(ctx.delta_dtype)
        dx, ddelta = _add_rms_norm_backward(dtotal, dn, *ctx.saved_tensors)
        return dx, ddelta


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, r: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(h, r)
        ctx.heads = heads
        with below_autograd():
            y: Tensor = _readout(h, r, heads)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dh, dr = _readout_backward(dy, *ctx.saved_tensors, ctx.heads)
        return dh, dr, None


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with below_autograd():
            y: Tensor = _relu_squared(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dx: Tensor = _relu_squared_backward(dy, *ctx.saved_tensors)
        return dx


differentiable(_rms_norm, _RmsNorm)
differentiable(_add_rms_norm, _AddRmsNorm)
differentiable(_readout, _Readout)
differentiable(_relu_squared, _ReluSquared)


def rms_norm(x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Root-mean-square norm over the last axis, see :func:`mm_rec.ops.reference.rms_norm`.

    Args:
        x: (..., n).
        out_dtype: type of the result; that of ``x`` if None.

    Raises:
        TypeError, ValueError: ``x`` is not floating-point, or empty.
    """
    check_float("x", x, 0)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in _OUT_DTYPES or not runs_native("rms_norm", x):
        return reference.rms_norm(x, out_dtype)
    y: Tensor = _rms_norm(x, out_dtype)
    return y


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Residual step and the norm that follows it, see :func:`mm_rec.ops.reference.add_rms_norm`.

    Args:
        x: (..., D), the residual stream, float32.
        delta: (..., D), a block's contribution in the activation type.

    Returns:
        The sum in the type of ``x``, and its norm in the type of ``delta``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("x", x, 0)
    check_shape("delta", delta, x.shape, x)
    if x.dtype != torch.float32 or not runs_native("add_rms_norm", x, delta):
        return reference.add_rms_norm(x, delta)
    result: tuple[Tensor, Tensor] = _add_rms_norm(x, delta)
    return result


def readout(h: Tensor, r: Tensor, heads: int) -> Tensor:
    """Gated readout of the recurrent state, see :func:`mm_rec.ops.reference.readout`.

    Args:
        h: (B, T, D), float32.
        r: (B, T, D), in the activation type.
        heads: H, divides D.

    Returns:
        (B, T, D) in the type of ``r``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("h", h, 3)
    check_shape("r", r, h.shape, h)
    if heads < 1 or h.shape[2] % heads:
        raise ValueError(f"heads must divide the width {h.shape[2]}, got {heads}")
    if not runs_native("readout", h, r):
        return reference.readout(h, r, heads)
    y: Tensor = _readout(h.float(), r, heads)
    return y


def relu_squared(x: Tensor) -> Tensor:
    """Returns relu(x)^2, the feed-forward nonlinearity, for any shape and in the type of ``x``.

    Raises:
        TypeError, ValueError: ``x`` is not floating-point, or empty.
    """
    check_float("x", x, 0)
    if not runs_native("relu_squared", x):
        return reference.relu_squared(x)
    y: Tensor = _relu_squared(x)
    return y
