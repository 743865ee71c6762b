"""Matrix products: kernels of ours where the CPU has them, PyTorch's elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec.ops.backend import kernel, runs_fused
from mm_rec.ops.checks import check_float, check_shape
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["linear", "matmul"]

_mm = define("mm(Tensor left, Tensor right) -> Tensor", lambda args: args.left @ args.right, fused=True)
_linear = define("linear(Tensor x, Tensor weight) -> Tensor", lambda args: F.linear(args.x, args.weight), fused=True)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with below_autograd():
            y: Tensor = _linear(x, weight)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        above = dy.flatten(0, -2)
        dx = _mm(above, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, _mm(above.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None


differentiable(_linear, _Linear)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the product x weight^T.

    Args:
        x: (B, T, K).
        weight: (N, K), in the type of ``x``.

    Returns:
        (B, T, N) in the type of ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    check_float("x", x, 3)
    check_float("weight", weight, 2)
    check_shape("weight", weight, (weight.shape[0], x.shape[2]), x)
    if x.dtype == weight.dtype == torch.bfloat16 and runs_fused("linear", x):
        y: Tensor = _linear(x, weight)
        return y
    return F.linear(x, weight)


def matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the product of two matrices into ``out``, by the kernel that :func:`linear` uses; without gradient.

    Args:
        left: (M, K).
        right: (K, N), in the type of ``left``.
        out: (M, N) in the same type, its rows contiguous.
    """
    if left.dtype == right.dtype == torch.bfloat16 and runs_fused("mm", left):
        kernel("mm", left.device.type)(left, right, out)
    else:
        torch.mm(left, right, out=out)
