"""The long-term memory: keys, and the gated delta rule."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, contiguous, head_rows_of, pointer
from mm_rec.ops.delta_rule import CHUNK

__all__ = ["KERNELS"]


def delta_keys(k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    (batch, time), (heads, head_dim, reach) = position.shape, taps.shape
    (k, k_rows), taps, position = head_rows_of(k), taps.transpose(1, 2).contiguous(), position.contiguous()
    key = common.empty((batch, time, heads, head_dim), k.dtype)
    result = common.call.delta_keys(
        TYPE_CODES[k.dtype], batch, time, k.shape[1] - time, heads, head_dim, reach, position.data_ptr(), *k_rows,
        taps.data_ptr(), key.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return key


def delta_keys_backward(dkey: Tensor, k: Tensor, taps: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    (batch, time), (heads, head_dim, reach) = position.shape, taps.shape
    (dkey, dkey_rows), (k, k_rows) = head_rows_of(dkey), head_rows_of(k)
    taps, position = taps.transpose(1, 2).contiguous(), position.contiguous()
    dk, dtaps = common.empty(k.shape, k.dtype), common.empty((batch, *taps.shape))  # a share per sequence
    result = common.call.delta_keys_backward(
        TYPE_CODES[k.dtype], batch, time, k.shape[1] - time, heads, head_dim, reach, position.data_ptr(), *k_rows,
        taps.data_ptr(), *dkey_rows, dk.data_ptr(), dtaps.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return dk, dtaps.sum(0).transpose(1, 2).contiguous()


def delta_rule(
    q: Tensor, key: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, position: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    batch, time, heads, head_dim = q.shape
    (q, q_rows), (key, key_rows), (v, v_rows) = head_rows_of(q), head_rows_of(key), head_rows_of(v)
    beta, log_decay, position = beta.contiguous(), log_decay.contiguous(), position.contiguous()
    state = state.contiguous()
    out = common.empty(q.shape, q.dtype)
    states = common.empty((batch, -(-time // CHUNK) + 1, heads, head_dim, head_dim))
    result = common.call.delta_rule(
        TYPE_CODES[q.dtype], batch, time, heads, head_dim, CHUNK, position.data_ptr(), *q_rows, *key_rows, *v_rows,
        beta.data_ptr(), log_decay.data_ptr(), state.data_ptr(), out.data_ptr(), states.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return out, states


def delta_rule_backward(
    dout: Tensor | None,
    dlast: Tensor | None,
    states: Tensor,
    q: Tensor,
    key: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    position: Tensor,
) -> tuple[Tensor, ...]:
    batch, time, heads, head_dim = q.shape
    (q, q_rows), (key, key_rows), (v, v_rows) = head_rows_of(q), head_rows_of(key), head_rows_of(v)
    beta, log_decay, position = beta.contiguous(), log_decay.contiguous(), position.contiguous()
    states, dlast = states.contiguous(), contiguous(dlast)
    dout_rows: tuple[int | None, int, int] = (None, 0, 0)
    if dout is not None:
        dout, dout_rows = head_rows_of(dout)
    dq, dkey, dv = (common.empty(q.shape, q.dtype) for _ in range(3))
    dbeta, dlog_decay = common.empty(beta.shape), common.empty(beta.shape)
    dstate = common.empty((batch, heads, head_dim, head_dim))
    result = common.call.delta_rule_backward(
        TYPE_CODES[q.dtype], batch, time, heads, head_dim, CHUNK, position.data_ptr(), *q_rows, *key_rows, *v_rows,
        beta.data_ptr(), log_decay.data_ptr(), *dout_rows, pointer(dlast), states.data_ptr(), dq.data_ptr(),
        dkey.data_ptr(), dv.data_ptr(), dbeta.data_ptr(), dlog_decay.data_ptr(), dstate.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return dq, dkey, dv, dbeta, dlog_decay, dstate


KERNELS = (delta_keys, delta_keys_backward, delta_rule, delta_rule_backward)
