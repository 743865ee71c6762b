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
    """Returns uninitialised memory for a result: the kernel writes every element."""
    return torch.empty(shape, dtype=dtype)


def pointer(x: Tensor | None) -> int | None:
    """Returns the address of the data, or None for None."""
    return None if x is None else x.data_ptr()


def contiguous(x: Tensor | None) -> Tensor | None:
    """Returns ``x`` itself if it is contiguous or None, else a contiguous copy."""
    return None if x is None else x.contiguous()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Returns a (B, T, D) tensor as B * T evenly spaced rows, copied if need be, and the distance between rows."""
    batch, time, width = x.shape
    outer, inner, last = x.stride()
    if last == 1 or width == 1:
        if time == 1:
            return x, outer
        if batch == 1 or outer == time * inner:
            return x, inner
    return x.contiguous(), width


def flat_rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Returns a (..., n) tensor as evenly spaced rows of n, copied if need be, and the distance between rows."""
    if x.dim() == 3:
        return rows_of(x)
    return x.contiguous(), x.shape[-1]


def two_level_rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Returns a (..., n) tensor as rows of n: the tensor, the rows per outer step, the outer and the inner distance."""
    if x.dim() == 4 and (x.stride(3) == 1 or x.shape[3] == 1):
        batch, time, inner, _ = x.shape
        if batch == 1 or x.stride(0) == time * x.stride(1):
            return x, inner, x.stride(1), x.stride(2)
    x, row = flat_rows_of(x)
    return x, 1, row, 0


def head_rows_of(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Returns a (B, T, H, d) tensor whose heads lie side by side, copied if need be, and its rows as kernels take them.

    These are its address, and the distances from one sequence to the next and from one row to the next.
    """
    _, time, heads, head_dim = x.shape
    sequence, row, head, last = x.stride()
    if last == 1 and (head == head_dim or heads == 1):
        return x, (x.data_ptr(), sequence, row)
    x = x.contiguous()
    return x, (x.data_ptr(), time * heads * head_dim, heads * head_dim)


def check(result: int) -> None:
    """Raise for a kernel that did not run: 1 means no memory for its scratch, 2 impossible positions."""
    if result == 1:
        raise MemoryError("no memory for the scratch of a kernel")
    if result == 2:
        raise ValueError("position must not be negative")


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Returns the addresses of the data as a C array."""
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


def sizes_of(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """Returns the numbers of elements as a C array."""
    return (ctypes.c_int64 * len(tensors))(*[x.numel() for x in tensors])


def types_of(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int32]:
    """Returns the codes of the types as a C array."""
    return (ctypes.c_int32 * len(tensors))(*[TYPE_CODES[x.dtype] for x in tensors])
