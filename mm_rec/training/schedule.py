"""The learning rate of every step, and what else of the optimizer follows from the size of a step.

The length of a run with a time budget is revised on the way; a :class:`Length` is what has been decided so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "MUON_TOKENS", "OPTIMIZERS", "PEAK_RATE", "Length", "betas", "choose_optimizer", "learning_rate",
    "muon_rate_factor", "warmup_steps",
]  # fmt: skip

OPTIMIZERS = ("adamw", "muon")
"""AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""

MUON_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Tokens of a step, by the type of the device, from which Muon learns more in the same time.

Its update costs the same whatever a step reads, and lowers the bits per byte of a given number of tokens at every
size of a step. From so many tokens on the gain is worth more than the time (measured: docs/LOG.md).
"""

MUON_RATE_TOKENS = 4096
MUON_FEWEST, MUON_MOST = 1024, 16_384

PEAK_RATE = 2e-3
"""Peak learning rate of AdamW in stage1, from 1k to 65k tokens a step, with the betas below (measured: docs/LOG.md)."""

FINAL_SHARE = 0.1
"""Share of the peak at which the schedule ends."""

FEW_TOKENS, MANY_TOKENS = 1024, 65_536
FIRST_BETAS = 0.7, 0.9
SECOND_BETA, LONGEST_SECOND_BETA = 0.95, 0.999


def betas(tokens_per_step: int) -> tuple[float, float]:
    """Returns the betas of AdamW: a step of few tokens is noisy, so its second moment averages over more steps.

    Its half-life is held fixed in tokens, that of 0.95 at 65k tokens a step, up to 0.999. The first moment goes the
    other way: with many small steps momentum is in their number, and 0.9 lags behind.

    >>> betas(65_536), betas(8192)[1], betas(1024)
    ((0.9, 0.95), 0.993608849045455, (0.7, 0.999))
    """
    share = math.log(tokens_per_step / FEW_TOKENS) / math.log(MANY_TOKENS / FEW_TOKENS)
    first = FIRST_BETAS[0] + (FIRST_BETAS[1] - FIRST_BETAS[0]) * min(max(share, 0.0), 1.0)
    second = SECOND_BETA ** min(tokens_per_step / MANY_TOKENS, 1.0)
    return first, min(second, LONGEST_SECOND_BETA)


@dataclass(frozen=True)
class Length:
    """How many steps a schedule has, as it was decided at its beginning and after some of its steps.

    Attributes:
        revisions: pairs (s, n) with rising s: after step s the schedule was given n steps in all. The first is (0, n).
    """

    revisions: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        """The number of steps, as it was decided last."""
        return self.revisions[-1][1]

    @property
    def revised_at(self) -> int:
        """The step after which the number of steps was decided last."""
        return self.revisions[-1][0]

    def revised(self, step: int, steps: int) -> Length:
        """Returns the length with ``steps`` steps in all, decided after step ``step``."""
        if not self.revised_at < step <= steps:
            raise ValueError(f"step {step} of {steps} cannot follow a decision after step {self.revised_at}")
        return Length((*self.revisions, (step, steps)))

    def share(self, step: int, first: int) -> float:
        """Returns which share of the steps after step ``first`` is done after ``step``, from 0 to 1.

        At each revision what is left is shared out anew among the steps that are left, so the share never jumps.

        >>> length = Length(((0, 100),)).revised(50, 150)
        >>> length.share(50, 0), length.share(100, 0), length.share(150, 0)
        (0.5, 0.75, 1.0)
        """
        share, begin, steps = 0.0, first, self.revisions[0][1]
        for at, revised in self.revisions[1:]:
            if at >= step:
                break
            if at > begin:
                share += (1 - share) * (at - begin) / max(steps - begin, at - begin, 1)
                begin = at
            steps = revised
        return share + (1 - share) * min(max(step - begin, 0) / max(steps - begin, 1), 1.0)


def warmup_steps(steps: int) -> int:
    """Returns the steps of the linear warm-up: a twentieth of all, at most 200."""
    return max(1, min(200, steps // 20))


def learning_rate(step: int, steps: int, peak: float, share: float | None = None) -> float:
    """Returns the rate of optimizer step ``step`` (from 1) of ``steps``: short linear warm-up, then cosine to a tenth.

    Args:
        step: the step.
        steps: the length of the schedule, as it was decided at the beginning.
        peak: the highest rate.
        share: how much of what follows the warm-up is done, if that does not follow from ``steps``.

    >>> learning_rate(50, 1000, 1.0), round(learning_rate(1000, 1000, 1.0), 6)
    (1.0, 0.1)
    """
    warmup = warmup_steps(steps)
    if step <= warmup:
        return peak * step / warmup
    if share is None:
        share = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))


def choose_optimizer(wanted: str, device_type: str, tokens_per_step: int) -> str:
    """Returns the one of :data:`OPTIMIZERS` that is wanted, or for ``auto`` the one that suits the size of a step.

    >>> choose_optimizer("auto", "cpu", 4096), choose_optimizer("auto", "cuda", 4096)
    ('muon', 'adamw')
    """
    if wanted != "auto":
        return wanted
    return "muon" if tokens_per_step >= MUON_TOKENS.get(device_type, math.inf) else "adamw"


def muon_rate_factor(tokens_per_step: int) -> float:
    """Returns the learning rate of orthogonalised matrices over that of AdamW.

    With :data:`PEAK_RATE` for the rest, 1e-3, 2e-3 and 4e-3 were best at 1k, 4k and 16k tokens a step: the rate grows
    with the root of the tokens. Beyond what was measured it stays.

    >>> muon_rate_factor(1024), muon_rate_factor(4096), muon_rate_factor(65_536)
    (0.5, 1.0, 2.0)
    """
    return math.sqrt(min(max(tokens_per_step, MUON_FEWEST), MUON_MOST) / MUON_RATE_TOKENS)
