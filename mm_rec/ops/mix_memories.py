"""Adds what was read from the two memories; defined by :func:`mm_rec.ops.reference.mix_memories`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["mix_memories"]

_mix = define("mix_memories(Tensor near, Tensor far, Tensor gate) -> Tensor", lambda args: args.near)
_mix_backward = define(
    "mix_memories_backward(Tensor dout, Tensor far, Tensor gate) -> (Tensor, Tensor)",  # dfar, dgate
    lambda args: (args.far, args.gate),
)


class _MixMemories(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, near: Tensor, far: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(far, gate)
        with below_autograd():
            out: Tensor = _mix(near, far, gate)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return dout, *_mix_backward(dout, *ctx.saved_tensors)


differentiable(_mix, _MixMemories)


def mix_memories(near: Tensor, far: Tensor, gate: Tensor) -> Tensor:
    """Add what was read from the long-term memory, normed and gated per head, to what was read from the window.

    Defined by :func:`mm_rec.ops.reference.mix_memories`.

    Args:
        near, far: (B, T, H, d), read from the window and from the long-term memory.
        gate: (B, T, H), logits of how much of ``far`` is added.

    Returns:
        (B, T, H, d) in the type of ``near``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("near", near, 4)
    check_shape("far", far, near.shape, near)
    check_shape("gate", gate, near.shape[:3], near)
    if not runs_native("mix_memories", near, far, gate):
        return reference.mix_memories(near, far, gate)
    out: Tensor = _mix(*one_type(near, far), gate.float())
    return out.to(near.dtype)
