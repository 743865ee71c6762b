"""The speed of training on this machine: a step of a preset, and the matrix products that bound it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mm_rec.config import ModelConfig
from mm_rec.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW

__all__ = ["StepSpeed", "matrix_rate", "step_speed"]


@dataclass(frozen=True)
class StepSpeed:
    """Speed of a training step.

    Attributes:
        seconds: of a step: forward, backward, update; the median of several.
        tokens_per_second: read.
        flops: floating-point operations a second in the matrix products that training needs, six for each weight
            that a token meets.
    """

    seconds: float
    tokens_per_second: float
    flops: float


def step_speed(
    config: ModelConfig, precision: str, batch_size: int, seq_len: int, steps: int, device: torch.device
) -> StepSpeed:
    """Time training steps of one expert on random tokens, after one to warm up."""
    model = MMRecModel(config)
    apply_precision(model, precision)
    model.to(device)
    optimizer = AdamW(model.named_parameters())
    domain = config.experts[0]
    ids = torch.randint(config.vocab_size, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)

    def step() -> None:
        output, _ = model(ids[:, :-1], None, domain, targets=ids[:, 1:])
        output.loss.backward()
        float(optimizer.step(1e-4, 1.0))

    seconds = _median_seconds(step, steps)
    active = sum(p.numel() for p in model.experts[domain].parameters()) + model.embedding.weight.numel()
    tokens = batch_size * seq_len
    return StepSpeed(seconds, tokens / seconds, 6 * active * tokens / seconds)


def matrix_rate(config: ModelConfig, precision: str, tokens: int, device: torch.device) -> float:
    """Operations a second of the widest product of a block, forward, alone; the median of several runs."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(tokens, config.d_model, device=device).to(dtype)
    weight = torch.randn(config.d_ff, config.d_model, device=device).to(dtype)
    result = torch.empty(tokens, config.d_ff, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(x, weight.t(), out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * tokens * config.d_model * config.d_ff / _median_seconds(product, 20)


def _median_seconds(function: Callable[[], object], count: int) -> float:
    function()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
