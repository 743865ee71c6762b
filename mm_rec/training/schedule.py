"""The learning rate of every step, and what else of the optimizer follows from the size of a step."""

from __future__ import annotations

import math

__all__ = [
    "MUON_TOKENS_CPU", "MUON_TOKENS_GPU", "OPTIMIZERS", "PEAK_RATE", "betas", "choose_optimizer", "learning_rate",
    "muon_rate_factor",
]  # fmt: skip

OPTIMIZERS = ("adamw", "muon")
"""AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""

MUON_TOKENS_CPU, MUON_TOKENS_GPU = 4096, 16_384
"""Tokens of a step from which Muon learns more in the same time.

Its update costs the same whatever a step reads, and lowers the bits per byte of a given number of tokens at every
size of a step. On a CPU the gain is worth more than the time from 4k tokens on; on a GPU, whose products are faster but
not its launches, from 16k (measured: docs/LOG.md).
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


def choose_optimizer(wanted: str, device_type: str, tokens_per_step: int) -> str:
    """Returns the one of :data:`OPTIMIZERS` that is wanted, or for ``auto`` the one that suits the size of a step.

    >>> choose_optimizer("auto", "cpu", 1024), choose_optimizer("auto", "cpu", 4096)
    ('adamw', 'muon')
    """
    if wanted != "auto":
        return wanted
    fewest = MUON_TOKENS_CPU if device_type == "cpu" else MUON_TOKENS_GPU
    return "muon" if tokens_per_step >= fewest else "adamw"


def muon_rate_factor(tokens_per_step: int) -> float:
    """Returns the learning rate of orthogonalised matrices over that of AdamW.

    With :data:`PEAK_RATE` for the rest, 1e-3, 2e-3 and 4e-3 were best at 1k, 4k and 16k tokens a step: the rate grows
    with the root of the tokens. Beyond what was measured it stays.

    >>> muon_rate_factor(1024), muon_rate_factor(4096), muon_rate_factor(65_536)
    (0.5, 1.0, 2.0)
    """
    return math.sqrt(min(max(tokens_per_step, MUON_FEWEST), MUON_MOST) / MUON_RATE_TOKENS)
