"""Keys of a memory block, made of the own keys of several tokens."""

from __future__ import annotations

from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, empty_like, workspace_of
from mm_rec.ops.cuda.load_library import cuda_library

__all__ = ["KERNELS", "mixed_keys", "mixed_keys_backward"]


def mixed_keys(k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    """Returns the keys, (B, T, H, d)."""
    k, taps, position = all_dense(k, taps, position)
    batch, time, heads, dim, window = _sizes(k, position)
    key = common.empty(k, batch, time, heads, dim)
    cuda_library().call(
        "mixed_keys_forward", k, k, TYPE_CODES[k.dtype], taps, position, key, batch, time, heads, dim, window,
        taps.shape[2],
    )  # fmt: skip
    return key


def mixed_keys_backward(dkey: Tensor, k: Tensor, taps: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of k and taps."""
    dkey, k, taps, position = all_dense(dkey, k, taps, position)
    sizes = (*_sizes(k, position), taps.shape[2])
    dk, dtaps = empty_like(k, taps)
    workspace = workspace_of("mixed_keys", k, *sizes)
    cuda_library().call(
        "mixed_keys_backward", k, dkey, k, TYPE_CODES[k.dtype], taps, position, dk, dtaps, workspace, *sizes
    )
    return dk, dtaps


def _sizes(k: Tensor, position: Tensor) -> tuple[int, int, int, int, int]:
    """Returns B, T, H, d and W of the keys of a context; the kernels are written for d up to 256."""
    batch, time = position.shape
    if k.shape[3] > 256:
        raise ValueError(f"the CUDA kernels take heads of up to 256, got {k.shape[3]}")
    return batch, time, k.shape[2], k.shape[3], k.shape[1] - time


KERNELS = (mixed_keys, mixed_keys_backward)
