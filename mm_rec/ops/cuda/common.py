"""What the CUDA kernels' modules share: memory for results, and layouts of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops.cuda.load_library import cuda_library

__all__ = [
    "TYPE_CODES", "aligned", "all_dense", "dense", "empty", "empty_like", "matrix_of", "nested_rows", "rows_of",
    "workspace_of",
]  # fmt: skip

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns uninitialised memory for a result on the device of ``like``: the kernel writes every element."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def empty_like(*tensors: Tensor) -> Any:
    """Returns contiguous, uninitialised memory for results of the shapes and types of ``tensors``."""
    found = [empty(x, *x.shape) for x in tensors]
    return found[0] if len(found) == 1 else found


def workspace_of(name: str, like: Tensor, *sizes: int) -> Tensor:
    """Returns scratch memory for a function of the library."""
    return empty(like, cuda_library().size(name, like, *sizes), dtype=torch.uint8)


def matrix_of(x: Tensor) -> tuple[int, int]:
    """Returns the rows and columns of ``x`` as a matrix along its last axis."""
    return x.numel() // x.shape[-1], x.shape[-1]


def aligned(x: Tensor, *strides: int) -> bool:
    """Whether accesses of 16 bytes are allowed at ``x`` and at multiples of the strides (in elements) from it."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)


def dense(x: Tensor) -> Tensor:
    """Returns ``x`` contiguous and aligned, copied only if needed."""
    x = x.contiguous()
    return x if aligned(x) else x.clone()


def all_dense(*inputs: Tensor | float | None) -> Any:
    """Returns :func:`dense` of each tensor, and other inputs as they are."""
    return [dense(x) if isinstance(x, Tensor) else x for x in inputs]


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Returns ``x`` as evenly spaced rows along its last axis, copied if need be, and their distance in elements."""
    x, inner, outer_stride, inner_stride = nested_rows(x)
    if inner == 1 or outer_stride == inner * inner_stride:
        return x, inner_stride if inner > 1 else outer_stride
    return dense(x), x.shape[-1]


def nested_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Lay out ``x`` as rows along its last axis, where the axis before the last may have a stride of its own.

    Returns:
        A tensor over them, copied only if needed; the size of the axis before the last, and two distances in
        elements: row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride.
    """
    width = x.shape[-1]
    inner, inner_stride = (x.shape[-2], x.stride(-2)) if x.dim() > 1 else (1, width)
    outer_stride = expected = x.stride(-3) if x.dim() > 2 else inner * inner_stride
    regular = x.stride(-1) == 1 or width == 1
    for size, stride in zip(reversed(x.shape[:-2]), reversed(x.stride()[:-2]), strict=True):
        regular = regular and (size == 1 or stride == expected)
        expected *= size
    if regular and aligned(x, inner_stride, outer_stride):
        return x, inner, outer_stride, inner_stride
    return dense(x), inner, inner * width, width
