"""Data parallelism: each process holds the whole model, learns from its rows and averages its gradients with others'.

Passes need nothing of each other, so each is one CUDA graph as with one process. The gradients of a step are averaged
once, after its last pass: beside the pass, NCCL's kernels would take from its products more than they hide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec import processes
from mm_rec.optim import AdamW

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
