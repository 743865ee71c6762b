"""Writing and reading the memories."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, head_rows_of
from mm_rec.ops.reference import memory_versions, rotary_angles

__all__ = ["KERNELS"]


@functools.lru_cache(maxsize=16)
def _rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (length, d / 2) each, as in :func:`mm_rec.ops.reference.rotate`."""
    angle = rotary_angles(torch.arange(length), head_dim, base)
    return angle.cos().float(), angle.sin().float()


def memory_update(
    k: Tensor,
    v: Tensor,
    address: Tensor,
    rate: Tensor,
    position: Tensor,
    key0: Tensor,
    value0: Tensor,
    mass0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time = position.shape
    window, (heads, slots, head_dim) = k.shape[1] - time, address.shape
    (k, k_row), (v, v_row) = head_rows_of(k), head_rows_of(v)
    address, rate, position = address.contiguous(), rate.contiguous(), position.contiguous()
    key0, value0, mass0 = key0.contiguous(), value0.contiguous(), mass0.contiguous()
    versions = memory_versions(time, window)
    key, value = (common.empty((batch, versions, heads, slots, head_dim)) for _ in range(2))
    mass = common.empty((batch, versions, heads, slots))
    result = common.call.memory_update(
        TYPE_CODES[k.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), k.data_ptr(), k_row,
        v.data_ptr(), v_row, address.data_ptr(), rate.data_ptr(), key0.data_ptr(), value0.data_ptr(), mass0.data_ptr(),
        key.data_ptr(), value.data_ptr(), mass.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return key, value, mass


def memory_update_backward(
    dkey: Tensor,
    dvalue: Tensor,
    dmass: Tensor,
    key: Tensor,
    value: Tensor,
    mass: Tensor,
    k: Tensor,
    v: Tensor,
    address: Tensor,
    rate: Tensor,
    position: Tensor,
) -> tuple[Tensor, ...]:
    batch, time = position.shape
    window, (heads, slots, head_dim) = k.shape[1] - time, address.shape
    (k, k_row), (v, v_row) = head_rows_of(k), head_rows_of(v)
    address, rate, position = address.contiguous(), rate.contiguous(), position.contiguous()
    key, value, mass = key.contiguous(), value.contiguous(), mass.contiguous()
    dkey, dvalue, dmass = dkey.contiguous(), dvalue.contiguous(), dmass.contiguous()
    dk, dv = common.empty(k.shape, k.dtype), common.empty(v.shape, v.dtype)
    daddress, drate = common.empty((batch, *address.shape)), common.empty((batch, heads))  # a share per sequence
    dkey0, dvalue0 = (common.empty((batch, heads, slots, head_dim)) for _ in range(2))
    dmass0 = common.empty((batch, heads, slots))
    result = common.call.memory_update_backward(
        TYPE_CODES[k.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), k.data_ptr(), k_row,
        v.data_ptr(), v_row, address.data_ptr(), rate.data_ptr(), key.data_ptr(), value.data_ptr(), mass.data_ptr(),
        dkey.data_ptr(), dvalue.data_ptr(), dmass.data_ptr(), dk.data_ptr(), dv.data_ptr(), daddress.data_ptr(),
        drate.data_ptr(), dkey0.data_ptr(), dvalue0.data_ptr(), dmass0.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return dk, dv, daddress.sum(0), drate.sum(0), dkey0, dvalue0, dmass0


def memory_read(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, mass: Tensor, position: Tensor, rotary_base: float
) -> tuple[Tensor, Tensor]:
    batch, time, heads, head_dim = q.shape
    window, slots = k.shape[1] - time, key.shape[3]
    (q, q_row), (k, k_row), (v, v_row) = head_rows_of(q), head_rows_of(k), head_rows_of(v)
    key, value, mass, position = key.contiguous(), value.contiguous(), mass.contiguous(), position.contiguous()
    cosine, sine = _rotary_tables(window + time, head_dim, rotary_base)
    out, lse = common.empty(q.shape, q.dtype), common.empty((batch, heads, time))
    result = common.call.memory_read(
        TYPE_CODES[q.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), q.data_ptr(), q_row,
        k.data_ptr(), k_row, v.data_ptr(), v_row, key.data_ptr(), value.data_ptr(), mass.data_ptr(),
        cosine.data_ptr(), sine.data_ptr(), out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return out, lse


def memory_read_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    mass: Tensor,
    position: Tensor,
    rotary_base: float,
) -> tuple[Tensor, ...]:
    batch, time, heads, head_dim = q.shape
    window, slots = k.shape[1] - time, key.shape[3]
    (q, q_row), (k, k_row), (v, v_row), (dout, dout_row) = (
        head_rows_of(q),
        head_rows_of(k),
        head_rows_of(v),
        head_rows_of(dout),
    )
    key, value, mass, position = key.contiguous(), value.contiguous(), mass.contiguous(), position.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    cosine, sine = _rotary_tables(window + time, head_dim, rotary_base)
    dq, dk, dv = (common.empty(x.shape, x.dtype) for x in (q, k, v))
    dkey, dvalue, dmass = (common.empty(x.shape) for x in (key, value, mass))
    result = common.call.memory_read_backward(
        TYPE_CODES[q.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), q.data_ptr(), q_row,
        k.data_ptr(), k_row, v.data_ptr(), v_row, key.data_ptr(), value.data_ptr(), mass.data_ptr(),
        cosine.data_ptr(), sine.data_ptr(), dout.data_ptr(), dout_row, out.data_ptr(), lse.data_ptr(), dq.data_ptr(),
        dk.data_ptr(), dv.data_ptr(), dkey.data_ptr(), dvalue.data_ptr(), dmass.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return dq, dk, dv, dkey, dvalue, dmass


KERNELS = (memory_update, memory_update_backward, memory_read, memory_read_backward)
