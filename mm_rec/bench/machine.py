"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from mm_rec import __version__, ops
from mm_rec.system import cores, processor_name

__all__ = ["describe_machine"]

LIMITS = ("MM_REC_CPU_LEVEL", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
"""Environment variables that hold libraries back to older instructions."""


def describe_machine() -> dict[str, object]:
    """Processor or GPU, cores and features, versions, and the limits set in the environment: for JSON."""
    device = torch.get_default_device().type
    features = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    versions = {"mm_rec": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers",):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "cores": cores(),
        "features": features,
        "kernels": ops.status()[device].level or ops.status()[device].reason,
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "versions": versions,
    }
