"""The head and its loss, by chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, empty_like
from mm_rec.ops.cuda.load_library import cuda_library

__all__ = ["KERNELS"]

LOGITS_BYTES = 1 << 30  # the memory of the chunk of logits that exists at a time


def linear_cross_entropy(
    y: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weight: Tensor,
    needs_dy: bool,
    needs_dembedding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, embedding, targets, weight = all_dense(y, embedding, targets, weight)
    rows, vocabulary = y.shape[0], embedding.shape[0]
    gradient = needs_dy or needs_dembedding
    nll = empty_like(weight)
    dy = empty_like(y) if needs_dy else common.empty(y, 0)
    dembedding = empty_like(embedding) if needs_dembedding else common.empty(embedding, 0)
    total: Tensor | None = None  # dembedding of several chunks, in float32
    # A loss alone (evaluation) is worth float32 logits; training rounds them like any activation.
    logits_dtype = y.dtype if gradient else torch.float32
    chunk = max(1, LOGITS_BYTES // (vocabulary * logits_dtype.itemsize))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        logits = _product(y[part], embedding.t(), logits_dtype)
        cuda_library().call(
            "softmax_gradient", y, logits, TYPE_CODES[logits_dtype], targets[part], weight[part], nll[part],
            *logits.shape, gradient,
        )  # fmt: skip
        if needs_dy:
            torch.mm(logits, embedding, out=dy[part])
        if needs_dembedding and chunk >= rows:
            torch.mm(logits.t(), y, out=dembedding)
        elif needs_dembedding:
            product = _product(logits.t(), y[part], torch.float32)
            total = product if total is None else total.add_(product)
    if total is not None:
        dembedding.copy_(total)
    return torch.dot(nll, weight), nll, dy, dembedding


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the matrix product in ``dtype``, which may differ from the operands'; both ways sum in float32."""
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


KERNELS = (linear_cross_entropy,)
