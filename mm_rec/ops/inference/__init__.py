"""The ops of generation: one native call for a token of each sequence through a whole model, and one for their draws.

They run on the CPU alone, without gradients, and have no reference here: the forward pass of a model defines a step,
and :mod:`mm_rec.inference.sampling` a draw. ``runs_native("step", weight)`` and ``runs_native("sample", logits)`` say
whether they can run.
"""

from mm_rec.ops.backend import runs_native
from mm_rec.ops.inference.draw import SampleRow, sample
from mm_rec.ops.inference.matrices import (
    PACKED_LEVELS,
    Int8Matrix,
    PackedMatrix,
    Weight,
    pack_weights,
    quantize_rows,
)
from mm_rec.ops.inference.step import VECTORS, StepPlan, StepShape

__all__ = [
    "PACKED_LEVELS",
    "VECTORS",
    "Int8Matrix",
    "PackedMatrix",
    "SampleRow",
    "StepPlan",
    "StepShape",
    "Weight",
    "pack_weights",
    "quantize_rows",
    "runs_native",
    "sample",
]
