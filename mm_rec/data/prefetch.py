"""Micro-batches on the device of the model, the next one on its way while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mm_rec.data.batches import Batch

__all__ = ["Feed", "Source"]


class Source(Protocol):
    """What gives micro-batches by their index."""

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch ``index``: the same whenever it is asked for."""


class Feed:
    """Brings micro-batches to a device.

    Args:
        device: where they are wanted.
        share: what of a micro-batch this process reads; all of it by default.
    """

    def __init__(self, device: torch.device, share: Callable[[Batch], Batch] = lambda batch: batch) -> None:
        self._device = device
        self._share = share
        self._ahead: tuple[Source, int, Batch] | None = None

    def take(self, source: Source, index: int) -> Batch:
        """Micro-batch ``index`` of ``source``."""
        if self._ahead is not None and self._ahead[:2] == (source, index):
            batch, self._ahead = self._ahead[2], None
            return batch
        return self._load(source, index)

    def prefetch(self, source: Source, index: int) -> None:
        """Begin to bring a micro-batch that is likely to be taken next; does nothing where nothing runs meanwhile."""
        if self._device.type != "cpu":
            self._ahead = (source, index, self._load(source, index))

    def _load(self, source: Source, index: int) -> Batch:
        batch = self._share(source.micro_batch(index))
        return replace(
            batch,
            tokens=self._move(batch.tokens),
            targets=self._move(batch.targets),
            weight=self._move(batch.weight),
            reset=self._move(batch.reset),
        )

    def _move(self, tensor: Tensor) -> Tensor:
        """To the device, from memory that it reads by itself, so that nobody waits."""
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)
