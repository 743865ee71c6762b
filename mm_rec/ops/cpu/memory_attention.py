"""Attention over the window and the kept pairs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, head_rows_of
from mm_rec.ops.reference import rotary_angles

__all__ = ["KERNELS"]


@functools.lru_cache(maxsize=16)
def _rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (length, d / 2) each, as in :func:`mm_rec.ops.reference.rotate`."""
    angle = rotary_angles(torch.arange(length), head_dim, base)
    return angle.cos().float(), angle.sin().float()


def window_attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor, rotary_base: float) -> tuple[Tensor, Tensor]:
    batch, time, heads, head_dim = q.shape
    window = k.shape[1] - time
    (q, q_rows), (k, k_rows), (v, v_rows), position = (
        head_rows_of(q),
        head_rows_of(k),
        head_rows_of(v),
        position.contiguous(),
    )
    cosine, sine = _rotary_tables(window + time, head_dim, rotary_base)
    out, lse = common.empty(q.shape, q.dtype), common.empty((batch, heads, time))
    result = common.call.window_attention(
        TYPE_CODES[q.dtype], batch, time, window, heads, head_dim, position.data_ptr(), *q_rows, *k_rows, *v_rows,
        cosine.data_ptr(), sine.data_ptr(), out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return out, lse


def window_attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    rotary_base: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, heads, head_dim = q.shape
    window = k.shape[1] - time
    (q, q_rows), (k, k_rows), (v, v_rows), (dout, dout_rows) = (
        head_rows_of(q),
        head_rows_of(k),
        head_rows_of(v),
        head_rows_of(dout),
    )
    position, out, lse = position.contiguous(), out.contiguous(), lse.contiguous()
    cosine, sine = _rotary_tables(window + time, head_dim, rotary_base)
    dq, dk, dv = (common.empty(x.shape, x.dtype) for x in (q, k, v))
    result = common.call.window_attention_backward(
        TYPE_CODES[q.dtype], batch, time, window, heads, head_dim, position.data_ptr(), *q_rows, *k_rows, *v_rows,
        cosine.data_ptr(), sine.data_ptr(), *dout_rows, out.data_ptr(), lse.data_ptr(), dq.data_ptr(), dk.data_ptr(),
        dv.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return dq, dk, dv


KERNELS = (window_attention, window_attention_backward)
