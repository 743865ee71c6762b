"""The learning rate of every step, and the betas of AdamW for steps of any size."""

from __future__ import annotations

import math

__all__ = ["PEAK_RATE", "betas", "learning_rate"]

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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Returns the rate of optimizer step ``step`` (from 1) of ``steps``: short linear warm-up, then cosine to a tenth.

    The warm-up takes a twentieth of the steps, at most 200.

    >>> learning_rate(50, 1000, 1.0), round(learning_rate(1000, 1000, 1.0), 6)
    (1.0, 0.1)
    """
    warmup = max(1, min(200, steps // 20))
    if step <= warmup:
        return peak * step / warmup
    share = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))
