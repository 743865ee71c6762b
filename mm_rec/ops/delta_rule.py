"""Keys, and a matrix per head that the gated delta rule writes; formulas in :mod:`mm_rec.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import fits, runs_native
from mm_rec.ops.checks import check_context, check_float, check_shape, check_type, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["CHUNK", "delta_keys", "delta_rule"]

CHUNK = 64
"""Tokens between two states that the forward pass keeps for the backward pass."""

_KEYS = "Tensor k, Tensor taps, Tensor position"
_keys = define(f"delta_keys({_KEYS}) -> Tensor", lambda args: args.k[:, args.k.shape[1] - args.position.shape[1] :])
_keys_backward = define(
    f"delta_keys_backward(Tensor dkey, {_KEYS}) -> (Tensor, Tensor)",
    lambda args: (args.k, args.taps),  # their gradients
)
_INPUTS = "Tensor q, Tensor key, Tensor v, Tensor beta, Tensor log_decay, Tensor position"
_delta_rule = define(
    # The result and the states (B, ceil(T / CHUNK) + 1, H, d, d) float32: the one given, those after each CHUNK tokens,
    # and the last.
    f"delta_rule({_INPUTS}, Tensor state) -> (Tensor, Tensor)",
    lambda args: (args.q, args.state[:, None].expand(-1, -(-args.q.shape[1] // CHUNK) + 1, -1, -1, -1)),
)
_delta_rule_backward = define(
    f"delta_rule_backward(Tensor? dout, Tensor? dlast, Tensor states, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # dq, dkey, dv, dbeta, dlog_decay, dstate
    lambda args: (args.q, args.key, args.v, args.beta, args.log_decay, args.states[:, 0]),
)


class _DeltaKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(k, taps, position)
        with below_autograd():
            key: Tensor = _keys(k, taps, position)
        return key

    @staticmethod
    def backward(ctx: Any, dkey: Tensor) -> tuple[Tensor | None, ...]:
        return *_keys_backward(dkey, *ctx.saved_tensors), None


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, states = _delta_rule(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, *inputs[:-1])
        return out, states

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dstates is None:
            return (None,) * 7
        dlast = None if dstates is None else dstates[:, -1]
        dq, dkey, dv, dbeta, dlog_decay, dstate = _delta_rule_backward(dout, dlast, *ctx.saved_tensors)
        return dq, dkey, dv, dbeta, dlog_decay, None, dstate


differentiable(_keys, _DeltaKeys)
differentiable(_delta_rule, _DeltaRule)


def delta_keys(k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    """Keys of both memories, made of the own keys of a token and of those before it.

    Defined by :func:`mm_rec.ops.reference.delta_keys`.

    Args:
        k: (B, R + T, H, d): own keys of the last R tokens, oldest first, then of the chunk.
        taps: (H, d, J), the weight of the own key j tokens back, J at most R + 1.
        position: (B, T) int64, position of each token of the chunk in its document.

    Returns:
        (B, T, H, d) in the type of ``k``, each of length 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    window = check_context("k", k, position)
    check_float("taps", taps, 3)
    check_shape("taps", taps, (*k.shape[2:], taps.shape[2]), k)
    if taps.shape[2] > window + 1:
        raise ValueError(f"taps must reach back at most the window of {window} tokens, got {taps.shape[2] - 1}")
    if not runs_native("delta_keys", k, taps) or not fits("delta_keys", k, *taps.shape[1:]):
        return reference.delta_keys(k, taps, position)
    key: Tensor = _keys(k, taps.float(), position)
    return key


def delta_rule(
    q: Tensor, key: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, position: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Write T tokens to the long-term memory one after the other, and read it after each.

    Defined by :func:`mm_rec.ops.reference.delta_rule`.

    Args:
        q, key, v: (B, T, H, d), keys of length 1.
        beta: (B, T, H) in [0, 1], how far the value under a key is replaced.
        log_decay: (B, T, H), at most 0, the logarithm of what each token leaves of the memory.
        position: (B, T) int64, 0 at a document's first token, before which the memory is emptied.
        state: (B, H, d, d), the memory before the chunk: state[b, h, i, j] maps key channel i to value channel j.

    Returns:
        What is read, (B, T, H, d) in the type of ``q``, and the memory after the last token, (B, H, d, d) float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("q", q, 4)
    batch, time, heads, head_dim = q.shape
    check_shape("key", key, q.shape, q)
    check_shape("v", v, q.shape, q)
    check_shape("beta", beta, (batch, time, heads), q)
    check_shape("log_decay", log_decay, (batch, time, heads), q)
    check_type("position", position, (batch, time), torch.int64, q)
    check_shape("state", state, (batch, heads, head_dim, head_dim), q)
    if not runs_native("delta_rule", q, key, v, beta, log_decay, state) or not fits("delta_rule", q, head_dim):
        return reference.delta_rule(q, key, v, beta, log_decay, position, state)
    out_dtype = q.dtype
    out, states = _delta_rule(*one_type(q, key, v), beta.float(), log_decay.float(), position, state.float())
    return out.to(out_dtype), states[:, -1]
