"""The head and its loss, by chunks of rows."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from mm_rec.ops.cpu import common, matmul
from mm_rec.ops.cpu.common import TYPE_CODES, check

__all__ = ["KERNELS"]

LOGIT_BYTES = 68_000_000  # the most memory that the logits of a chunk of rows take
_kept = threading.local()  # per thread: the buffer of the last logits; fresh pages for it cost as much as its softmax


def _logits_buffer(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    kept: Tensor | None = getattr(_kept, "logits", None)
    if kept is None or kept.dtype != dtype or kept.numel() < rows * vocabulary:
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
            kept = _kept.logits = common.empty((rows * vocabulary,), dtype)
    return kept[: rows * vocabulary].view(rows, vocabulary)


def linear_cross_entropy(
    y: Tensor, embedding: Tensor, targets: Tensor, weight: Tensor, needs_dy: bool, needs_dembedding: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = len(y)
    vocabulary = embedding.shape[0]
    low, high = targets.aminmax()
    if low < 0 or high >= vocabulary:
        raise IndexError(f"targets must be in [0, {vocabulary}), got {int(low)} to {int(high)}")
    kept = weight.nonzero().squeeze(1)
    if len(kept) < rows:
        return _selected_rows_cross_entropy(y, embedding, targets, weight, kept, needs_dy, needs_dembedding)

    targets, weight, dtype = targets.contiguous(), weight.contiguous(), y.dtype
    chunks = -(-rows * vocabulary * y.element_size() // LOGIT_BYTES)
    chunk = -(-rows // chunks)
    logits = _logits_buffer(chunk, vocabulary, dtype)
    nll = common.empty((rows,))
    dy = common.empty(y.shape if needs_dy else (0,), dtype)
    dembedding = common.empty(embedding.shape if needs_dembedding else (0,), dtype)
    total = (
        torch.zeros_like(dembedding, dtype=torch.float32) if chunks > 1 else None
    )  # bfloat16 would round every chunk
    for begin in range(0, rows, chunk):
        part = slice(begin, min(rows, begin + chunk))
        out = logits[: part.stop - begin]
        matmul.mm(y[part], embedding.t(), out)
        result = common.call.cross_entropy(
            TYPE_CODES[dtype], len(out), vocabulary, out.data_ptr(), targets[part].data_ptr(),
            weight[part].data_ptr(), nll[part].data_ptr(), needs_dy or needs_dembedding, torch.get_num_threads(),
        )  # fmt: skip
        check(result)
        if needs_dy:
            matmul.mm(out, embedding, dy[part])
        if needs_dembedding:
            if total is None:
                matmul.mm(out.t(), y[part], dembedding)
            else:
                matmul.add_mm(total, out.t(), y[part], dembedding)
    if total is not None:
        dembedding.copy_(total)
    return torch.dot(weight, nll), nll, dy, dembedding


def _selected_rows_cross_entropy(
    y: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weight: Tensor,
    kept: Tensor,
    needs_dy: bool,
    needs_dembedding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss where some weights are 0, from the other rows alone."""
    nll, dy = torch.zeros_like(weight), torch.zeros_like(y) if needs_dy else common.empty((0,), y.dtype)
    if not len(kept):
        dembedding = torch.zeros_like(embedding) if needs_dembedding else common.empty((0,), y.dtype)
        return nll.sum(), nll, dy, dembedding
    loss, kept_nll, kept_dy, dembedding = linear_cross_entropy(
        y[kept], embedding, targets[kept], weight[kept], needs_dy, needs_dembedding
    )
    nll[kept] = kept_nll
    if needs_dy:
        dy[kept] = kept_dy
    return loss, nll, dy, dembedding


KERNELS = (linear_cross_entropy,)
