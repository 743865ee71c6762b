"""The memories of a block: which pairs are kept, and attention over the window and over them.

Formulas in :mod:`mm_rec.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import fits, runs_native
from mm_rec.ops.checks import check_context, check_float, check_shape, check_type, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["memory_attention", "retain"]

_retain = define(
    "retain(Tensor score, Tensor position, Tensor kept_score) -> (Tensor, Tensor)",
    lambda args: (
        args.position.new_empty((*args.kept_score.shape[:2], args.position.shape[1]), dtype=torch.int32),
        args.position.new_empty(_held_shape(args.kept_score, args.position), dtype=torch.int32),
    ),
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor score, Tensor slot, Tensor held, Tensor position, Tensor kept_k, "
    "Tensor kept_v, Tensor kept_score, float rotary_base"
)
_attention = define(
    f"memory_attention({_INPUTS}) -> (Tensor, Tensor)",
    # the result and, for the backward pass, the log of the softmax's denominator (B, H, T) in float32
    lambda args: (args.q, args.q[..., 0].transpose(1, 2).float()),
)
_attention_backward = define(
    f"memory_attention_backward(Tensor dout, Tensor out, Tensor lse, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # dq, dk, dv, dscore, dkept_k, dkept_v, dkept_score
    lambda args: (args.q, args.k, args.v, args.score, args.kept_k, args.kept_v, args.kept_score),
)


def _held_shape(kept_score: Tensor, position: Tensor) -> tuple[int, int, int, int]:
    batch, heads, slots = kept_score.shape
    return batch, heads, -(-position.shape[1] // reference.RUN) + 1, slots


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, lse = _attention(*inputs)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *inputs[:-1])
        ctx.rotary_base = inputs[-1]
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 11
        dq, dk, dv, dscore, *dkept = _attention_backward(dout, *ctx.saved_tensors, ctx.rotary_base)
        return dq, dk, dv, dscore, None, None, None, *dkept, None


differentiable(_attention, _MemoryAttention)


@torch.no_grad()
def retain(score: Tensor, position: Tensor, kept_score: Tensor) -> tuple[Tensor, Tensor]:
    """Decides which tokens a head keeps when they leave the window. It has no gradient.

    Defined by :func:`mm_rec.ops.reference.retain`.

    Args:
        score: (B, W + T, H) float32, of the last W tokens and of the chunk.
        position: (B, T) int64, position of each token of the chunk in its document.
        kept_score: (B, H, K) float32, the scores in the slots before the chunk, -inf for an empty slot.

    Returns:
        slot (B, H, T) int32, the slot that is taken at a token by the one that leaves the window then, W tokens before
        it, or -1; and held (B, H, R + 1, K) int32, what is in each slot before token 0, 64, 128, ... and after the last
        token: j < K is what was in slot j before the chunk, K + c is row c of the window and the chunk, -1 nothing.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    batch, heads, _ = kept_score.shape
    check_type("position", position, (batch, position.shape[1]), torch.int64, kept_score)
    check_shape("score", score, (batch, score.shape[1], heads), kept_score)
    if not runs_native("retain", score, kept_score):
        return reference.retain(score, position, kept_score)
    slot, held = _retain(score.float(), position, kept_score.float())
    return slot, held


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    position: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    rotary_base: float = 1000.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention of each token over the last W tokens of its document and the pairs kept of those before.

    Defined by :func:`mm_rec.ops.reference.memory_attention`.

    Args:
        q: (B, T, H, d), un-rotated, d even.
        k, v: (B, W + T, H, d), un-rotated: the last W tokens, oldest first, then the chunk.
        score: (B, W + T, H), of these tokens; as each leaves the window, it is kept if its score is high enough.
        position: (B, T) int64, position of each token of the chunk in its document.
        kept_k, kept_v: (B, H, K, d), the pairs in the slots before the chunk.
        kept_score: (B, H, K), their scores, -inf for an empty slot. It is float32 like ``score``, and so decides alike
            on every device.
        rotary_base: see :func:`mm_rec.ops.rotate`.

    Returns:
        What is read, (B, T, H, d) in the type of ``q``; then the pairs in the slots after the chunk and their scores.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_context("k", k, position)
    check_shape("v", v, k.shape, k)
    check_float("q", q, 4)
    check_shape("q", q, (*position.shape, *k.shape[2:]), k)
    batch, time, heads, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"q must have heads of even size, got {head_dim}")
    check_float("kept_k", kept_k, 4)
    slots = kept_k.shape[2]
    check_shape("kept_k", kept_k, (batch, heads, slots, head_dim), k)
    check_shape("kept_v", kept_v, kept_k.shape, k)
    check_shape("score", score, k.shape[:3], k)
    check_shape("kept_score", kept_score, (batch, heads, slots), k)
    if not runs_native("memory_attention", q, k, v, score, kept_k, kept_v, kept_score) or not fits(
        "memory_attention", k, head_dim
    ):
        return reference.memory_attention(q, k, v, score, position, kept_k, kept_v, kept_score, rotary_base)
    out_dtype = q.dtype
    score, kept_score = score.float(), kept_score.float()
    slot, held = retain(score, position, kept_score)
    q, k, v, kept_k, kept_v = one_type(q, k, v, kept_k, kept_v)  # type: ignore[assignment]
    out, _ = _attention(q, k, v, score, slot, held, position, kept_k, kept_v, kept_score, rotary_base)
    pairs = reference.candidate_pairs(k, v, score, kept_k, kept_v, kept_score, time)
    return out.to(out_dtype), *reference.take_pairs(*pairs, held[:, :, -1])
