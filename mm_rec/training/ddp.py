"""Data parallelism: each process holds the whole model, learns from its rows and averages its gradients with others'.

Passes need nothing of each other, so each is one CUDA graph as with one process. The gradients of a step are averaged
once, after its last pass: beside the pass, NCCL's kernels would take from its products more than they hide.

Matrices that are orthogonalised are dealt out to the processes, and what each has made goes to all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec import ops, processes
from mm_rec.optim import AdamW, ParameterSlot

__all__ = ["ReplicatedAdamW"]

ALIGNED = 8  # elements: each gradient starts at a multiple of 16 bytes, as kernels like it


class ReplicatedAdamW(AdamW):
    """AdamW of a model of which every process holds all; in each the same parameters have got gradients.

    Args and methods are those of :class:`AdamW`. A step is that of the gradients' mean over the processes, and so the
    same in all; :meth:`step` and :meth:`gradient_norm` wait for all.
    """

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """As in :class:`AdamW`, of the mean of the gradients."""
        self.accumulate()
        if self._norm is None:
            for dtype in (torch.float32, torch.bfloat16):
                self._average(dtype)
        return super().gradient_norm()

    def _average(self, dtype: torch.dtype) -> None:
        """Replace the gradients of a type by their means, laid end to end so that they are one message."""
        slots = [slot for slot in self._active() if slot.gradient.dtype == dtype]
        if not slots:
            return
        sizes = [-(-slot.master.numel() // ALIGNED) * ALIGNED for slot in slots]
        message = torch.empty(sum(sizes), dtype=dtype, device=slots[0].master.device)
        pieces = zip(message.split(sizes), slots, strict=True)
        parts = [piece[: slot.master.numel()].view_as(slot.master) for piece, slot in pieces]
        torch._foreach_copy_(parts, [slot.gradient for slot in slots])
        processes.all_mean_(message)
        for slot, part in zip(slots, parts, strict=True):
            slot.total = part

    def _orthogonalize(self, slots: list[ParameterSlot], matrices: list[Tensor]) -> None:
        """As in :class:`AdamW`, each process its share of the matrices."""
        shares = _deal([min(x.shape) ** 2 * max(x.shape) for x in matrices], processes.world_size())
        ops.orthogonalize_([matrices[index] for index in shares[processes.rank()]])
        sizes = [sum(matrices[index].numel() for index in share) for share in shares]
        own = matrices[0].new_zeros(max(sizes))  # messages are of one length
        _copy_pieces([matrices[index] for index in shares[processes.rank()]], own, into=False)
        for share, message in zip(shares, processes.all_gather(own), strict=True):
            _copy_pieces([matrices[index] for index in share], message, into=True)


def _copy_pieces(matrices: list[Tensor], message: Tensor, *, into: bool) -> None:
    """Copy the matrices end to end into the start of ``message``, or ``into`` them what is there."""
    if not matrices:
        return
    sizes = [matrix.numel() for matrix in matrices]
    pieces = [piece.view_as(one) for piece, one in zip(message[: sum(sizes)].split(sizes), matrices, strict=True)]
    targets, sources = (matrices, pieces) if into else (pieces, matrices)
    torch._foreach_copy_(targets, sources)


def _deal(work: list[int], shares: int) -> list[list[int]]:
    """Returns the indices of each share; the next largest piece of work goes where there is least.

    >>> _deal([1, 5, 3, 2], 2)
    [[1, 0], [2, 3]]
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    totals = [0] * shares
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        least = totals.index(min(totals))
        dealt[least].append(index)
        totals[least] += work[index]
    return dealt
