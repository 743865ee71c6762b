"""Draws a token from each row of logits in one native call, of ``mm_rec/cpp/src/sample.h``."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from mm_rec.ops import backend

__all__ = ["SampleRow", "sample"]

_kept = threading.local()  # per thread: the scratch of the last call


class SampleRow(ctypes.Structure):
    """How to draw from one row, with the fields of ``SampleRow`` in ``sample.h``."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("number", "top_p", "min_p")),
        *((name, ctypes.c_float) for name in ("repetition_penalty", "temperature")),
        *(("top_k", ctypes.c_int64), ("seen", ctypes.c_void_p), ("n_seen", ctypes.c_int64)),
        *(("barred", ctypes.c_void_p), ("n_barred", ctypes.c_int64)),
    )


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Draw a token from each row.

    Args:
        logits: (B, V) float32 on the CPU; not changed.
        rows: B ways to draw.

    Raises:
        NativeUnavailableError: there is no native library.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    columns, threads = logits.shape[1], torch.get_num_threads()
    size = backend.kernel("sample_scratch", "cpu")(columns, threads)
    scratch = getattr(_kept, "scratch", None)
    if scratch is None or len(scratch) < size:
        scratch = _kept.scratch = torch.empty(size)
    pointers = (ctypes.c_void_p * len(rows))(*map(ctypes.addressof, rows))
    tokens = (ctypes.c_int64 * len(rows))()
    backend.kernel("sample", "cpu")(
        len(rows), columns, logits.data_ptr(), logits.stride(0), pointers, tokens, scratch.data_ptr(), threads
    )
    return list(tokens)
