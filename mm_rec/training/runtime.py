"""How this machine runs a training: precision, threads, kernels, and how several processes share the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mm_rec import ops, processes
from mm_rec.config import ModelConfig
from mm_rec.machine.device import available_memory, default_threads, select_precision, set_threads
from mm_rec.training.estimate import (
    count_orthogonalized,
    count_parameters,
    sharded_bytes,
    training_bytes,
    with_margin,
)
from mm_rec.training.plan import Plan
from mm_rec.training.settings import TrainSettings

__all__ = ["Runtime", "agree_on_runtime", "choose_runtime", "memory_of_process", "model_and_optimizer_bytes"]


@dataclass(frozen=True)
class Runtime:
    """What decides how results are rounded; every checkpoint keeps it.

    Attributes:
        precision: the type of the matrices, ``bf16`` or ``fp32``.
        threads: CPU threads of a process.
        ops: the kernels, as in ``native avx512bf16``.
        processes: the number of processes.
        parallel: what each of several processes holds, ``ddp`` (the whole model) or ``fsdp`` (a part); None for one
            process, ``auto`` until :func:`agree_on_runtime` has chosen.
    """

    precision: str
    threads: int
    ops: str
    processes: int = 1
    parallel: str | None = None

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.parallel == "fsdp"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``trainer.json`` keeps them; one process leaves out the last two."""
        values = {"precision": self.precision, "threads": self.threads, "ops": self.ops}
        return values | ({} if self.parallel is None else {"processes": self.processes, "parallel": self.parallel})


def choose_runtime(settings: TrainSettings, device: torch.device, before: Mapping[str, Any]) -> Runtime:
    """Returns what the settings ask for, else what the run had, else what suits this machine; sets PyTorch's threads.

    Args:
        settings: the settings of the stage.
        device: the device to train on.
        before: :meth:`Runtime.to_dict` of the run's last checkpoint; empty for a new run.
    """
    precision = before.get("precision", "auto") if settings.precision == "auto" else settings.precision
    threads = settings.threads
    if threads is None and before.get("processes", 1) == processes.world_size():
        threads = before.get("threads")
    if threads is None and processes.world_size() > 1:
        threads = default_threads(processes.local_world_size())  # torchrun would set one thread on any machine
    parallel = before.get("parallel", "auto") if settings.parallel == "auto" else settings.parallel
    return Runtime(
        select_precision(precision, device),
        set_threads(threads),
        _describe_ops(device),
        processes.world_size(),
        None if processes.world_size() == 1 else parallel,
    )


def agree_on_runtime(
    runtime: Runtime, settings: TrainSettings, plan: Plan, config: ModelConfig, available: int
) -> Runtime:
    """Returns the runtime on which all processes agree: the precision of rank 0, and FSDP if it has to be.

    With ``--parallel auto`` that is FSDP if the run had it, or if the whole model does not fit into the ``available``
    memory of some process.
    """
    runtime = replace(runtime, precision=processes.broadcast_json(runtime.precision))
    if processes.world_size() == 1:
        return runtime
    whole = replace(runtime, parallel="ddp")
    too_large = with_margin(model_and_optimizer_bytes(config, whole, plan), 0) > available
    some_too_large = bool(processes.all_max(int(too_large)))
    if settings.parallel == "auto":
        return replace(runtime, parallel="fsdp" if some_too_large or runtime.sharded else "ddp")
    return runtime


def model_and_optimizer_bytes(config: ModelConfig, runtime: Runtime, plan: Plan) -> int:
    """Returns the bytes that weights, gradients and the optimizer's state take in one process."""
    if runtime.sharded:
        return sharded_bytes(config, runtime.precision, runtime.processes, muon=plan.muon is not None)
    return training_bytes(
        count_parameters(config),
        runtime.precision,
        orthogonalized=count_orthogonalized(config) if plan.muon else 0,
        replicated=runtime.processes > 1,
        lora=plan.lora_rank is not None,
    )


def memory_of_process(device: torch.device) -> int:
    """Returns the free bytes that this process may take: on the CPU, its share of what its host has."""
    return available_memory(device) // (processes.local_world_size() if device.type == "cpu" else 1)


def _describe_ops(device: torch.device) -> str:
    status = ops.status()[device.type]
    return f"{status.backend} {status.level}" if status.level else status.backend
