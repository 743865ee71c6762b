"""Several processes that train one model, on one host or many, as torchrun starts them.

Every process runs the same command. It reads its rows of each micro-batch, a pure function of seed, step and rank; the
optimizer averages the gradients (replicas.py), or FSDP where a process holds only its part of the model (sharding.py);
the first process alone writes the run folder. What is saved doesn't depend on their number: a run goes on with any
number of processes that divides the rows of a micro-batch. Without torchrun all functions here do what suits a single
process.

What processes tell each other besides tensors is JSON, never a pickle, and goes through the CPU (gloo).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from mm_rec.checkpoint import Checkpoint
from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batch
from mm_rec.errors import UserError
from mm_rec.run_folder import RunFolder
from mm_rec.signals import Interrupted, SignalGuard
from mm_rec.tuning import cores

__all__ = [
    "Follower",
    "SharedTensors",
    "agree",
    "check_rows",
    "check_signals",
    "default_threads",
    "first_goes_ahead",
    "gather_rows",
    "is_first",
    "joined",
    "local_size",
    "make_console",
    "mean_",
    "own_batch",
    "own_rows",
    "shared",
    "shared_checkpoint",
    "shared_tensors",
    "size",
]

WAIT = datetime.timedelta(hours=4)
"""How long a process waits for the others, who may prepare data or validate meanwhile."""


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """While the context lasts this process is one of those that torchrun started; without torchrun nothing happens.

    Args:
        device: as in the settings; on GPUs each process of a host takes one of them.

    Raises:
        UserError: if a host has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this host has {torch.cuda.device_count()} GPU(s) and {local_size()} processes; "
                f"use --nproc_per_node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """Number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def make_console() -> Console:
    """A console on which only the first process prints."""
    return Console(quiet=not is_first())


def default_threads() -> int:
    """CPU threads for this process if nobody asked for a number: its part of the cores that it may use."""
    return max(1, cores() // local_size())


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Do something in the first process, then in the others, who find what it has left on the disk."""
    if not is_first():
        agree(0)
    yield
    if is_first():
        agree(0)


def agree(number: int) -> int:
    """The largest of the numbers that the processes come with; each waits for all."""
    if size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def mean_(values: Tensor) -> Tensor:
    """Replace ``values`` by their mean over the processes."""
    if size() > 1 and values.is_cuda:
        dist.all_reduce(values, dist.ReduceOp.AVG)  # which gloo has not
    elif size() > 1:
        dist.all_reduce(values)
        values /= size()
    return values


def shared(value: Any) -> Any:
    """What the first process comes with, as JSON gives it back; what the others come with is not looked at."""
    if size() == 1:
        return value
    text = json.dumps(value).encode() if is_first() else b""
    length = agree(len(text))
    content = torch.frombuffer(bytearray(text or bytes(length)), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return json.loads(content.numpy().tobytes())


class SharedTensors(Mapping[str, Tensor]):
    """The named CPU tensors that the first process comes with, each sent when it is asked for.

    So no other process holds them all. Every process must ask for the same names in the same order.

    Args:
        tensors: those of the first process; None in the others.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None) -> None:
        self._tensors = tensors
        rows = [(name, [*one.shape], str(one.dtype).removeprefix("torch.")) for name, one in (tensors or {}).items()]
        self._layout = {name: (torch.Size(shape), getattr(torch, dtype)) for name, shape, dtype in shared(rows)}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of all tensors, without sending them."""
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


def shared_tensors(tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """The named CPU tensors, or the None, that the first process comes with."""
    if size() == 1:
        return tensors
    return SharedTensors(tensors) if shared(tensors is not None) else None


def shared_checkpoint(found: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint, or the None, that the first process comes with."""
    if size() == 1:
        return found
    head = shared(found and {"path": str(found.path), "config": found.config.to_dict(), "trainer": found.trainer})
    if head is None:
        return None
    weights, optimizer, carried = (
        SharedTensors(getattr(found, name, None)) for name in ("weights", "optimizer", "carried")
    )
    path = Path(head["path"])
    return Checkpoint(path, ModelConfig.from_dict(head["config"]), weights, optimizer, carried, head["trainer"], path)


def check_signals(guard: SignalGuard) -> None:
    """Raise :class:`Interrupted` in all processes if a signal came to any of them; each waits for all."""
    if size() == 1:
        guard.check()
    elif signum := agree(guard.requested or 0):
        raise Interrupted(signum)


def check_rows(batch_size: int) -> None:
    """Refuse micro-batches whose rows the processes cannot share evenly.

    Raises:
        UserError: with the nearest number of rows that they can.
    """
    if batch_size % size():
        raise UserError(
            f"{batch_size} rows of a micro-batch cannot be shared evenly by {size()} processes; "
            f"use --batch_size {max(1, round(batch_size / size())) * size()}, or another number of processes"
        )


def own_rows(x: Tensor) -> Tensor:
    """Of a tensor whose first axis are all rows, those of this process."""
    return x.tensor_split(size())[dist.get_rank()] if size() > 1 else x


def own_batch(batch: Batch) -> Batch:
    """The part of a micro-batch that this process reads: the mean of their losses is the loss of all."""
    if size() == 1:
        return batch
    return replace(
        batch,
        tokens=own_rows(batch.tokens),
        targets=own_rows(batch.targets),
        weight=own_rows(batch.weight) * size(),
        reset=own_rows(batch.reset),
    )


def gather_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all processes, in their order, on the CPU; each comes with the same names and shapes."""
    if size() == 1:
        return dict(tensors)
    gathered = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(size())]
        dist.all_gather(parts, own)
        gathered[name] = torch.cat(parts)
    return gathered


class Follower(RunFolder):
    """Stands, in all processes but the first, where that has the run folder: nothing is read or written."""

    def __init__(self) -> None:
        self.path, self.checkpoints, self.samples = (Path(os.devnull),) * 3
        self.step = 0
        self.config = {}

    def rewind(self) -> None:
        """Nothing: the first process reads."""

    def save(self, step: int, **content: Any) -> Path:
        """Nothing: the first process writes."""
        self.step = step
        return self.path

    def event(self, message: str) -> None:
        """Nothing: the first process writes."""

    def release(self) -> None:
        """Nothing is owned."""

    def _append(self, name: str, line: str) -> None:
        pass
