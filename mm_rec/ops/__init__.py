"""Every op of MM-Rec, and the only door to them."""

from mm_rec.ops.reference import (
    add_rms_norm,
    linear_cross_entropy,
    mdi,
    memory_read,
    memory_update,
    readout,
    recurrence,
    relu_squared,
    rms_norm,
    scan,
)

__all__ = [
    "add_rms_norm",
    "linear_cross_entropy",
    "mdi",
    "memory_read",
    "memory_update",
    "readout",
    "recurrence",
    "relu_squared",
    "rms_norm",
    "scan",
]
