"""Keys of a memory block, made of the own keys of several tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, head_rows_of

__all__ = ["KERNELS"]


def mixed_keys(k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    (batch, time), (heads, head_dim, reach) = position.shape, taps.shape
    (k, k_rows), taps, position = head_rows_of(k), taps.transpose(1, 2).contiguous(), position.contiguous()
    key = common.empty((batch, time, heads, head_dim), k.dtype)
    result = common.call.mixed_keys(
        TYPE_CODES[k.dtype], batch, time, k.shape[1] - time, heads, head_dim, reach, position.data_ptr(), *k_rows,
        taps.data_ptr(), key.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return key


def mixed_keys_backward(dkey: Tensor, k: Tensor, taps: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    (batch, time), (heads, head_dim, reach) = position.shape, taps.shape
    (dkey, dkey_rows), (k, k_rows) = head_rows_of(dkey), head_rows_of(k)
    taps, position = taps.transpose(1, 2).contiguous(), position.contiguous()
    dk, dtaps = common.empty(k.shape, k.dtype), common.empty((batch, *taps.shape))  # a share per sequence
    result = common.call.mixed_keys_backward(
        TYPE_CODES[k.dtype], batch, time, k.shape[1] - time, heads, head_dim, reach, position.data_ptr(), *k_rows,
        taps.data_ptr(), *dkey_rows, dk.data_ptr(), dtaps.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return dk, dtaps.sum(0).transpose(1, 2).contiguous()


KERNELS = (mixed_keys, mixed_keys_backward)
