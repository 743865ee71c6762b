"""The optimizer's two passes over memory."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import pointers, sizes_of, types_of
from mm_rec.ops.optimizer import Update

__all__ = ["KERNELS"]


def adamw_(updates: Sequence[Update]) -> Callable[..., None]:
    return functools.partial(_adamw_many, updates)


def _adamw_many(
    updates: Sequence[Update], norm: Tensor, lr: float, beta1: float, beta2: float, eps: float, max_norm: float
) -> None:
    total = float(norm)
    if not math.isfinite(total):
        return
    scale = min(1.0, max_norm / total) if max_norm and total else 1.0
    steps = [one.step for one in updates]
    torch._foreach_add_(steps, 1)
    settings: list[float] = []
    for one, step in zip(updates, torch.stack(steps).tolist(), strict=True):
        rate, inverse = lr / (1 - beta1**step), 1 / (1 - beta2**step)
        settings += (beta1, beta2, eps, 1 - lr * one.weight_decay, rate, inverse, scale)
    common.call.adamw_many(
        len(updates), sizes_of([one.master for one in updates]), pointers([one.master for one in updates]),
        pointers([one.m for one in updates]), pointers([one.v for one in updates]),
        pointers([one.grad for one in updates]), types_of([one.grad for one in updates]),
        pointers([one.param_out for one in updates]), (ctypes.c_float * len(settings))(*settings),
        torch.get_num_threads(),
    )  # fmt: skip


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    tensors = [x.contiguous() for x in tensors]
    total = common.call.sum_of_squares(
        len(tensors), pointers(tensors), sizes_of(tensors), types_of(tensors), torch.get_num_threads()
    )
    return torch.tensor(total, dtype=torch.float64)


KERNELS = (adamw_, sum_of_squares)
