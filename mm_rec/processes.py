"""The processes that train one model together, on one host or many, as torchrun starts them.

Every process runs the same command and knows its number, its rank. Rank 0 writes the run folder and prints. Each rank
reads its own rows of a micro-batch, which follow from seed, step and rank. Without torchrun there is one process, and
every function here does what suits it.

Besides tensors, processes send each other JSON, never a pickle; both go through the CPU (gloo), gradients on GPUs
through NCCL.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.machine.signals import Interrupted, SignalGuard

__all__ = [
    "BroadcastTensors",
    "all_gather",
    "all_max",
    "all_mean_",
    "broadcast_json",
    "broadcast_tensors",
    "check_rows",
    "check_signals",
    "gather_rows",
    "is_rank_zero",
    "local_world_size",
    "make_console",
    "own_rows",
    "process_group",
    "rank",
    "rank_zero_first",
    "world_size",
]

TIMEOUT = datetime.timedelta(hours=4)
"""How long a process waits for the others, which may be preparing data or validating meanwhile."""


@contextlib.contextmanager
def process_group(device: str, *, lasting: bool = False) -> Iterator[None]:
    """Within the context this process belongs to the group that torchrun started; without torchrun nothing happens.

    Args:
        device: the device as in the settings; on GPUs each process of a host takes one of them.
        lasting: leave the group only when the process ends, so that it can be used again: it cannot be made twice.

    Raises:
        UserError: if a host has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                "this host has {gpus} GPU(s) and {processes} processes; use --nproc_per_node {gpus}, or --device cpu",
                gpus=torch.cuda.device_count(),
                processes=local_world_size(),
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    if lasting:
        atexit.register(dist.destroy_process_group)
        yield
        return
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_world_size() -> int:
    """Returns the number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Returns whether this is the process that writes files and prints for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def make_console() -> Console:
    """Returns a console on which rank 0 alone prints; what the output has no signs for is escaped, not an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(quiet=not is_rank_zero())


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """The body runs on rank 0 first; the others run it afterwards and find what rank 0 left on the disk."""
    if not is_rank_zero():
        all_max(0)
    yield
    if is_rank_zero():
        all_max(0)


def all_max(number: int) -> int:
    """Returns the largest of the numbers that the processes pass; each process waits for all."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def all_mean_(values: Tensor) -> Tensor:
    """Replace ``values`` by their mean over the processes."""
    if world_size() > 1 and values.is_cuda:
        dist.all_reduce(values, dist.ReduceOp.AVG)
    elif world_size() > 1:
        dist.all_reduce(values)  # gloo, which serves the CPU, has no mean
        values /= world_size()
    return values


def all_gather(own: Tensor) -> list[Tensor]:
    """Returns the tensors that the processes pass, in the order of their ranks; all are of one shape and type."""
    if world_size() == 1:
        return [own]
    parts = [torch.empty_like(own) for _ in range(world_size())]
    # As bytes, since not every back end knows every type.
    dist.all_gather([part.view(torch.uint8) for part in parts], own.view(torch.uint8))
    return parts


def broadcast_json(value: Any) -> Any:
    """Returns the value that rank 0 passes, as it comes back from JSON; what other ranks pass is ignored."""
    if world_size() == 1:
        return value
    text = json.dumps(value).encode() if is_rank_zero() else b""
    length = all_max(len(text))
    content = torch.frombuffer(bytearray(text or bytes(length)), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return json.loads(content.numpy().tobytes())


class BroadcastTensors(Mapping[str, Tensor]):
    """Named CPU tensors of rank 0, each of which is sent when it is looked up, so that no other rank holds them all.

    Every rank must look up the same names in the same order.

    Args:
        tensors: the tensors on rank 0; None on the others.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None) -> None:
        self._tensors = tensors
        rows = [(name, [*one.shape], str(one.dtype).removeprefix("torch.")) for name, one in (tensors or {}).items()]
        layout = broadcast_json(rows)
        self._layout = {name: (torch.Size(shape), getattr(torch, dtype)) for name, shape, dtype in layout}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of all tensors, known without sending them."""
        return {name: shape for name, (shape, _) in self._layout.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._layout[name]
        known = torch.empty(shape, dtype=dtype) if self._tensors is None else self._tensors[name].contiguous()
        dist.broadcast(known.view(-1).view(torch.uint8), 0)
        return known

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def broadcast_tensors(tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """Returns the named CPU tensors, or the None, that rank 0 passes."""
    if world_size() == 1:
        return tensors
    return BroadcastTensors(tensors) if broadcast_json(tensors is not None) else None


def check_signals(guard: SignalGuard) -> None:
    """Raise :class:`Interrupted` in all processes if a signal came to any of them; each waits for all."""
    if world_size() == 1:
        guard.check()
    elif signum := all_max(guard.requested or 0):
        raise Interrupted(signum)


def check_rows(batch_size: int) -> None:
    """Refuse micro-batches whose rows the processes cannot share evenly.

    Raises:
        UserError: with the nearest number of rows that they can share.
    """
    if batch_size % (count := world_size()):
        raise UserError(
            "{batch_size} rows of a micro-batch cannot be shared evenly by {count} processes; "
            "use --batch_size {rows}, or another number of processes",
            batch_size=batch_size,
            count=count,
            rows=max(1, round(batch_size / count)) * count,
        )


def own_rows(x: Tensor) -> Tensor:
    """Returns the rows (first axis) of ``x`` that belong to this process."""
    return x.tensor_split(world_size())[dist.get_rank()] if world_size() > 1 else x


def gather_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the rows of all processes, in the order of their ranks, on the CPU.

    Every process passes the same names and shapes.
    """
    if world_size() == 1:
        return dict(tensors)
    gathered = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
        gathered[name] = torch.cat(parts)
    return gathered
