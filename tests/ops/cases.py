"""Inputs of every op on odd shapes, made fresh from a seed. A case is a function (dtype) -> arguments."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Builder = Callable[[torch.dtype], Arguments]


class Random:
    """Seeded tensors. Activations take the type of the case, everything else is float32 (or float64 with it)."""

    def __init__(self, dtype: torch.dtype, *seed: Any) -> None:
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))

    def activation(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.wide)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.wide)

    def gamma(self, *shape: int) -> Tensor:
        """Decays, a third of them at the ends of their range."""
        gamma = self.uniform(*shape)
        kind = torch.randint(6, shape, generator=self.generator)
        return gamma.masked_fill(kind == 0, 1e-6).masked_fill(kind == 1, 0.9999)

    def reset(self, batch: int, time: int) -> Tensor:
        return torch.rand((batch, time), generator=self.generator) < 0.15

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


# (B, T, D, H): no time and much of it, widths under, at and beside multiples of a vector, heads of every kind
# that a kernel treats apart, batches that fill groups of sequences and leave a rest.
TIME_SHAPES = [
    (1, 1, 6, 1),
    (3, 1, 32, 2),
    (2, 63, 64, 4),
    (1, 513, 16, 1),
    (17, 3, 42, 7),
    (7, 5, 96, 3),
    (4, 9, 256, 2),
    (1, 66, 512, 2),
]


def scan(shape: tuple[int, int, int, int], state: bool, dtype: torch.dtype) -> Arguments:
    batch, time, width, _ = shape
    random = Random(dtype, "scan", shape, state)
    a, x = random.gamma(batch, time, width), random.normal(batch, time, width)
    return (a, x, random.normal(batch, width), random.reset(batch, time)) if state else (a, x)


def recurrence(shape: tuple[int, int, int, int], state: bool, dtype: torch.dtype) -> Arguments:
    batch, time, width, heads = shape
    random = Random(dtype, "recurrence", shape, state)
    d = width // heads
    z, u = random.normal(batch, time, width), random.activation(batch, time, width)
    gamma, w_g = random.gamma(batch, time, width), random.normal(heads, d, d, scale=0.5 * d**-0.5)
    rest = (random.normal(batch, width), random.reset(batch, time)) if state else ()
    return (z, u, gamma, w_g, *rest)


def mdi(shape: tuple[int, int, int, int], gate: bool, dtype: torch.dtype) -> Arguments:
    batch, time, width, _ = shape
    random = Random(dtype, "mdi", shape, gate)
    # Logits this wide go past both ends of the clamp of gamma; on an end itself, rounding decides the gradient.
    decay, bias = random.activation(batch, time, width, scale=6.0), random.normal(width, scale=3.0)
    for end in (1e-6, 0.9999):
        decay = decay.masked_fill((decay + bias - math.log(end / (1 - end))).abs() < 0.01, 0.0)
    candidate = random.activation(batch, time, width)
    rest = (random.activation(batch, time, width), random.normal(width)) if gate else ()
    return (decay, bias, candidate, *rest)


def readout(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Arguments:
    batch, time, width, heads = shape
    random = Random(dtype, "readout", shape)
    return random.normal(batch, time, width), random.activation(batch, time, width, scale=3.0), heads


def linear_branch(shape: tuple[int, int, int, int], state: bool, dtype: torch.dtype) -> Arguments:
    batch, time, width, heads = shape
    random = Random(dtype, "linear_branch", shape, state)
    hidden = max(width // 4, 1)
    weights = [
        random.activation(rows, columns, scale=columns**-0.5)
        for rows, columns in ((3 * width + hidden, width), (width, hidden), (width, width))
    ]
    in_proj, decay_proj, out_proj = weights
    biases = random.normal(width), random.normal(width)
    rest = (random.normal(batch, width), random.reset(batch, time)) if state else (None, None)
    return random.activation(batch, time, width), in_proj, decay_proj, *biases, out_proj, *rest, heads


def feed_forward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Arguments:
    batch, time, width, _ = shape
    random = Random(dtype, "feed_forward", shape)
    up = random.activation(3 * width, width, scale=width**-0.5)
    return random.activation(batch, time, width), up, random.activation(width, 3 * width, scale=(3 * width) ** -0.5)


def rms_norm(shape: tuple[int, ...], out_dtype: torch.dtype | None, dtype: torch.dtype) -> Arguments:
    return Random(dtype, "rms_norm", shape).activation(*shape), out_dtype


def add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    random = Random(dtype, "add_rms_norm", shape)
    return random.normal(*shape), random.activation(*shape)


def relu_squared(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return (Random(dtype, "relu_squared", shape).activation(*shape),)


# (B, T, W, H, d, position of each row's first token, tokens that start a document)
MemoryCase = tuple[int, int, int, int, int, list[int], set[tuple[int, int]]]
MEMORY_SHAPES: dict[str, MemoryCase] = {
    "one-token": (1, 1, 16, 1, 6, [40], set()),
    "first-token": (2, 1, 8, 2, 4, [0, 12], set()),
    "short-documents": (3, 171, 16, 1, 16, [0, 5, 16], {(0, 0), (1, 77), (1, 79), (1, 128)}),
    "model-sizes": (2, 150, 128, 2, 64, [0, 300], {(1, 30)}),
    "odd-sizes": (17, 63, 7, 3, 10, list(range(17)), {(3, 20), (4, 62)}),
    "far-into-a-document": (1, 513, 64, 1, 34, [100_000], set()),
}


def positions(batch: int, time: int, start: list[int], resets: set[tuple[int, int]]) -> Tensor:
    rows = []
    for row in range(batch):
        place, line = start[row % len(start)], []
        for t in range(time):
            place = 0 if (row, t) in resets else place
            line.append(place)
            place += 1
        rows.append(line)
    return torch.tensor(rows)


def retain(case: MemoryCase, dtype: torch.dtype) -> Arguments:
    """Scores of which many are equal, and slots of which some are empty."""
    batch, time, window, heads, _, start, resets = case
    random = Random(dtype, "retain", batch, time, window)
    slots = window if window > 16 else 2 * window + 1

    def scores(*shape: int) -> Tensor:
        return torch.nn.functional.logsigmoid((random.normal(*shape, scale=3.0) * 2).round() / 2)

    score, kept_score = scores(batch, window + time, heads), scores(batch, heads, slots)
    kept_score = kept_score.masked_fill(random.uniform(batch, heads, slots) < 0.3, -math.inf)
    return score, positions(batch, time, start, resets), kept_score


def memory_attention(case: MemoryCase, dtype: torch.dtype) -> Arguments:
    batch, time, window, heads, d, *_ = case
    random = Random(dtype, "memory_attention", batch, time, d)
    score, position, kept_score = retain(case, dtype)
    slots = kept_score.shape[2]
    q = random.activation(batch, time, heads, d)
    k = random.activation(batch, window + time, heads, d, scale=d**-0.5)  # as long as the model's keys
    v = random.activation(batch, window + time, heads, d)
    kept_k = random.activation(batch, heads, slots, d, scale=d**-0.5)
    return q, k, v, score, position, kept_k, random.activation(batch, heads, slots, d), kept_score, 1000.0


def mixed_keys(case: MemoryCase, dtype: torch.dtype) -> Arguments:
    batch, time, window, heads, d, start, resets = case
    random = Random(dtype, "mixed_keys", batch, time, d)
    taps = random.normal(heads, d, 4)
    return random.activation(batch, window + time, heads, d), taps, positions(batch, time, start, resets)


def gated_recurrence(shape: tuple[int, int, int, int], loop: bool, state: bool, dtype: torch.dtype) -> Arguments:
    batch, time, width, heads = shape
    random = Random(dtype, "gated_recurrence", shape, loop, state)
    d, hidden = width // heads, max(width // 4, 1)
    projected = random.activation(batch, time, 3 * width + hidden)
    decay_proj = random.activation(width, hidden, scale=hidden**-0.5)
    biases = random.normal(width, scale=2.0), random.normal(width)
    w_g = random.normal(heads, d, d, scale=0.5 * d**-0.5) if loop else None
    rest = (random.normal(batch, width), random.reset(batch, time)) if state else ()
    return (projected, decay_proj, *biases, heads, w_g, *rest)


def memory_context(
    batch: int, time: int, recent: int, window: int, heads: int, d: int, dtype: torch.dtype
) -> Arguments:
    random = Random(dtype, "memory_context", batch, time, d)
    before = (random.activation(batch, n, heads, d) for n in (recent, window))
    return random.activation(batch, time, 3 * heads * d), *before


def linear_cross_entropy(rows: int, width: int, vocabulary: int, weighted: bool, dtype: torch.dtype) -> Arguments:
    random = Random(dtype, "linear_cross_entropy", rows, width, vocabulary)
    y, embedding = random.activation(rows, width), random.activation(vocabulary, width, scale=0.3)
    targets = random.integers(vocabulary, rows)
    weight = random.uniform(rows) + 0.1
    return (y, embedding, targets, weight) if weighted else (y, embedding, targets)


def _all_cases() -> dict[str, dict[str, Builder]]:
    cases: dict[str, dict[str, Builder]] = {
        op: {}
        for op in (
            "scan", "recurrence", "mdi", "linear_branch", "readout", "rms_norm", "add_rms_norm", "relu_squared",
            "feed_forward",
        )
    }  # fmt: skip
    for shape in TIME_SHAPES:
        name = "x".join(map(str, shape))
        for flag in (False, True):
            suffix = f"{name}-{'with' if flag else 'without'}"
            cases["scan"][f"{suffix}-state"] = partial(scan, shape, flag)
            cases["recurrence"][f"{suffix}-state"] = partial(recurrence, shape, flag)
            cases["mdi"][f"{suffix}-gate"] = partial(mdi, shape, flag)
            cases["linear_branch"][f"{suffix}-state"] = partial(linear_branch, shape, flag)
        cases["readout"][name] = partial(readout, shape)
        cases["feed_forward"][name] = partial(feed_forward, shape)
        cases["add_rms_norm"][name] = partial(add_rms_norm, shape[:3])
        cases["relu_squared"][name] = partial(relu_squared, shape[:3])
        cases["rms_norm"][name] = partial(rms_norm, shape[:3], None)
    cases["rms_norm"]["to-float32"] = partial(rms_norm, (3, 5, 66), torch.float32)
    cases["rms_norm"]["to-bfloat16"] = partial(rms_norm, (3, 5, 66), torch.bfloat16)
    cases["rms_norm"]["heads"] = partial(rms_norm, (2, 5, 3, 10), None)
    cases["rms_norm"]["vector"] = partial(rms_norm, (7,), None)
    for build in (memory_attention, mixed_keys):
        cases[build.__name__] = {name: partial(build, case) for name, case in MEMORY_SHAPES.items()}
    cases["linear_cross_entropy"] = {
        f"{rows}x{width}x{vocabulary}-{'weighted' if weighted else 'mean'}": partial(
            linear_cross_entropy, rows, width, vocabulary, weighted
        )
        for rows, width, vocabulary, weighted in [(1, 6, 3, False), (63, 20, 130, True), (17, 64, 512, False)]
    }
    return cases


CASES = _all_cases()

# Ops that some back ends have as one kernel; the others run them in parts.
FUSED_CASES: dict[str, dict[str, Builder]] = {
    "gated_recurrence": {
        f"{'x'.join(map(str, shape))}-{'loop' if loop else 'scan'}-{'with' if state else 'without'}-state": partial(
            gated_recurrence, shape, loop, state
        )
        for shape in [(1, 1, 64, 4), (2, 63, 64, 1), (17, 9, 128, 2), (3, 200, 192, 6), (9, 131, 256, 2), (2, 5, 42, 7)]
        for loop in (False, True)
        for state in (False, True)
    },
    "memory_context": {
        "x".join(map(str, sizes)): partial(memory_context, *sizes)
        for sizes in [
            (1, 1, 3, 4, 1, 6),
            (2, 9, 6, 6, 3, 16),
            (3, 70, 3, 128, 2, 64),
            (1, 5, 3, 8, 2, 80),
            (2, 3, 3, 4, 1, 256),
        ]
    },
}
