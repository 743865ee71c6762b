"""Checks of arguments, shared by the public ops: each failure names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_context", "check_float", "check_like", "check_shape", "check_start", "check_type", "one_type"]

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def check_float(name: str, x: Tensor, ndim: int) -> None:
    """``x`` must be a floating-point tensor with ``ndim`` axes, none of them empty (0 axes: any number)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be floating-point, got {x.dtype}")
    if ndim and x.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(x.shape)}")
    if not x.numel():
        raise ValueError(f"{name} is empty, shape {tuple(x.shape)}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """``x`` must be a floating-point tensor of ``shape`` on the device of ``like``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be floating-point, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the other arguments on {like.device}")


def check_type(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """``x`` must be a tensor of ``shape`` and exactly ``dtype`` on the device of ``like``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the other arguments on {like.device}")


def check_like(name: str, x: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    """``x`` must be a contiguous tensor of exactly ``dtype`` with the shape and on the device of ``like``.

    It is cheap where all is well, since every step of training checks every tensor of a model and its optimizer.
    """
    if x.dtype != dtype or x.shape != like.shape or x.device != like.device:
        check_type(name, x, like.shape, dtype, like)
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def check_context(name: str, x: Tensor, position: Tensor) -> int:
    """``x`` must be (B, W + T, H, d) floating-point with W at least 1, and ``position`` (B, T); returns W."""
    check_float(name, x, 4)
    if position.dim() != 2 or position.shape[0] != x.shape[0] or not position.shape[1]:
        raise ValueError(f"position must be ({x.shape[0]}, T), got {tuple(position.shape)}")
    check_type("position", position, position.shape, torch.int64, x)
    window = x.shape[1] - position.shape[1]
    if window < 1:
        raise ValueError(f"{name} must hold a window and the chunk, got {x.shape[1]} tokens for {position.shape[1]}")
    return window


def check_start(name: str, state: Tensor | None, reset: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """``state`` and ``reset``, if given, must be (B, D) and (B, T) bool for a sequence of ``shape`` (B, T, D)."""
    batch, time, width = shape
    if state is not None:
        check_shape(name, state, (batch, width), like)
    if reset is not None:
        check_type("reset", reset, (batch, time), torch.bool, like)


def one_type(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the tensors, widened to float32 unless they share a type: kernels take one activation type."""
    types = {x.dtype for x in tensors if x is not None}
    return tensors if len(types) == 1 else tuple(None if x is None else x.float() for x in tensors)
