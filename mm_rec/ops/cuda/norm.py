"""Norms, the gated readout and the feed-forward nonlinearity."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, dense, empty_like, matrix_of, nested_rows, rows_of
from mm_rec.ops.cuda.load_library import cuda_library

__all__ = ["KERNELS", "readout"]


def rms_norm(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    x, *layout = nested_rows(x)
    y = common.empty(x, *x.shape, dtype=out_dtype)
    cuda_library().call("rms_norm_forward", x, x, TYPE_CODES[x.dtype], *layout, y, TYPE_CODES[out_dtype], *matrix_of(x))
    return y


def rms_norm_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy = dense(dy)
    x, *layout = nested_rows(x)
    dx: Tensor = empty_like(x)
    cuda_library().call(
        "rms_norm_backward", x, dy, TYPE_CODES[dy.dtype], x, TYPE_CODES[x.dtype], *layout, dx, *matrix_of(x)
    )
    return dx


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    x, delta = all_dense(x, delta)
    total, normed = empty_like(x), empty_like(delta)
    cuda_library().call(
        "add_rms_norm_forward", x, x, TYPE_CODES[x.dtype], delta, TYPE_CODES[delta.dtype], total, normed, *matrix_of(x)
    )
    return total, normed


def add_rms_norm_backward(dtotal: Tensor | None, dn: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    dtotal, dn, total = all_dense(dtotal, dn, total)
    dx, ddelta = empty_like(total), empty_like(dn)
    cuda_library().call(
        "add_rms_norm_backward", total, dtotal, dn, TYPE_CODES[dn.dtype], total, TYPE_CODES[total.dtype], dx, ddelta,
        *matrix_of(total),
    )  # fmt: skip
    return dx, ddelta


def readout(h: Tensor, r: Tensor, heads: int) -> Tensor:
    """Returns the normed and gated state; :func:`mm_rec.ops.readout` documents the shapes."""
    h = dense(h)
    r, stride = rows_of(r)
    y: Tensor = empty_like(r)
    tokens, width = matrix_of(h)
    cuda_library().call("readout_forward", h, h, r, TYPE_CODES[r.dtype], stride, y, tokens, heads, width // heads)
    return y


def readout_backward(dy: Tensor, h: Tensor, r: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    dy, h = all_dense(dy, h)
    r, stride = rows_of(r)
    dh, dr = empty_like(h, r)
    tokens, width = matrix_of(h)
    cuda_library().call(
        "readout_backward", h, dy, h, r, TYPE_CODES[r.dtype], stride, dh, dr, width, tokens, heads, width // heads
    )
    return dh, dr


def relu_squared(x: Tensor) -> Tensor:
    x = dense(x)
    y: Tensor = empty_like(x)
    cuda_library().call("relu_squared_forward", x, x, y, TYPE_CODES[x.dtype], x.numel())
    return y


def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = all_dense(dy, x)
    dx: Tensor = empty_like(x)
    cuda_library().call("relu_squared_backward", x, dy, x, dx, TYPE_CODES[x.dtype], x.numel())
    return dx


KERNELS = (
    rms_norm, rms_norm_backward, add_rms_norm, add_rms_norm_backward, readout, readout_backward,
    relu_squared, relu_squared_backward,
)  # fmt: skip
