"""Which pairs are kept, and attention over the window and over them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, head_rows_of
from mm_rec.ops.reference import RUN, rotary_angles

__all__ = ["KERNELS"]


def retain(score: Tensor, position: Tensor, kept_score: Tensor) -> tuple[Tensor, Tensor]:
    (batch, heads, slots), time = kept_score.shape, position.shape[1]
    score, position, kept_score = score.contiguous(), position.contiguous(), kept_score.contiguous()
    slot = common.empty((batch, heads, time), torch.int32)
    held = common.empty((batch, heads, -(-time // RUN) + 1, slots), torch.int32)
    result = common.call.retain(
        batch, time, score.shape[1] - time, heads, slots, position.data_ptr(), score.data_ptr(), kept_score.data_ptr(),
        slot.data_ptr(), held.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return slot, held


def memory_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Returns what is read and the log of the softmax's denominator: of the window first, then of both."""
    with_window, with_pairs, _kept = _pointers(*inputs)
    q = inputs[0]
    batch, time, heads, _ = q.shape
    out, lse = common.empty(q.shape, q.dtype), common.empty((batch, heads, time))
    results = out.data_ptr(), lse.data_ptr(), torch.get_num_threads()
    check(common.call.window_attention(*with_window, *results))
    check(common.call.retained_attention(*with_pairs, *results))
    return out, lse


def memory_attention_backward(dout: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of q, k, v, score, kept_k, kept_v and kept_score.

    With the result and the denominator of the whole softmax, the window's kernel gives the window's part of them.
    """
    with_window, with_pairs, _kept = _pointers(*inputs)
    q, k, v, score, _, _, _, kept_k, kept_v, kept_score, _ = inputs
    (dout, dout_rows), out, lse = head_rows_of(dout), out.contiguous(), lse.contiguous()
    above = (*dout_rows, out.data_ptr(), lse.data_ptr())
    gradients = [common.empty(x.shape, x.dtype) for x in (q, k, v, score, kept_k, kept_v, kept_score)]
    places, threads = [x.data_ptr() for x in gradients], torch.get_num_threads()
    check(common.call.window_attention_backward(*with_window, *above, *places[:3], threads))
    check(common.call.retained_attention_backward(*with_pairs, *above, *places, threads))
    return tuple(gradients)


def _pointers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    slot: Tensor,
    held: Tensor,
    position: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    rotary_base: float,
) -> tuple[list[int], list[int], object]:
    """Returns the inputs of the window's kernels and of those of the pairs, and what has to live until they return."""
    batch, time, heads, head_dim = q.shape
    window, slots = k.shape[1] - time, kept_k.shape[2]
    (q, q_rows), (k, k_rows), (v, v_rows) = head_rows_of(q), head_rows_of(k), head_rows_of(v)
    position = position.contiguous()
    of_pairs = [x.contiguous() for x in (score, slot, held, kept_k, kept_v, kept_score)]
    tables = _rotary_tables(window + time, head_dim, rotary_base)
    sizes = TYPE_CODES[q.dtype], batch, time, window, heads, head_dim
    rows = position.data_ptr(), *q_rows, *k_rows, *v_rows
    with_window = [*sizes, *rows, *(table.data_ptr() for table in tables)]
    with_pairs = [*sizes, slots, *rows, *(x.data_ptr() for x in of_pairs)]
    return with_window, with_pairs, (q, k, v, position, of_pairs, tables)


@functools.lru_cache(maxsize=16)
def _rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (length, d / 2) each, as in :func:`mm_rec.ops.reference.rotate`."""
    angle = rotary_angles(torch.arange(length), head_dim, base)
    return angle.cos().float(), angle.sin().float()


KERNELS = (retain, memory_attention, memory_attention_backward)
