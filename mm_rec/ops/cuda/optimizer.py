"""The optimizer's two passes over memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, workspace_of
from mm_rec.ops.cuda.load_library import cuda_library
from mm_rec.ops.optimizer import Update

__all__ = ["KERNELS"]


def adamw_(updates: Sequence[Update]) -> Callable[..., None]:
    table: list[int] = []
    for one in updates:
        rounded = 0 if one.param_out is None else one.param_out.data_ptr()
        table += (
            one.master.data_ptr(), one.m.data_ptr(), one.v.data_ptr(), one.grad.data_ptr(), rounded,
            one.step.data_ptr(), one.master.numel(), TYPE_CODES[one.grad.dtype],
        )  # fmt: skip
    rows = (ctypes.c_int64 * len(table))(*table)
    decays = (ctypes.c_double * len(updates))(*[one.weight_decay for one in updates])
    workspace = workspace_of("adamw_many", updates[0].master, len(updates))

    def run(norm: Tensor, lr: float, beta1: float, beta2: float, eps: float, max_norm: float) -> None:
        cuda_library().call(
            "adamw_many", norm, len(updates), rows, decays, norm, float(max_norm), float(lr), beta1, beta2, eps,
            workspace,
        )  # fmt: skip

    return run


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    tensors = all_dense(*tensors)
    table = [value for x in tensors for value in (x.data_ptr(), x.numel(), TYPE_CODES[x.dtype])]
    partial = common.empty(
        tensors[0], cuda_library().size("sum_of_squares", tensors[0], len(tensors)), dtype=torch.float64
    )
    total = common.empty(tensors[0], dtype=torch.float64)
    cuda_library().call("sum_of_squares", total, len(tensors), (ctypes.c_int64 * len(table))(*table), partial, total)
    return total


KERNELS = (adamw_, sum_of_squares)
