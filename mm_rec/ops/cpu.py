"""The CPU back end: the kernels of ``mm_rec/cpp/src`` on PyTorch tensors."""

from __future__ import annotations

from mm_rec.ops.backend import Native, NativeUnavailableError

__all__ = ["load"]


def load() -> Native:
    """Load the library and return its kernels, by op name.

    Raises:
        NativeUnavailableError: the library is missing or broken.
    """
    raise NativeUnavailableError("not built")
