"""Compresses the matrices of a model for inference: to 12 bits a weight, without loss, or to int8."""

from __future__ import annotations

import torch

from mm_rec import ops
from mm_rec.config import FLOAT32_MATRICES
from mm_rec.inference.decode import compressed_matrices, use_compressed
from mm_rec.model import MMRecModel
from mm_rec.ops.inference import PACKED_LEVELS, Int8Matrix, pack_weights, quantize_rows

__all__ = ["pack_matrices", "quantize_int8"]

KEEP_WHOLE = (*FLOAT32_MATRICES, "gate")
"""Matrices that are not rounded: those that act on float32 states, and the fusion's gate, which has a few rows."""


@torch.no_grad()
def pack_matrices(model: MMRecModel) -> None:
    """Puts a copy in 12 bits a weight beside the bfloat16 matrices of ``model``, for inference.

    Single tokens on the CPU are then computed from a quarter fewer bytes, with the same results, bit for bit. What is
    not bfloat16, on the CPU and better packed stays as it is, and so does everything where the processor would be
    slower for it. The copies take three quarters of the bytes of their matrices. A matrix that is replaced, trained or
    changed in place later is read unpacked, unless it is changed through ``.data``, which PyTorch does not count.
    """
    if ops.status()["cpu"].level not in PACKED_LEVELS:
        return
    rounded = {name: m for name, m in compressed_matrices(model).items() if isinstance(m, Int8Matrix)}
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and name not in rounded}
    use_compressed(model, {**rounded, **pack_weights(matrices)})


@torch.no_grad()
def quantize_int8(model: MMRecModel) -> None:
    """Rounds the matrices of ``model`` to int8 with a factor for each row, for inference.

    Single tokens on the CPU are then computed with the int8 matrices (and activations as they were). Everything
    else, such as reading a prompt or scoring text, uses the same rounded values in the type of the parameters; for
    bfloat16 that rounds once more, by less than its own products do. The model can't be trained on.
    """
    rounded = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim >= 2 and name.rpartition(".")[2] not in KEEP_WHOLE:
            matrix = quantize_rows(parameter)
            parameter.data = matrix.dequantize().to(parameter.dtype)
            rounded[name] = matrix
    use_compressed(model, rounded)
