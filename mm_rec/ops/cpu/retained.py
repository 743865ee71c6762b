"""The long-term memory: which pairs are kept, and attention over them."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, contiguous, head_rows_of, pointer

__all__ = ["KERNELS"]


def retain(score: Tensor, position: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, slots), time = kept.shape, position.shape[1]
    score, position, kept = score.contiguous(), position.contiguous(), kept.contiguous()
    slot = common.empty((batch, heads, time), torch.int32)
    source, after = common.empty(kept.shape, torch.int64), common.empty(kept.shape)
    result = common.call.retain(
        batch, time, score.shape[1] - time, heads, slots, position.data_ptr(), score.data_ptr(), kept.data_ptr(),
        slot.data_ptr(), source.data_ptr(), after.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return slot, source, after


def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    slot: Tensor,
    position: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, time, heads, head_dim = q.shape
    (q, q_rows), (k, k_rows), (v, v_rows) = head_rows_of(q), head_rows_of(k), head_rows_of(v)
    score, slot, position, kept_k, kept_v, kept_score = (
        x.contiguous() for x in (score, slot, position, kept_k, kept_v, kept_score)
    )
    out, lse = common.empty(q.shape, q.dtype), common.empty((batch, heads, time))
    result = common.call.retained_attention(
        TYPE_CODES[q.dtype], batch, time, k.shape[1] - time, heads, head_dim, kept_k.shape[2], position.data_ptr(),
        *q_rows, *k_rows, *v_rows, score.data_ptr(), slot.data_ptr(), kept_k.data_ptr(), kept_v.data_ptr(),
        kept_score.data_ptr(), out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return out, lse


def retained_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    slot: Tensor,
    position: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
) -> tuple[Tensor, ...]:
    batch, time, heads, head_dim = q.shape
    (q, q_rows), (k, k_rows), (v, v_rows) = head_rows_of(q), head_rows_of(k), head_rows_of(v)
    dout, dout_rows = head_rows_of(dout)
    score, slot, position, kept_k, kept_v, kept_score, out, lse = (
        x.contiguous() for x in (score, slot, position, kept_k, kept_v, kept_score, out, lse)
    )
    dlse = contiguous(dlse)
    inputs = (q, k, v, score, kept_k, kept_v, kept_score)
    gradients = [common.empty(x.shape, x.dtype) for x in inputs]
    result = common.call.retained_attention_backward(
        TYPE_CODES[q.dtype], batch, time, k.shape[1] - time, heads, head_dim, kept_k.shape[2], position.data_ptr(),
        *q_rows, *k_rows, *v_rows, score.data_ptr(), slot.data_ptr(), kept_k.data_ptr(), kept_v.data_ptr(),
        kept_score.data_ptr(), *dout_rows, pointer(dlse), out.data_ptr(), lse.data_ptr(),
        *(gradient.data_ptr() for gradient in gradients), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return tuple(gradients)


KERNELS = (retain, retained_attention, retained_attention_backward)
