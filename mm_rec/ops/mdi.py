"""Decay, scaling and gate in one pass; the formulas are those of :func:`mm_rec.ops.reference.mdi`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import runs_native
from mm_rec.ops.checks import check_float, check_shape, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["mdi"]

_INPUTS = "Tensor decay_logits, Tensor decay_bias, Tensor candidate, Tensor? gate_logits, Tensor? gate_bias"


def _like_inputs(args: Any) -> tuple[Tensor, ...]:
    """Tensors like the inputs, in their order; those of the gate are empty without one."""
    activation, bias = args.candidate, args.decay_bias
    gate = (activation[:0, 0, 0], bias[:0]) if args.gate_logits is None else (activation, bias)
    return activation, bias, activation, *gate


_forward = define(f"mdi({_INPUTS}) -> (Tensor, Tensor)", lambda args: (args.candidate.float(), args.candidate.float()))
_backward = define(
    f"mdi_backward(Tensor? dgamma, Tensor? dx, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _like_inputs
)


class _Mdi(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        with below_autograd():
            gamma, x = _forward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return gamma, x

    @staticmethod
    def backward(ctx: Any, dgamma: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        if dgamma is None and dx is None:
            return (None,) * 5
        inputs = ctx.saved_tensors
        gradients: tuple[Tensor, ...] = _backward(dgamma, dx, *inputs)
        return (*gradients[:3], None, None) if inputs[3] is None else gradients


differentiable(_forward, _Mdi)


def mdi(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Memory decay and integration: the coefficients of the core recurrence, see :func:`mm_rec.ops.reference.mdi`.

    Args:
        decay_logits: (B, T, D).
        decay_bias: (D,).
        candidate: (B, T, D), z of the core formula.
        gate_logits: (B, T, D) or None.
        gate_bias: (D,), given exactly when ``gate_logits`` is.

    Returns:
        gamma (B, T, D) and x (B, T, D), both float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("decay_logits", decay_logits, 3)
    shape = decay_logits.shape
    check_shape("decay_bias", decay_bias, shape[2:], decay_logits)
    check_shape("candidate", candidate, shape, decay_logits)
    if (gate_logits is None) != (gate_bias is None):
        raise ValueError("gate_logits and gate_bias are given together or not at all")
    if gate_logits is not None and gate_bias is not None:
        check_shape("gate_logits", gate_logits, shape, decay_logits)
        check_shape("gate_bias", gate_bias, shape[2:], decay_logits)
    if not runs_native("mdi", decay_logits, decay_bias, candidate, gate_logits, gate_bias):
        return reference.mdi(decay_logits, decay_bias, candidate, gate_logits, gate_bias)
    decay_logits_, candidate_, gate_logits_ = one_type(decay_logits, candidate, gate_logits)
    bias = None if gate_bias is None else gate_bias.float()
    result: tuple[Tensor, Tensor] = _forward(decay_logits_, decay_bias.float(), candidate_, gate_logits_, bias)
    return result
