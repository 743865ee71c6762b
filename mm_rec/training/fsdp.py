"""FSDP2: several processes of which each holds a part of the model, for models that don't fit on one device.

Every block, and the embedding with the fusion, is put together from the parts just before it runs and taken apart after
it; inside a block the weights are plain tensors, so all ops run as ever. Sharded are the matrices, and with them their
masters, moments and gradients: all that is large. The few thousand values that stay float32 whatever the precision
(biases, W_g, addresses) are held whole by every process, since the tensors of one FSDP unit must be of one type.

What is saved is the checkpoint of any other run: the first process gathers it tensor by tensor, so a run goes on with
any number of processes, sharded or not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mm_rec import ops, processes
from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.config import ModelConfig
from mm_rec.machine.device import apply_precision, changes_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW, ParameterSlot

__all__ = ["ShardedAdamW", "same_logits", "sharded_model"]


def sharded_model(config: ModelConfig, precision: str, device: torch.device) -> MMRecModel:
    """A model of which this process holds its part, on ``device``, with values yet to be set by its optimizer.

    No process ever holds the whole of it.
    """
    with torch.device("meta"):
        model = MMRecModel(config)
    apply_precision(model, precision)
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    whole = {parameter for name, parameter in model.named_parameters() if not changes_precision(name, parameter)}
    for block in [module for module in model.modules() if isinstance(module, MMRecBlock)]:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    # By itself FSDP would leave the embedding whole after a forward pass, and then the parameters of the model would
    # not be those of the optimizer until the next backward pass.
    fully_shard(model, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    model.to_empty(device=device)
    # The memory for whole tensors is made at their first use, and would be of no use to autograd if that were in an
    # evaluation (inference mode).
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
    # States are views of a block's results and are never changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return model


class ShardedAdamW(AdamW):
    """AdamW over the parts of the parameters that this process holds; all its methods wait for all processes.

    Args and methods are those of :class:`AdamW`. Masters, moments and sums of gradients are parts as well.
    :meth:`state_tensors` and :meth:`master_tensors` give whole tensors on the CPU, to the first process alone; the
    other processes get empty ones.
    """

    def accumulate(self) -> None:
        """As in :class:`AdamW`, after averaging the gradients of what is not sharded: FSDP does that for the rest."""
        gradients = [
            slot.parameter.grad for slot in self._slots if not _is_sharded(slot) and slot.parameter.grad is not None
        ]
        if gradients:
            mean = processes.all_mean_(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, mean.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        super().accumulate()

    def _total_norm(self, slots: list[ParameterSlot]) -> Tensor:
        """Of all parts together; what every process holds counts once."""
        squares = [torch.zeros((), dtype=torch.float64, device=slots[0].master.device) for _ in range(2)]
        for index, sharded in enumerate((True, False)):
            if some := [slot for slot in slots if _is_sharded(slot) is sharded]:
                squares[index] = super()._total_norm(some).double().square()
        dist.all_reduce(squares[0])
        return (squares[0] + squares[1]).sqrt().float()

    def _orthogonalize(self, slots: list[ParameterSlot], matrices: list[Tensor]) -> None:
        """As in :class:`AdamW`: of as many matrices as there are processes, each gathers all and makes one."""
        count, rank = processes.world_size(), processes.rank()
        for begin in range(0, len(slots), count):
            some = slots[begin : begin + count]
            parts = matrices[begin : begin + count]
            wholes = [_like(slot.parameter, part).full_tensor() for slot, part in zip(some, parts, strict=True)]
            ops.orthogonalize_(wholes[rank : rank + 1])
            for source, (slot, part, whole) in enumerate(zip(some, parts, wholes, strict=True)):
                dist.broadcast(whole.view(torch.uint8), source)
                part.copy_(self._part(slot, whole))

    def _whole(self, slot: ParameterSlot, held: Tensor) -> Tensor:
        """Gathered on the device, one tensor at a time, and kept by the first process only."""
        if held.ndim and _is_sharded(slot):
            held = _like(slot.parameter, held).full_tensor()
        return held.cpu() if processes.is_rank_zero() else held.new_empty(0)

    def _part(self, slot: ParameterSlot, whole: Tensor) -> Tensor:
        if not whole.ndim or not _is_sharded(slot):
            return whole
        parameter: Any = slot.parameter
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


@contextlib.contextmanager
def same_logits(model: nn.Module) -> Iterator[None]:
    """While this lasts, the logits of the first process are those of all, so that all draw the same tokens.

    They compute them together, and a difference in the last bit would have them go different ways.
    """

    def take(_: nn.Module, __: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, Any]:
        values, state = output
        if not isinstance(values, Tensor):
            return output
        values = values.contiguous()
        dist.broadcast(values.view(-1).view(torch.uint8), 0)
        return values, state

    handle = model.register_forward_hook(take)
    try:
        yield
    finally:
        handle.remove()


def _is_sharded(slot: ParameterSlot) -> bool:
    return isinstance(slot.parameter, DTensor)


def _like(parameter: Any, own: Tensor) -> DTensor:
    """The whole of which ``own`` is the part that corresponds to that of ``parameter``."""
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
