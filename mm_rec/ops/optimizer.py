"""The optimizer's two passes over memory: sum of squares, and AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm_rec.ops.backend import kernel, runs_native
from mm_rec.ops.checks import check_type
from mm_rec.ops.registry import NATIVE_OPS

__all__ = ["Update", "adamw_", "adamw_many_", "sum_of_squares"]

NATIVE_OPS += ["adamw_", "sum_of_squares"]  # in place and outside autograd: called directly, not dispatched


class Update(NamedTuple):
    """One tensor of :func:`adamw_many_`; the fields are those arguments of :func:`adamw_`."""

    master: Tensor
    m: Tensor
    v: Tensor
    grad: Tensor
    param_out: Tensor | None
    weight_decay: float
    step: int


def _reference_adamw_(
    master: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor,
) -> None:
    g = grad.float() * grad_scale
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
    master.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    if param_out is not None:
        param_out.copy_(master)


@torch.no_grad()
def adamw_(
    master: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    param_out: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """One AdamW update in place, in a single pass over memory.

    With g = grad * grad_scale: m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
    master <- (1 - lr weight_decay) master - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps);
    param_out <- master.

    Args:
        master, m, v: float32, contiguous, the same shape.
        grad: the same shape, float32 or bfloat16, contiguous.
        param_out: the same shape, bfloat16, contiguous: the weights of the model. None if ``master`` is them.
        step: how many updates this parameter has had, this one included, from 1.
        grad_scale: factor on the gradient (clipping, loss scaling); a 0-d float32 tensor on the device of
            the gradient also does, so that nothing waits for its value.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or layout; the message names it.
    """
    _check(Update(master, m, v, grad, param_out, weight_decay, step))
    update = kernel("adamw_", master.device.type) if runs_native("adamw_", master, grad) else _reference_adamw_
    update(master, m, v, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, grad_scale)


@torch.no_grad()
def adamw_many_(
    updates: Sequence[Update], *, lr: float, beta1: float, beta2: float, eps: float, grad_scale: float | Tensor = 1.0
) -> None:
    """:func:`adamw_` of many tensors at once: on the CPU one parallel region for all of them.

    Raises:
        TypeError, ValueError: a tensor has the wrong type, shape or layout, or there are none; the message names it.
    """
    if not updates:
        raise ValueError("updates is empty")
    for one in updates:
        _check(one)
    master = updates[0].master
    if master.device.type == "cpu" and runs_native("adamw_", master, *(one.grad for one in updates)):
        kernel("adamw_many_", "cpu")(updates, lr, beta1, beta2, eps, grad_scale)
        return
    for master, m, v, grad, out, weight_decay, step in updates:
        update = kernel("adamw_", master.device.type) if runs_native("adamw_", master, grad) else _reference_adamw_
        update(master, m, v, grad, out, lr, beta1, beta2, eps, weight_decay, step, grad_scale)


def _check(one: Update) -> None:
    """Raise unless the tensors of an update fit together."""
    master = one.master
    check_type("master", master, master.shape, torch.float32, master)
    check_type("m", one.m, master.shape, torch.float32, master)
    check_type("v", one.v, master.shape, torch.float32, master)
    check_type("grad", one.grad, master.shape, one.grad.dtype, master)
    if one.param_out is not None:
        check_type("param_out", one.param_out, master.shape, torch.bfloat16, master)
    for name, x in one._asdict().items():
        if isinstance(x, Tensor) and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if one.step < 1:
        raise ValueError(f"step counts from 1, got {one.step}")


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all tensors, added in float64: a 0-d float64 tensor.

    Args:
        tensors: float32 or bfloat16, any shapes, all on one device, at least one.
    """
    if not tensors:
        raise ValueError("tensors is empty")
    first, *others = tensors
    if runs_native("sum_of_squares", first, *others):
        total: Tensor = kernel("sum_of_squares", first.device.type)(tensors)
        return total
    return torch.stack([x.double().square().sum() for x in tensors]).sum()
