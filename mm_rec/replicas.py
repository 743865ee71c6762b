"""The loss of a micro-batch, its gradients averaged over the processes: by DDP where each holds the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mm_rec import distributed
from mm_rec.data.batches import Batch
from mm_rec.model import MMRecModel
from mm_rec.state import ModelState, detach_state

__all__ = ["averaged"]


def averaged(
    model: MMRecModel, *, sharded: bool = False, parts: int = 1
) -> Callable[[Batch, ModelState | None], tuple[Tensor, ModelState]]:
    """The loss of a micro-batch and the state after it; its gradients are averaged over the processes.

    Args:
        model: whole in each process, for DDP, or ``sharded``, in which case FSDP and the optimizer average.
        parts: micro-batches of a step; with more than one, the gradients of a call survive the next.
    """
    return _Loss(model) if sharded or distributed.size() == 1 else _Averaged(model, parts)


class _Loss(nn.Module):
    """The loss of a model, as DDP wants it: a gradient flows through all that it gives, or is cut off."""

    def __init__(self, model: MMRecModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        output, after = self.model(
            batch.tokens, state, batch.domain, batch.reset, targets=batch.targets, weight=batch.weight
        )
        return output.loss, detach_state(after)


class _Averaged:
    """The loss by DDP, with one reducer for every set of parameters that learn from a micro-batch.

    A micro-batch has the same domain in all processes, so all agree on the set. Knowing it spares DDP a search for
    what got no gradient, after which it has to wait for the device, and which no CUDA graph could hold.
    """

    def __init__(self, model: MMRecModel, parts: int) -> None:
        self._model = model
        self._parts = parts
        self._reducers: dict[tuple[str, ...], DistributedDataParallel] = {}

    def __call__(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        learning = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        names = tuple(name for name in learning if _learns(name, batch.domain))
        if names not in self._reducers:
            self._reducers[names] = self._reducer([p for name, p in learning.items() if name not in names])
        loss, after = self._reducers[names](batch, state)
        return loss, after

    def _reducer(self, without: list[nn.Parameter]) -> DistributedDataParallel:
        """DDP that leaves some parameters alone: it takes those that want a gradient when it is made.

        Where a step has one micro-batch the gradients stay in DDP's buckets; the next pass overwrites them there.
        """
        for parameter in without:
            parameter.requires_grad_(False)
        try:
            with _side_stream(self._model.embedding.weight.device):
                return DistributedDataParallel(_Loss(self._model), gradient_as_bucket_view=self._parts == 1)
        finally:
            for parameter in without:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Where DDP has to be made: it adds up gradients on the stream of its making, and no graph has the default one."""
    if device.type == "cpu":
        yield
        return
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # which is meant
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _learns(name: str, domain: str | None) -> bool:
    """Whether a parameter learns from micro-batches of a domain."""
    return domain is None or not name.startswith(("experts.", "fusion.")) or name.startswith(f"experts.{domain}.")
