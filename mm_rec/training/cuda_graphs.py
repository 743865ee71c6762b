"""Forward and backward of a micro-batch as CUDA graphs: one launch in place of some thousand.

A small step is over on the device before Python has launched it. A graph is captured once for every kind of
micro-batch (its domain, its shape, what learns) and replayed with the tensors of each copied in. Nothing in it
depends on values, so a replay computes what was captured, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mm_rec import processes
from mm_rec.data.batches import Batch
from mm_rec.state import ModelState, map_state

__all__ = ["GraphedPass", "LossFunction", "run_pass"]

LossFunction = Callable[[Batch, ModelState | None], tuple[Tensor, ModelState]]
"""Loss of a micro-batch, to be differentiated, and the state after it."""


def run_pass(loss_of: LossFunction, batch: Batch, state: ModelState | None, parts: int) -> tuple[Tensor, ModelState]:
    """Forward and backward: adds the gradients of the loss over ``parts``, the micro-batches of a step, to ``.grad``.

    Returns:
        The loss, detached, and the state after the micro-batch, still in the graph that made it.
    """
    loss, after = loss_of(batch, state)
    (loss / parts if parts > 1 else loss).backward()
    return loss.detach(), after


@dataclass(frozen=True)
class _Captured:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss: Tensor
    after: ModelState
    gradients: list[tuple[nn.Parameter, Tensor]]


class GraphedPass:
    """:func:`run_pass` by graphs, for a model whose parameters stay where they are.

    Args:
        loss_of: what to differentiate; on a CUDA device, and without any wait for it.
        parameters: all that may get gradients; their ``.grad`` must be None at each call.
        parts: micro-batches of a step; with more than one, the gradients of a call survive the next.
    """

    def __init__(self, loss_of: LossFunction, parameters: list[nn.Parameter], parts: int) -> None:
        self._loss_of = loss_of
        self._parameters = parameters
        self._parts = parts
        self._pool = torch.cuda.graph_pool_handle()
        # cuBLAS has one workspace for each stream, and the graphs captured there go on using it. With a stream of its
        # own this object shares it with no other: both may be replayed side by side, and either may be freed first.
        self._stream = torch.cuda.Stream()
        self._captured: dict[Hashable, _Captured] = {}

    def __call__(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """Set ``.grad`` of the parameters that learn from ``batch``.

        Returns:
            The loss, and the state after the micro-batch: overwritten by the next call, so copy what is to stay.
        """
        learns = tuple(parameter.requires_grad for parameter in self._parameters)
        key = (batch.domain, batch.tokens.shape, state is None, learns)
        if key not in self._captured:
            self._captured[key] = self._capture(batch, state)
        one = self._captured[key]
        torch._foreach_copy_(one.inputs, _tensors(batch, state))
        one.graph.replay()
        for parameter, gradient in one.gradients:
            parameter.grad = gradient.clone() if self._parts > 1 else gradient
        return one.loss.clone(), one.after

    def _capture(self, batch: Batch, state: ModelState | None) -> _Captured:
        """Run the pass as it is, for all that is made at a first time, then record it."""
        batch = replace(batch, **{name: getattr(batch, name).clone() for name in _FIELDS})
        state = None if state is None else map_state(state, torch.clone)
        run_pass(self._loss_of, batch, state, self._parts)
        self._clear()
        graph = torch.cuda.CUDAGraph()
        # With several processes the threads of NCCL go on with their own business meanwhile.
        mode = "thread_local" if processes.world_size() > 1 else "global"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            loss, after = run_pass(self._loss_of, batch, state, self._parts)
            after = map_state(after, Tensor.detach)
        gradients = [(parameter, parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        self._clear()
        return _Captured(graph, _tensors(batch, state), loss, after, gradients)

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


_FIELDS = ("tokens", "targets", "weight", "reset")


def _tensors(batch: Batch, state: ModelState | None) -> list[Tensor]:
    """All tensors of a micro-batch and a state, in a fixed order."""
    return [
        *(getattr(batch, name) for name in _FIELDS),
        *(one for one in tree_leaves(state) if isinstance(one, Tensor)),
    ]
