"""What this machine can do at best: matrix products of the model's own shapes, and copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from mm_rec import ops
from mm_rec.bench.timing import Action, median_seconds
from mm_rec.config import ModelConfig

__all__ = ["COPY_BYTES", "copy_action", "copy_rate", "matrix_work", "products_action"]

COPY_BYTES = 512 * 2**20
"""Read and written by the copy that sets the memory rate: more than any cache holds."""
HEAD_ROWS = {"cpu": 1024, "cuda": 16_384}
"""Rows of logits at once, about as the loss takes them."""


def _products(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(outputs, inputs, how often) of every weight that one expert and the head multiply by."""
    width, hidden, blocks = config.d_model, config.d_ff, config.n_layers
    memory_blocks = sum(config.is_memory_block(index) for index in range(blocks))
    decay = max(width // 4, 1)
    return [
        (3 * width + decay, width, blocks),
        (width, decay, blocks),
        (width, width, blocks + memory_blocks),
        (3 * width, width, memory_blocks),
        (hidden, width, blocks),
        (width, hidden, blocks),
        (config.vocab_size, width, 1),
    ]


def matrix_work(config: ModelConfig, tokens: int) -> float:
    """Floating-point operations of the products of a training step with one expert: forward and two backward."""
    return 6.0 * tokens * sum(outputs * inputs * count for outputs, inputs, count in _products(config))


def products_action(config: ModelConfig, precision: str, tokens: int) -> Callable[[], float]:
    """A function that times the matrix products of a training step alone, and returns operations a second.

    Every shape is run once per call, forward and both gradients, and counts as often as a step has it.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    head_rows = HEAD_ROWS[torch.get_default_device().type]
    timings: list[tuple[list[Action], float]] = []
    for outputs, inputs, count in _products(config):
        rows = min(tokens, head_rows) if outputs == config.vocab_size else tokens
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        gradient = torch.randn(rows, outputs).to(dtype)
        pairs = [(x, weight.t()), (gradient, weight), (gradient.t(), x)]
        results = [torch.empty(left.shape[0], right.shape[1], dtype=dtype) for left, right in pairs]
        actions: list[Action] = [
            partial(ops.matmul, left, right, out) for (left, right), out in zip(pairs, results, strict=True)
        ]
        timings.append((actions, count * tokens / rows))

    def measure() -> float:
        seconds = 0.0
        for actions, count in timings:
            each = median_seconds({str(index): action for index, action in enumerate(actions)}, 1)
            seconds += count * sum(each.values())
        return matrix_work(config, tokens) / seconds

    return measure


def copy_action(size: int) -> Action:
    """A plain copy that reads and writes ``size`` bytes in all, into memory that is there already."""
    source, target = torch.zeros(size // 8), torch.zeros(size // 8)
    return partial(target.copy_, source)


def copy_rate(rounds: int = 5) -> float:
    """Bytes a second that a large copy reads and writes."""
    return COPY_BYTES / median_seconds({"copy": copy_action(COPY_BYTES)}, rounds)["copy"]
