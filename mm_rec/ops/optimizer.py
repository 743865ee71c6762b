"""The optimizer's two passes over memory: sum of squares, and AdamW (arXiv 1711.05101)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_rec.ops.backend import expect, kernel, runs_native
from mm_rec.ops.checks import check_like, check_type

__all__ = ["Update", "Updates", "adamw_", "check_update", "sum_of_squares"]

# Both work in place and outside autograd, so they are called directly and not registered with PyTorch. The kernel of
# adamw_ takes the updates and returns a function that runs them, which takes the other arguments.
expect("adamw_", "sum_of_squares")


def check_update(master: Tensor, grad: Tensor, param_out: Tensor | None, **state: Tensor) -> None:
    """Checks what every update has: float32 weights and state, a gradient, perhaps weights of the model in bfloat16.

    Raises:
        TypeError, ValueError: one has the wrong type, shape or layout; the message names it.
    """
    for name, x in {"master": master, **state}.items():
        check_like(name, x, torch.float32, master)
    check_like("grad", grad, torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32, master)
    if param_out is not None:
        check_like("param_out", param_out, torch.bfloat16, master)


@dataclass(frozen=True)
class Update:
    """One tensor of :func:`adamw_` and all that belongs to it, on one device, each contiguous.

    Attributes:
        master, m, v: weights and moments, float32, of the same shape.
        grad: of that shape, float32 or bfloat16.
        param_out: of that shape, bfloat16: the weights of the model. None if ``master`` is them.
        step: how many updates there have been, float32 of shape ().

    Raises:
        TypeError, ValueError: an attribute has the wrong type, shape or layout; the message names it.
    """

    master: Tensor
    m: Tensor
    v: Tensor
    grad: Tensor
    param_out: Tensor | None
    step: Tensor
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_update(self.master, self.grad, self.param_out, m=self.m, v=self.v)
        if self.step.dtype != torch.float32 or self.step.shape or self.step.device != self.master.device:
            check_type("step", self.step, torch.Size(), torch.float32, self.master)

    @property
    def weights(self) -> Tensor:
        """The weights that the model computes with."""
        return self.master if self.param_out is None else self.param_out


def _reference_adamw_(
    updates: Sequence[Update], norm: Tensor, lr: float, beta1: float, beta2: float, eps: float, max_norm: float
) -> None:
    finite = norm.isfinite()
    scale = (max_norm / norm).clamp(max=1.0) if max_norm else 1.0
    for one in updates:
        g = one.grad.float() * scale
        step = one.step.double() + 1
        m = one.m.lerp(g, 1 - beta1)
        v = (one.v * beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        master = one.master * (1 - lr * one.weight_decay) - lr / (1 - beta1**step) * m / denominator
        for held, new in ((one.step, step), (one.m, m), (one.v, v), (one.master, master)):
            held.copy_(torch.where(finite, new, held))
        if one.param_out is not None:
            one.param_out.copy_(torch.where(finite, one.master, one.param_out))


class Updates:
    """The tensors of :func:`adamw_`, at least one, with the host's share of the work done ahead.

    Prepared while the device is still busy, so that the update launches as soon as the norm is known.
    """

    def __init__(self, updates: Sequence[Update]) -> None:
        if not updates:
            raise ValueError("updates is empty")
        self.like = updates[0].master
        self.run: Callable[..., None] = functools.partial(_reference_adamw_, updates)
        self.written: list[Tensor] = []  # weights that a kernel writes, which PyTorch does not notice
        if runs_native("adamw_", self.like, *(one.grad for one in updates)):
            self.run = kernel("adamw_", self.like.device.type)(updates)
            self.written = [one.weights for one in updates]


@torch.no_grad()
def adamw_(
    updates: Updates | Sequence[Update],
    norm: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float = 0.0,
) -> None:
    """One AdamW update of many tensors in place, in a single pass over memory; nothing waits for the device.

    With g = grad * min(1, max_norm / norm), each tensor by itself: step <- step + 1;
    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
    master <- (1 - lr weight_decay) master - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps);
    param_out <- master. If ``norm`` is not finite nothing changes, the steps included.

    Args:
        updates: the tensors, at least one, all on one device; they may have been made ready before.
        norm: of all gradients together, float32 of shape () on that device.
        max_norm: 0 never clips.

    Raises:
        TypeError, ValueError: ``norm`` is of the wrong type or shape, or there are no updates; the message names it.
    """
    updates = updates if isinstance(updates, Updates) else Updates(updates)
    check_type("norm", norm, torch.Size(), torch.float32, updates.like)
    updates.run(norm, lr, beta1, beta2, eps, max_norm)
    torch.autograd.graph.increment_version(updates.written)  # so that a PackedMatrix sees that its weights changed


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the sum of the squares of all elements of all tensors, added in float64, as a float64 tensor of shape ().

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
