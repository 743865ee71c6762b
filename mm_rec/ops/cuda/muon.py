"""Orthogonalised updates on a GPU: PyTorch's products of stacked matrices in bfloat16, and its passes over lists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from mm_rec.ops.muon import MuonUpdate, Orthogonalize
from mm_rec.ops.polar import orthogonalize_stacked_

__all__ = ["KERNELS"]


def orthogonalize_(matrices: Sequence[Tensor]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        orthogonalize_stacked_([matrix for matrix in matrices if matrix.dtype == dtype])


def muon_(
    updates: Sequence[MuonUpdate],
    norm: Tensor,
    lr: float,
    momentum: float,
    max_norm: float,
    orthogonalize: Orthogonalize,
) -> None:
    # Where the norm is not finite, gradients and directions count as zero and factors as one, so nothing changes and
    # the host need not know.
    finite = norm.isfinite()
    scale = (max_norm / norm).clamp(max=1.0) if max_norm else torch.ones_like(norm)
    gradients = [torch.where(finite, one.grad.float() * scale, 0.0) for one in updates]
    averages = [one.m for one in updates]
    torch._foreach_mul_(averages, torch.where(finite, momentum, 1.0))
    torch._foreach_add_(averages, gradients, alpha=1 - momentum)
    torch._foreach_lerp_(gradients, averages, momentum)
    directions = [one.bfloat16() for one in gradients]
    del gradients
    orthogonalize(directions)
    groups: dict[tuple[float, float], list[int]] = defaultdict(list)
    for index, one in enumerate(updates):
        groups[one.scale, one.weight_decay].append(index)
    for (size, decay), members in groups.items():
        masters = [updates[index].master for index in members]
        steps = [torch.where(finite, directions[index].float(), 0.0) for index in members]
        torch._foreach_mul_(masters, torch.where(finite, 1 - lr * decay, 1.0))
        torch._foreach_add_(masters, steps, alpha=-lr * size)
    narrow = [one for one in updates if one.param_out is not None]
    if narrow:
        torch._foreach_copy_([one.weights for one in narrow], [one.master for one in narrow])


KERNELS = (muon_, orthogonalize_)
