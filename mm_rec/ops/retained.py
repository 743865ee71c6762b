"""The long-term memory: pairs that are kept of the tokens that have left the window, and attention over them.

Formulas in :mod:`mm_rec.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_context, check_float, check_shape, check_type, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["retain", "retained_attention"]

_retain = define(
    "retain(Tensor score, Tensor position, Tensor kept) -> (Tensor, Tensor, Tensor)",
    lambda args: (
        args.position.new_empty((*args.kept.shape[:2], args.position.shape[1]), dtype=torch.int32),
        args.kept.long(),
        args.kept,
    ),
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor score, Tensor slot, Tensor position, "
    "Tensor kept_k, Tensor kept_v, Tensor kept_score"
)
_attention = define(
    f"retained_attention({_INPUTS}) -> (Tensor, Tensor)",
    lambda args: (args.q, args.q[..., 0].transpose(1, 2).float()),
)
_attention_backward = define(
    f"retained_attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # dq, dk, dv, dscore, dkept_k, dkept_v, dkept_score
    lambda args: (args.q, args.k, args.v, args.score, args.kept_k, args.kept_v, args.kept_score),
)


class _RetainedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, lse = _attention(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *inputs)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 9
        out, lse, *inputs = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dscore, *dkept = _attention_backward(dout, dlse, out, lse, *inputs)
        return dq, dk, dv, dscore, None, None, *dkept


differentiable(_attention, _RetainedAttention)


@torch.no_grad()
def retain(score: Tensor, position: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decide which tokens a head keeps when they leave the window. It has no gradient.

    Defined by :func:`mm_rec.ops.reference.retain`.

    Args:
        score: (B, W + T, H) float32, of the last W tokens and of the chunk.
        position: (B, T) int64, position of each token of the chunk in its document.
        kept: (B, H, K) float32, the scores in the slots before the chunk, -inf for an empty slot.

    Returns:
        slot (B, H, T) int32, the slot that is taken at a token by the one that leaves the window then, W tokens before
        it, or -1; source (B, H, K) int64, where the pair in each slot comes from after the chunk: below K that slot
        before the chunk, else K + row c of the context; and the scores in the slots after the chunk.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    batch, heads, _ = kept.shape
    check_type("position", position, (batch, position.shape[1]), torch.int64, kept)
    check_type("score", score, (batch, score.shape[1], heads), torch.float32, kept)
    if not runs_native("retain", score, kept):
        return reference.retain(score, position, kept)
    results: tuple[Tensor, Tensor, Tensor] = _retain(score, position, kept)
    return results


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
    """Softmax attention of each token over the pairs that its heads keep, whose scores are added to the logits.

    Defined by :func:`mm_rec.ops.reference.retained_attention`.

    Args:
        q: (B, T, H, d).
        k, v: (B, W + T, H, d), the last W tokens, oldest first, then the chunk.
        score: (B, W + T, H) float32, of these tokens.
        slot: (B, H, T) int32, of :func:`retain`.
        position: (B, T) int64.
        kept_k, kept_v: (B, H, K, d), the pairs in the slots before the chunk, in the type of ``k``.
        kept_score: (B, H, K) float32, -inf for an empty slot.

    Returns:
        What is read, (B, T, H, d) in the type of ``q``, 0 where nothing is kept; and the logarithm of the softmax's
        denominator, (B, H, T) float32, -inf there.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_context("k", k, position)
    check_shape("v", v, k.shape, k)
    check_float("q", q, 4)
    check_shape("q", q, (*position.shape, *k.shape[2:]), k)
    batch, time, heads, head_dim = q.shape
    check_float("kept_k", kept_k, 4)
    slots = kept_k.shape[2]
    check_shape("kept_k", kept_k, (batch, heads, slots, head_dim), k)
    check_shape("kept_v", kept_v, kept_k.shape, k)
    check_type("score", score, k.shape[:3], torch.float32, k)
    check_type("slot", slot, (batch, heads, time), torch.int32, k)
    check_type("kept_score", kept_score, (batch, heads, slots), torch.float32, k)
    if not runs_native("retained_attention", q, k, v, kept_k, kept_v):
        return reference.retained_attention(q, k, v, score, slot, position, kept_k, kept_v, kept_score)
    q, k, v, kept_k, kept_v = one_type(q, k, v, kept_k, kept_v)
    out, lse = _attention(q, k, v, score, slot, position, kept_k, kept_v, kept_score)
    return out, lse
