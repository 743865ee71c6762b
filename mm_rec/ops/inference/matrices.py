"""Matrices in fewer bits, which a step reads in less time: 12 bits a weight without loss, or eight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mm_rec import system
from mm_rec.cpp.build import LEVELS
from mm_rec.ops import backend

__all__ = ["PACKED_LEVELS", "Int8Matrix", "PackedMatrix", "Weight", "pack_weights", "quantize_rows", "shape_of"]

PACKED_LEVELS = LEVELS[LEVELS.index("avx512") :]
"""Levels of the kernels at which a matrix is unpacked faster than it is read."""

_PACKED_CHUNK, _PACKED_UNIT = 128, 16  # weights of a chunk, rows of a unit; as in step_packed.h
_LARGE_PAGE = 2**21
_WORTH_PACKING = 0.9  # a packed matrix takes at most this share of the bytes of the plain one


class Int8Matrix(NamedTuple):
    """A matrix with eight bits a weight.

    Attributes:
        data: (rows, columns) int8 in [-127, 127].
        scale: (rows,) float32; row r stands for scale[r] * data[r].
    """

    data: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Returns the matrix (rows, columns) in float32."""
        return self.data.float() * self.scale[:, None]


def quantize_rows(weight: Tensor) -> Int8Matrix:
    """Round each row of ``weight`` (rows, columns) to 127 steps to either side of zero."""
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=1) / 127
    steps = wide / torch.where(scale > 0, scale, 1.0)[:, None]
    return Int8Matrix(steps.round().clamp(-127, 127).to(torch.int8).contiguous(), scale)


@dataclass(frozen=True)
class PackedMatrix:
    """A bfloat16 matrix beside a copy of it in 12 bits a weight, which loses nothing and is faster to read.

    Attributes:
        plain: (rows, columns) bfloat16, the matrix itself.
        data: uint8, the packed rows.
        base: (rows, columns / 128) uint8, the least exponent of each chunk of a row, or 255: the chunk is not packed.
        start: (rows / 16) int32, where each 16 rows begin in ``data``, in units of 64 bytes.
        version: PyTorch's count of the changes of ``plain`` in place.
    """

    plain: Tensor
    data: Tensor
    base: Tensor
    start: Tensor
    version: int

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the matrix that was packed, and as it was then."""
        return weight.data_ptr() == self.plain.data_ptr() and weight._version == self.version


def pack_weights(weights: Mapping[str, Tensor]) -> dict[str, PackedMatrix]:
    """Pack the matrices (rows, columns) of ``weights`` that are bfloat16, on the CPU, and smaller when packed.

    Tensors made in inference mode are left out, since PyTorch does not count their changes.

    Raises:
        NativeUnavailableError: there is no native library.
    """
    layouts = {}
    for name, weight in weights.items():
        if not (weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()):
            continue
        if not weight.is_inference():
            base, start, size = _layout(weight := weight.detach())
            if size <= _WORTH_PACKING * weight.nbytes:
                layouts[name] = weight, base, start, size
    if not layouts:
        return {}
    memory = _in_large_pages(sum(size for *_, size in layouts.values()))
    packed, offset = {}, 0
    for name, (weight, base, start, size) in layouts.items():
        data = memory[offset : offset + size]
        offset += size
        pointers = [tensor.data_ptr() for tensor in (weight, base, start, data)]
        backend.kernel("pack", "cpu")(*weight.shape, *pointers, torch.get_num_threads())
        packed[name] = PackedMatrix(weight, data, base, start, weight._version)
    return packed


def _layout(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Returns ``base`` and ``start`` of a packed matrix, and the size of its data in bytes."""
    rows, columns = weight.shape
    base = torch.empty(rows, columns // _PACKED_CHUNK, dtype=torch.uint8)
    start = torch.empty(-(-rows // _PACKED_UNIT), dtype=torch.int32)
    pointers = weight.data_ptr(), base.data_ptr(), start.data_ptr()
    return base, start, backend.kernel("pack_layout", "cpu")(rows, columns, *pointers, torch.get_num_threads())


def _in_large_pages(size: int) -> Tensor:
    """Returns memory (size,) uint8, in pages of 2 MB if the system has them, which are read faster."""
    buffer = torch.frombuffer(system.anonymous_memory(size + 2 * _LARGE_PAGE), dtype=torch.uint8)
    begin = -buffer.data_ptr() % _LARGE_PAGE
    return buffer[begin : begin + size]


Weight = Tensor | Int8Matrix | PackedMatrix


def shape_of(weight: Weight) -> torch.Size:
    """Returns the rows and columns of a weight in any of these forms."""
    if isinstance(weight, PackedMatrix):
        return weight.plain.shape
    return weight.data.shape if isinstance(weight, Int8Matrix) else weight.shape
