"""The CUDA back end: the kernels of ``mm_rec/cpp/cuda`` on PyTorch tensors.

Every function has the arguments of the op's schema and enqueues its work on the current stream. Inputs may be
strided as long as rows are evenly spaced; others are copied. Results are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mm_rec.ops.backend import Native, NativeUnavailableError
from mm_rec.ops.cuda import gated_recurrence, loss, memory, mixed_keys, muon, norm, optimizer, sequence
from mm_rec.ops.cuda.fits import fits
from mm_rec.ops.cuda.load_library import cuda_library

__all__ = ["load"]

OLDEST = (8, 0)  # compute capability: bfloat16 matrix units, asynchronous copies


def load() -> Native:
    """Load the library and return its kernels, by op name.

    Raises:
        NativeUnavailableError: the library is missing or broken, or the device is too old for it.
    """
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        raise NativeUnavailableError(
            "this device has compute capability {capability}, the CUDA kernels need {oldest}",
            capability=capability,
            oldest=OLDEST,
        )
    library = cuda_library()
    modules = (sequence, norm, memory, mixed_keys, loss, optimizer, muon, gated_recurrence)
    kernels: dict[str, Callable[..., Any]] = {
        kernel.__name__: kernel for module in modules for kernel in module.KERNELS
    }
    return Native(str(library.path), "sm_{}{}".format(*capability), kernels, fits)
