"""Where and how a model runs: device, precision, threads, and the memory that is left."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor, nn

from mm_rec import system
from mm_rec.config import FLOAT32_MATRICES
from mm_rec.errors import UserError
from mm_rec.machine.autotune import threads_are_given, tune
from mm_rec.system import cores

__all__ = [
    "PRECISIONS",
    "apply_precision",
    "available_memory",
    "changes_precision",
    "check_threads",
    "default_threads",
    "has_fast_bf16",
    "select_device",
    "select_precision",
    "set_threads",
]

PRECISIONS = ("bf16", "fp32")

FEW_THREADS, THREADS_A_CORE = 64, 4
"""Threads that any machine runs, and those for each of its cores: no more than the larger of both make sense."""


def select_device(requested: str = "auto") -> torch.device:
    """The device to run on: ``auto`` takes CUDA if it is there, else the CPU.

    Raises:
        UserError: if the device asked for is not there.
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "cpu":
        return torch.device("cpu")
    if requested.split(":")[0] != "cuda":
        raise UserError("unknown device {requested!r}; use --device cpu, cuda or auto", requested=requested)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device is usable here; use --device cpu, or install a CUDA build of PyTorch")
    device = torch.device(requested)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(
            "there is no {requested}: this machine has {count} CUDA device(s)",
            requested=requested,
            count=torch.cuda.device_count(),
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: AVX512-BF16 or AMX, and any CUDA device."""
    if device.type == "cuda":
        return True
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def select_precision(requested: str, device: torch.device) -> str:
    """``bf16`` or ``fp32``; ``auto`` takes bf16 where the device has it and, on the CPU, is measured to be faster."""
    if requested == "auto":
        return "bf16" if has_fast_bf16(device) and (device.type != "cpu" or tune(True).bf16) else "fp32"
    if requested not in PRECISIONS:
        raise UserError("unknown precision {requested!r}; use --precision auto, bf16 or fp32", requested=requested)
    return requested


def set_threads(requested: int | None) -> int:
    """Use ``requested`` threads; None takes what the user has set for PyTorch, else as many as are measured to pay."""
    if requested is None and not threads_are_given():
        requested = tune(has_fast_bf16(torch.device("cpu"))).threads
    threads = torch.get_num_threads() if requested is None else requested
    check_threads(threads)
    if requested is not None:
        torch.set_num_threads(requested)
    return threads


def check_threads(threads: int | None) -> None:
    """Refuse more threads than this machine runs; raises UserError. None, for as many as pay, is never too many."""
    most = max(FEW_THREADS, THREADS_A_CORE * cores())
    if threads is not None and threads > most:  # the libraries crash where the system gives them no more
        raise UserError(
            "{threads} threads are too many for the {cores} cores here; use {most} at most",
            threads=threads,
            cores=cores(),
            most=most,
        )


def default_threads(processes: int) -> int:
    """Returns the CPU threads of one of several processes on this host: its share of the cores that it may use."""
    return max(1, cores() // processes)


def apply_precision(model: nn.Module, precision: str) -> None:
    """Convert the matrices of ``model`` to bfloat16, or leave all in float32.

    Biases, the recurrent gate and the weights that mix keys stay float32: they are
    small and act on float32 states. The optimizer keeps float32 masters of what is converted here.
    """
    if precision == "fp32":
        return
    for name, parameter in model.named_parameters():
        if changes_precision(name, parameter):
            parameter.data = parameter.data.to(torch.bfloat16)


def changes_precision(name: str, parameter: Tensor) -> bool:
    """Whether :func:`apply_precision` would convert a parameter, by its full name."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in FLOAT32_MATRICES


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still take on ``device``.

    On the CPU that is the least of what the machine has free (MemAvailable), what the control group leaves
    and what the address-space limit (``ulimit -v``) leaves.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [psutil.virtual_memory().available]
    addresses = system.address_space_left()
    if addresses is not None:
        limits.append(addresses)
    limits.extend(system.control_group_room())
    return max(0, min(limits))
