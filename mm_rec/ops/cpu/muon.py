"""Orthogonalised updates: two passes over memory, and between them the polar factors by products of our own.

Processors that multiply pairs of bfloat16 orthogonalise in it, one matrix a thread; on others PyTorch does in float32.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, pointers, sizes_of, types_of
from mm_rec.ops.muon import MuonUpdate, Orthogonalize
from mm_rec.ops.polar import RESTART, orthogonalize_stacked_
from mm_rec.ops.reference import POLAR_POLYNOMIALS

__all__ = ["KERNELS", "use"]

_COEFFICIENTS = [value for polynomial in POLAR_POLYNOMIALS for value in polynomial]

_polar_factors: Callable[..., int] | None = None


def use(polar_factors: Callable[..., int] | None) -> None:
    """Set the function of ``products.cpp`` that orthogonalises from now on; None leaves that to PyTorch."""
    global _polar_factors
    _polar_factors = polar_factors


def orthogonalize_(matrices: Sequence[Tensor]) -> None:
    narrow = []
    for matrix in matrices:
        if matrix.dtype == torch.bfloat16 and _polar_factors is not None:
            narrow.append(matrix)
        else:
            wide = matrix.float()  # itself if it is float32
            orthogonalize_stacked_([wide])
            matrix.copy_(wide)
    if _polar_factors is None or not narrow:
        return
    narrow.sort(key=_work, reverse=True)  # the largest first, so that threads are through at about the same time
    rows, columns = ((ctypes.c_int64 * len(narrow))(*[x.shape[axis] for x in narrow]) for axis in (0, 1))
    check(
        _polar_factors(
            len(narrow), pointers(narrow), rows, columns, len(POLAR_POLYNOMIALS),
            (ctypes.c_float * len(_COEFFICIENTS))(*_COEFFICIENTS), RESTART, torch.get_num_threads(),
        )
    )  # fmt: skip


def _work(matrix: Tensor) -> int:
    """Returns what the time of a matrix grows with."""
    return min(matrix.shape) ** 2 * max(matrix.shape)


def muon_(
    updates: Sequence[MuonUpdate],
    norm: Tensor,
    lr: float,
    momentum: float,
    max_norm: float,
    orthogonalize: Orthogonalize,
) -> None:
    total = float(norm)
    if not math.isfinite(total):
        return
    masters, gradients = [one.master for one in updates], [one.grad for one in updates]
    dtype = torch.float32 if _polar_factors is None else torch.bfloat16
    directions = [common.empty(one.shape, dtype) for one in masters]
    sizes, threads = sizes_of(masters), torch.get_num_threads()
    common.call.muon_momentum(
        len(updates), sizes, pointers([one.m for one in updates]), pointers(gradients), types_of(gradients),
        pointers(directions), TYPE_CODES[dtype], momentum, min(1.0, max_norm / total) if max_norm and total else 1.0,
        threads,
    )  # fmt: skip
    orthogonalize(directions)
    settings = [value for one in updates for value in (1 - lr * one.weight_decay, lr * one.scale)]
    common.call.muon_step(
        len(updates), sizes, pointers(masters), pointers(directions), TYPE_CODES[dtype],
        pointers([one.param_out for one in updates]), (ctypes.c_float * len(settings))(*settings), threads,
    )  # fmt: skip


KERNELS = (muon_, orthogonalize_)
