"""What the CPU kernels' modules share: the library's functions, memory for results, and layouts of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

__all__ = [
    "TYPE_CODES", "check", "contiguous", "empty", "flat_rows_of", "head_rows_of", "pointer", "pointers", "rows_of",
    "sizes_of", "two_level_rows_of", "types_of",
]  # fmt: skip

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

call: SimpleNamespace  # the functions of the library, set by mm_rec.ops.cpu.load()


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a result, uninitialised: the kernel writes every element."""
    return torch.empty(shape, dtype=dtype)


def pointer(x: Tensor | None) -> int | None:
    """Address of the data, or None."""
    return None if x is None else x.data_ptr()


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` itself or a contiguous copy."""
    return None if x is None else x.contiguous()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """A (B, T, D) tensor as B * T evenly spaced rows, and the distance between rows; a copy if need be."""
    batch, time, width = x.shape
    outer, inner, last = x.stride()
    if last == 1 or width == 1:
        if time == 1:
            return x, outer
        if batch == 1 or outer == time * inner:
            return x, inner
    return x.contiguous(), width


def flat_rows_of(x: Tensor) -> tuple[Tensor, int]:
    """A (..., n) tensor as evenly spaced rows of n; a copy if need be."""
    if x.dim() == 3:
        return rows_of(x)
    return x.contiguous(), x.shape[-1]


def two_level_rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A (..., n) tensor as rows of n: the tensor, rows per outer step, outer and inner distance."""
    if x.dim() == 4 and (x.stride(3) == 1 or x.shape[3] == 1):
        batch, time, inner, _ = x.shape
        if batch == 1 or x.stride(0) == time * x.stride(1):
            return x, inner, x.stride(1), x.stride(2)
    x, row = flat_rows_of(x)
    return x, 1, row, 0


def head_rows_of(x: Tensor) -> tuple[Tensor, int]:
    """A (B, T, H, d) tensor as B * T evenly spaced rows of H * d, and the distance between rows; a copy if need be."""
    batch, time, heads, head_dim = x.shape
    outer, row, head, last = x.stride()
    if last == 1 and (head == head_dim or heads == 1) and (batch == 1 or outer == time * row) and time > 1:
        return x, row
    return x.contiguous(), heads * head_dim


def check(result: int) -> None:
    """Raise for a kernel that did not run: 1 means no memory for its scratch, 2 positions that cannot be."""
    if result == 1:
        raise MemoryError("no memory for the scratch of a kernel")
    if result == 2:
        raise ValueError("position must not be negative nor cause more than one write in every W / 2 tokens")


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of all data, as an array of C."""
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


def sizes_of(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """Numbers of elements, as an array of C."""
    return (ctypes.c_int64 * len(tensors))(*[x.numel() for x in tensors])


def types_of(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int32]:
    """Codes of the types, as an array of C."""
    return (ctypes.c_int32 * len(tensors))(*[TYPE_CODES[x.dtype] for x in tensors])
