"""The CPU back end: the kernels of ``mm_rec/cpp/src`` on PyTorch tensors.

Every function has the arguments of the op's schema. Inputs may be strided as long as rows are evenly spaced,
which slices of a wide product are; others are copied. Results are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mm_rec.cpp.build import LEVELS
from mm_rec.ops.backend import Native
from mm_rec.ops.cpu import (
    branches,
    common,
    loss,
    matmul,
    memory_attention,
    mixed_keys,
    muon,
    norm,
    optimizer,
    sequence,
)  # fmt: skip
from mm_rec.ops.cpu.load_library import CpuLibrary

__all__ = ["load"]

RAW = ("step", "step_scratch", "pack_layout", "pack", "sample", "sample_scratch")  # for mm_rec.ops.inference
OWN_PRODUCTS = LEVELS[LEVELS.index("avx512bf16") :]  # levels that multiply pairs of bfloat16


def load() -> Native:
    """Load the library and return its kernels, by op name.

    Raises:
        NativeUnavailableError: the library cannot be used.
    """
    library = CpuLibrary()
    common.call = call = library.call
    modules = (sequence, norm, memory_attention, mixed_keys, loss, optimizer, muon, branches)
    kernels: dict[str, Callable[..., Any]] = {
        kernel.__name__: kernel for module in modules for kernel in module.KERNELS
    }
    if library.level in OWN_PRODUCTS:
        tiles = library.level == "amx"
        matmul.use(call.tile_product if tiles else call.vector_product)
        muon.use(call.tile_orthogonalize if tiles else call.vector_orthogonalize)
        kernels |= {"mm": matmul.mm, "linear": branches.linear}
    else:  # an earlier load may have been at another level
        matmul.use(None)
        muon.use(None)
    raw = {name: getattr(call, name) for name in RAW}
    return Native(str(library.path), library.level, kernels | raw)
