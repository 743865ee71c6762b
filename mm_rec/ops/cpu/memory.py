"""Writing and reading the memories."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mm_rec.ops.reference import rotary_angles

__all__ = ["KERNELS"]


@functools.lru_cache(maxsize=16)
def _rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (length, d / 2) each, as in :func:`mm_rec.ops.reference.rotate`."""
    angle = rotary_angles(torch.arange(length), head_dim, base)
    return angle.cos().float(), angle.sin().float()


KERNELS = ()
