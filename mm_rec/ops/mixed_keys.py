"""Keys of a memory block, made of the own keys of several tokens; formula in :mod:`mm_rec.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import fits, runs_native
from mm_rec.ops.checks import check_context, check_float, check_shape
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["mixed_keys"]

_KEYS = "Tensor k, Tensor taps, Tensor position"
_keys = define(f"mixed_keys({_KEYS}) -> Tensor", lambda args: args.k[:, args.k.shape[1] - args.position.shape[1] :])
_keys_backward = define(
    f"mixed_keys_backward(Tensor dkey, {_KEYS}) -> (Tensor, Tensor)",
    lambda args: (args.k, args.taps),  # their gradients
)


class _MixedKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(k, taps, position)
        with below_autograd():
            key: Tensor = _keys(k, taps, position)
        return key

    @staticmethod
    def backward(ctx: Any, dkey: Tensor) -> tuple[Tensor | None, ...]:
        return *_keys_backward(dkey, *ctx.saved_tensors), None


differentiable(_keys, _MixedKeys)


def mixed_keys(k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    """Keys of both memories, made of the own keys of a token and of those before it.

    Defined by :func:`mm_rec.ops.reference.mixed_keys`.

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
    if not runs_native("mixed_keys", k, taps) or not fits("mixed_keys", k, *taps.shape[1:]):
        return reference.mixed_keys(k, taps, position)
    key: Tensor = _keys(k, taps.float(), position)
    return key
