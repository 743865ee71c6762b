"""The tied output head and its loss; the formula is that of :func:`mm_rec.ops.reference.linear_cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape, check_type, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["linear_cross_entropy"]


_op = define(
    "linear_cross_entropy(Tensor y, Tensor embedding, Tensor targets, Tensor weight, bool needs_dy, "
    "bool needs_dembedding) -> (Tensor, Tensor, Tensor, Tensor)",
    # loss, nll and the gradients of the loss: the weights are known, so one pass over the logits gives
    # everything; a gradient that is not needed is empty
    lambda args: (
        args.weight.sum(),
        args.weight,
        args.y if args.needs_dy else args.y[:0, 0],
        args.embedding if args.needs_dembedding else args.embedding[:0, 0],
    ),
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            loss, nll, dy, dembedding = _op(*inputs)
        ctx.mark_non_differentiable(nll, dy, dembedding)
        ctx.set_materialize_grads(False)
        needs_dy, needs_dembedding = inputs[4:]
        ctx.save_for_backward(dy if needs_dy else None, dembedding if needs_dembedding else None)
        return loss, nll, dy, dembedding

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        dy, dembedding = ctx.saved_tensors
        if dloss is None:
            return (None,) * 6
        # Where the loss ends the graph, dloss is 1 and multiplying would be waste. Only a plain CPU tensor is read to
        # find out: reading one on a GPU would stall it, and a traced one has no value.
        if type(dloss) is not Tensor or dloss.device.type != "cpu" or dloss.item() != 1.0:
            dy = None if dy is None else (dy * dloss).to(dy.dtype)
            dembedding = None if dembedding is None else (dembedding * dloss).to(dembedding.dtype)
        return dy, dembedding, None, None, None, None


differentiable(_op, _LinearCrossEntropy)


def linear_cross_entropy(
    y: Tensor, embedding: Tensor, targets: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of the tied output head, see :func:`mm_rec.ops.reference.linear_cross_entropy`.

    Neither the N x V logits of all rows nor their gradient ever exist: rows run in chunks.

    Args:
        y: (N, D).
        embedding: (V, D).
        targets: (N,) int64 in [0, V).
        weight: (N,) float32, constant; None means 1 / N each. A weight of 0 leaves the row out.

    Returns:
        loss: scalar float32, sum of weight * nll, and nll: (N,) float32 in nats, without gradient and 0
        where the weight is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
        IndexError: a target is outside the vocabulary (checked on the CPU).
    """
    check_float("y", y, 2)
    check_float("embedding", embedding, 2)
    rows, width = y.shape
    check_shape("embedding", embedding, (embedding.shape[0], width), y)
    check_type("targets", targets, (rows,), torch.int64, y)
    if weight is not None:
        check_shape("weight", weight, (rows,), y)
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient")
    if not runs_native("linear_cross_entropy", y, embedding, weight):
        return reference.linear_cross_entropy(y, embedding, targets, weight)
    if weight is None:
        weight = torch.full((rows,), 1 / rows, dtype=torch.float32, device=y.device)
    learning = torch.is_grad_enabled()
    y_, embedding_ = one_type(y, embedding)
    loss, nll, _, _ = _op(
        y_, embedding_, targets, weight.float(), learning and y.requires_grad, learning and embedding.requires_grad
    )
    return loss, nll
