"""Matrix products on the CPU: PyTorch's; for bfloat16 on AVX512-BF16 or AMX, our own kernels.

Our kernels add in a fixed order, so a product depends neither on the number of threads nor on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["add_mm", "mm", "use"]

LEAST_SIZE = 16  # rows and columns of a tile: smaller products would mostly multiply zeros
ONE_THREAD_WORK = 4_000_000  # multiplications that take less time than starting a second thread

_product: Callable[..., int] | None = None


def use(product: Callable[..., int] | None) -> None:
    """Set the function of ``products.cpp`` that multiplies from now on; None leaves all products to PyTorch."""
    global _product
    _product = product


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns :func:`torch.mm` of the two, written into ``out`` if given; the rows of ``out`` are contiguous."""
    if _product is None or not _fits(left, right):
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    if out is None:
        out = torch.empty((left.shape[0], right.shape[1]), dtype=left.dtype)
    _multiply(_product, left, right, out, add=False)
    return out


def add_mm(total: Tensor, left: Tensor, right: Tensor, scratch: Tensor) -> None:
    """Add ``left`` times ``right`` to the float32 ``total``; ``scratch`` has its shape and the type of the operands."""
    if _product is None or not _fits(left, right):
        total += torch.mm(left, right, out=scratch)
    else:
        _multiply(_product, left, right, total, add=True)


def _fits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.bfloat16
        and left.is_cpu
        and min(left.shape[0], right.shape[1]) >= LEAST_SIZE
        and left.shape[1] > 0
        and 1 in left.stride()
        and 1 in right.stride()
    )


def _multiply(product: Callable[..., int], left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    (rows, depth), columns = left.shape, right.shape[1]
    left_last, right_last = left.stride(1) == 1, right.stride(0) == 1  # is the depth the fast index?
    threads = torch.get_num_threads() if rows * columns * depth > ONE_THREAD_WORK else 1
    result = product(
        int(out.dtype == torch.bfloat16), rows, columns, depth, left.data_ptr(), left.stride(0 if left_last else 1),
        left_last, right.data_ptr(), right.stride(1 if right_last else 0), right_last, out.data_ptr(), out.stride(0),
        add, threads,
    )  # fmt: skip
    if result:
        raise MemoryError("no memory for the blocks of a matrix product")
