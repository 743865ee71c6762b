"""The ops that models are trained with; what generation needs beside them is :mod:`mm_rec.ops.inference`.

Code outside of this package imports from these two modules only. An op is defined by :mod:`mm_rec.ops.reference`,
checked and dispatched in the module that carries its name, and computed by the native kernels of
:mod:`mm_rec.ops.cpu` and :mod:`mm_rec.ops.cuda` where they are built. float64 inputs, a missing library,
``use_backend("reference")`` and ``MM_REC_BACKEND=reference`` take the reference.
"""

from mm_rec.ops import cpu, cuda, reference
from mm_rec.ops.backend import (
    DeviceStatus,
    NativeUnavailableError,
    Status,
    keeps_backend,
    register,
    status,
    use_backend,
)
from mm_rec.ops.branches import feed_forward, linear_branch
from mm_rec.ops.gated_recurrence import gated_recurrence
from mm_rec.ops.linear import linear, matmul
from mm_rec.ops.loss import linear_cross_entropy
from mm_rec.ops.mdi import mdi
from mm_rec.ops.memory_attention import memory_attention, retain
from mm_rec.ops.memory_context import memory_context
from mm_rec.ops.mixed_keys import mixed_keys
from mm_rec.ops.muon import MuonUpdate, muon_, muon_scale, orthogonalize_, orthogonalize_work
from mm_rec.ops.norm import add_rms_norm, readout, relu_squared, rms_norm
from mm_rec.ops.optimizer import Update, Updates, adamw_, sum_of_squares
from mm_rec.ops.recurrence import recurrence
from mm_rec.ops.reference import rotate
from mm_rec.ops.scan import scan

__all__ = [
    "DeviceStatus",
    "MuonUpdate",
    "NativeUnavailableError",
    "Status",
    "Update",
    "Updates",
    "adamw_",
    "add_rms_norm",
    "feed_forward",
    "gated_recurrence",
    "keeps_backend",
    "linear",
    "linear_branch",
    "linear_cross_entropy",
    "matmul",
    "mdi",
    "memory_attention",
    "memory_context",
    "mixed_keys",
    "muon_",
    "muon_scale",
    "orthogonalize_",
    "orthogonalize_work",
    "readout",
    "recurrence",
    "reference",
    "relu_squared",
    "retain",
    "rms_norm",
    "rotate",
    "scan",
    "status",
    "sum_of_squares",
    "use_backend",
]

# Back ends import ops.backend, so it learns of them here. Each is loaded at the first op on its device, not now.
register("cpu", cpu.load)
register("cuda", cuda.load)
