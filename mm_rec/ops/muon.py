"""Updates by orthogonalised momentum, which Muon is: https://kellerjordan.github.io/posts/muon, arXiv 2502.16982."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import expect, kernel, runs_native
from mm_rec.ops.checks import check_float, check_type

__all__ = ["MuonUpdate", "Orthogonalize", "muon_", "muon_scale", "orthogonalize_"]

# Both work in place and outside autograd, so they are called directly and not registered with PyTorch.
expect("muon_", "orthogonalize_")


def muon_scale(rows: int, columns: int) -> float:
    """Returns the factor of an orthogonal matrix that gives its elements a root mean square of 0.2, as AdamW has.

    It is 0.2 sqrt(max(rows, columns)) (Moonlight, arXiv 2502.16982), so rates and weight decay of AdamW suit.
    """
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class MuonUpdate:
    """One matrix of :func:`muon_` and all that belongs to it, on one device, each contiguous.

    Attributes:
        master, m: weights and momentum, float32, of the same shape (rows, columns).
        grad: of that shape, float32 or bfloat16.
        param_out: of that shape, bfloat16: the weights of the model. None if ``master`` is them.
        scale: of the orthogonal matrix, from :func:`muon_scale`.

    Raises:
        TypeError, ValueError: an attribute has the wrong type, shape or layout; the message names it.
    """

    master: Tensor
    m: Tensor
    grad: Tensor
    param_out: Tensor | None
    scale: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.master.dim() != 2:
            raise ValueError(f"master must be a matrix, got shape {tuple(self.master.shape)}")
        self._check("master", self.master, torch.float32)
        self._check("m", self.m, torch.float32)
        self._check("grad", self.grad, torch.bfloat16 if self.grad.dtype == torch.bfloat16 else torch.float32)
        if self.param_out is not None:
            self._check("param_out", self.param_out, torch.bfloat16)

    def _check(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        check_type(name, x, self.master.shape, dtype, self.master)
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")

    @property
    def weights(self) -> Tensor:
        """The weights that the model computes with."""
        return self.master if self.param_out is None else self.param_out


Orthogonalize = Callable[[list[Tensor]], None]


@torch.no_grad()
def orthogonalize_(matrices: Sequence[Tensor]) -> None:
    """Replace each matrix by its polar factor, as :func:`mm_rec.ops.reference.orthogonalize` defines it.

    Its singular values become about 1; a matrix of zeros stays. bfloat16 matrices are multiplied in bfloat16 where the
    device has such products. Nothing waits for the device. On the CPU, results depend neither on what else is in the
    list nor, in bfloat16, on the number of threads.

    Args:
        matrices: float32 or bfloat16, any shapes, contiguous, all on one device; may be empty.

    Raises:
        TypeError, ValueError: a matrix has the wrong type, shape or layout.
    """
    for matrix in matrices:
        check_float("matrices", matrix, 2)
        if not matrix.is_contiguous():
            raise ValueError("matrices must be contiguous")
    if not matrices:
        return
    if runs_native("orthogonalize_", *matrices):
        kernel("orthogonalize_", matrices[0].device.type)(matrices)
    else:
        for matrix in matrices:
            matrix.copy_(reference.orthogonalize(matrix))


def _reference_muon_(
    updates: Sequence[MuonUpdate], norm: Tensor, lr: float, momentum: float, max_norm: float, whole: Orthogonalize
) -> None:
    finite = norm.isfinite()
    scale = (max_norm / norm).clamp(max=1.0) if max_norm else 1.0
    gradients = [torch.where(finite, one.grad.float() * scale, 0.0) for one in updates]
    averages = [one.m.lerp(g, 1 - momentum) for one, g in zip(updates, gradients, strict=True)]
    directions = [m.lerp(g, 1 - momentum) for m, g in zip(averages, gradients, strict=True)]
    whole(directions)
    for one, m, direction in zip(updates, averages, directions, strict=True):
        master = one.master * (1 - lr * one.weight_decay) - lr * one.scale * direction
        for held, new in ((one.m, m), (one.master, master)):
            held.copy_(torch.where(finite, new, held))
        if one.param_out is not None:
            one.param_out.copy_(torch.where(finite, one.master, one.param_out))


@torch.no_grad()
def muon_(
    updates: Sequence[MuonUpdate],
    norm: Tensor,
    *,
    lr: float,
    momentum: float,
    max_norm: float = 0.0,
    orthogonalize: Orthogonalize = orthogonalize_,
) -> None:
    """One update of many matrices by orthogonalised momentum, in place; nothing waits for the device.

    With g = grad * min(1, max_norm / norm), each matrix by itself: m <- mu m + (1 - mu) g;  u = mu m + (1 - mu) g
    (Nesterov);  master <- (1 - lr weight_decay) master - lr scale O(u), O(u) the polar factor of u;
    param_out <- master. If ``norm`` is not finite nothing changes.

    Args:
        updates: the matrices, at least one, all on one device.
        norm: of all gradients of the step together, float32 of shape () on that device.
        momentum: mu.
        max_norm: 0 never clips.
        orthogonalize: replaces the matrices of all updates, which are in a type of the back end's choice, by their
            polar factors; given where several processes share the work.

    Raises:
        TypeError, ValueError: ``norm`` is of the wrong type or shape, or there are no updates; the message names it.
    """
    if not updates:
        raise ValueError("updates is empty")
    like = updates[0].master
    check_type("norm", norm, torch.Size(), torch.float32, like)
    if runs_native("muon_", like, *(one.grad for one in updates)):
        kernel("muon_", like.device.type)(updates, norm, lr, momentum, max_norm, orthogonalize)
        torch.autograd.graph.increment_version([one.weights for one in updates])
    else:
        _reference_muon_(updates, norm, lr, momentum, max_norm, orthogonalize)
