"""How far a training run is, and whether its next step may be taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mm_rec.translation import Translatable

__all__ = ["TrainingProgress"]

HISTORY = 32
SPIKE_NATS = 1.0
SPIKE_DEVIATIONS = 8.0


@dataclass
class TrainingProgress:
    """How far a run is; all of it is in its checkpoints.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens read so far.
        rate_scale: factor on the learning rate, halved by each roll-back.
        skipped: steps that are left out, since their batch made the loss run away.
        losses: the last losses of each domain, by which a spike is recognised.
    """

    step: int = 0
    tokens: int = 0
    rate_scale: float = 1.0
    skipped: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def trouble(self, losses: Mapping[str, float]) -> str | None:
        """Why a step with these losses must not be applied; None if it may.

        A spike is a loss more than one nat and eight standard deviations above the last 32 of its domain.
        """
        for domain, loss in losses.items():
            if not math.isfinite(loss):
                return Translatable("the loss of {domain} is {loss}", domain=domain, loss=loss)
            recent = self.losses.get(domain, [])
            if len(recent) == HISTORY:
                usual, spread = float(np.mean(recent)), float(np.std(recent))
                if loss > usual + SPIKE_NATS + SPIKE_DEVIATIONS * spread:
                    return Translatable(
                        "the loss of {domain} jumped from {usual:.3f} to {loss:.3f}",
                        domain=domain,
                        usual=usual,
                        loss=loss,
                    )
        return None

    def remember(self, losses: Mapping[str, float]) -> None:
        """Add the losses of an applied step."""
        for domain, loss in losses.items():
            self.losses[domain] = [*self.losses.get(domain, []), loss][-HISTORY:]
