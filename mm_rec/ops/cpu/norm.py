"""Norms, the gated readout and the feed-forward nonlinearity."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, flat_rows_of, pointer, rows_of, two_level_rows_of

__all__ = ["KERNELS", "relu_squared", "relu_squared_backward_into"]


def rms_norm(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    x, inner, outer_stride, inner_stride = two_level_rows_of(x)
    y = common.empty(x.shape, out_dtype)
    n = x.shape[-1]
    common.call.rms_norm_forward(
        TYPE_CODES[x.dtype], TYPE_CODES[out_dtype], x.numel() // n, n, x.data_ptr(), inner, outer_stride,
        inner_stride, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm_backward(dy: Tensor, x: Tensor) -> Tensor:
    (dy, *dy_strides), (x, *strides) = two_level_rows_of(dy), two_level_rows_of(x)
    dx = common.empty(x.shape, x.dtype)
    n = x.shape[-1]
    common.call.rms_norm_backward(
        TYPE_CODES[x.dtype], TYPE_CODES[dy.dtype], x.numel() // n, n, dy.data_ptr(), *dy_strides, x.data_ptr(),
        *strides, dx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    (x, x_row), (delta, delta_row) = flat_rows_of(x), flat_rows_of(delta)
    total, normed = common.empty(x.shape), common.empty(x.shape, delta.dtype)
    n = x.shape[-1]
    common.call.add_rms_norm_forward(
        TYPE_CODES[delta.dtype], x.numel() // n, n, x.data_ptr(), x_row, delta.data_ptr(), delta_row,
        total.data_ptr(), normed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return total, normed


def add_rms_norm_backward(dtotal: Tensor | None, dn: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    dtotal, dtotal_row = (None, 0) if dtotal is None else flat_rows_of(dtotal)
    (dn, dn_row), total = flat_rows_of(dn), total.contiguous()
    dx, ddelta = common.empty(total.shape), common.empty(total.shape, dn.dtype)
    n = total.shape[-1]
    common.call.add_rms_norm_backward(
        TYPE_CODES[dn.dtype], total.numel() // n, n, pointer(dtotal), dtotal_row, dn.data_ptr(), dn_row,
        total.data_ptr(), dx.data_ptr(), ddelta.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, ddelta


def readout(h: Tensor, r: Tensor, heads: int) -> Tensor:
    batch, time, width = h.shape
    (h, h_row), (r, r_row) = rows_of(h), rows_of(r)
    y = common.empty(r.shape, r.dtype)
    common.call.readout_forward(
        TYPE_CODES[r.dtype], batch * time, heads, width // heads, h.data_ptr(), h_row, r.data_ptr(), r_row,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def readout_backward(dy: Tensor, h: Tensor, r: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, time, width = h.shape
    (dy, dy_row), (h, h_row), (r, r_row) = rows_of(dy), rows_of(h), rows_of(r)
    dh, dr = common.empty(h.shape), common.empty(r.shape, r.dtype)
    common.call.readout_backward(
        TYPE_CODES[r.dtype], batch * time, heads, width // heads, dy.data_ptr(), dy_row, h.data_ptr(), h_row,
        r.data_ptr(), r_row, dh.data_ptr(), dr.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dh, dr


def relu_squared(x: Tensor) -> Tensor:
    """Returns max(x, 0)^2 of the type of ``x``; :func:`mm_rec.ops.relu_squared` defines it."""
    x = x.contiguous()
    y = common.empty(x.shape, x.dtype)
    common.call.relu_squared_forward(
        TYPE_CODES[x.dtype], x.numel(), x.data_ptr(), y.data_ptr(), torch.get_num_threads()
    )
    return y


def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    return relu_squared_backward_into(dy, x, common.empty(x.shape, x.dtype))


def relu_squared_backward_into(dy: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient at x into dx, which may be dy; all contiguous."""
    common.call.relu_squared_backward(
        TYPE_CODES[x.dtype], x.numel(), dy.data_ptr(), x.data_ptr(), dx.data_ptr(), torch.get_num_threads()
    )
    return dx


KERNELS = (
    rms_norm, rms_norm_backward, add_rms_norm, add_rms_norm_backward, readout, readout_backward,
    relu_squared, relu_squared_backward,
)  # fmt: skip
