"""Polar factors of many matrices at once in plain PyTorch, for devices without a kernel of ours for it.

As in ``mm_rec/cpp/src/orthogonalize.h``, the polynomials of :func:`mm_rec.ops.reference.orthogonalize` are evaluated
on the small side of the matrices. With R = X X^T a step turns X into P X and R into P R P, where P = a I + Z and
Z = b R + c R^2, so that the product Q of all P is applied to X once.

bfloat16 loses the small eigenvalues of R, some of which come out negative, and every step multiplies that error by
a^2: without a new R after every two steps, the result has singular values of any size. float32 needs none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from mm_rec.ops.reference import POLAR_POLYNOMIALS, POLAR_SAFETY

__all__ = ["RESTART", "orthogonalize_stacked_"]

RESTART = 2
"""Steps in bfloat16 after which R is computed anew, every time."""

FEWEST_ROWS = 16
"""Of smaller matrices it is computed anew in each step: an element of a small R is large, and so is its error."""

MOST_ELEMENTS = 2**24
"""Elements of the matrices that are stacked at once."""


def orthogonalize_stacked_(matrices: Sequence[Tensor]) -> None:
    """Replace each matrix by its polar factor, matrices of one shape together; nothing waits for the device."""
    groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
        groups[tuple(wide.shape)].append(wide)
    for (rows, columns), group in groups.items():
        count = max(1, MOST_ELEMENTS // (rows * columns))
        for begin in range(0, len(group), count):
            some = group[begin : begin + count]
            torch._foreach_copy_(some, list(_polar_factors(torch.stack(some)).unbind()))


def _polar_factors(x: Tensor) -> Tensor:
    """Returns the polar factors of a stack (N, n, m) of matrices with n <= m, in their type."""
    wide = x.float()
    tiny = torch.finfo(torch.float32).tiny
    wide = wide / wide.abs().amax((1, 2), keepdim=True).clamp(min=tiny)
    wide = wide / (torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=tiny) * POLAR_SAFETY)
    x = wide.to(x.dtype)
    count = len(POLAR_POLYNOMIALS)
    at_once = count if x.dtype != torch.bfloat16 else 1 if x.shape[1] < FEWEST_ROWS else RESTART
    for first in range(0, count, at_once):
        steps = POLAR_POLYNOMIALS[first : first + at_once]
        x = torch.bmm(_product(torch.bmm(x, x.mT), steps), x)
    return x


def _product(gram: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """Returns Q of all ``steps`` for a stack of matrices X X^T."""
    product: Tensor | None = None
    for index, (a, b, c) in enumerate(steps):
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if product is None:
            product = poly.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, product, poly, beta=a)
        if index + 1 < len(steps):
            once = torch.baddbmm(gram, gram, poly, beta=a)
            gram = torch.baddbmm(once, once, poly, beta=a)
    assert product is not None
    return product
