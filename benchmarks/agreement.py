"""How well the ways to run the model agree, in value and in every gradient.

The state makes five ways to compute the same thing (ARCHITECTURE.md, "State"): the whole sequence at
once, in chunks of any size with the state carried, token by token, rows with resets and left padding
against the same documents alone, and native kernels against the reference. Each function here returns
the worst relative error of a pair; ``tests/test_agreement.py`` bounds it.

    python -m benchmarks.agreement
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.config import ModelConfig
from mm_rec.model import MMRecModel

__all__ = ["PAIRS", "Errors", "compare_backends"]

CONFIG = ModelConfig(vocab_size=64, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16)
TIME = 101  # not a multiple of anything; twelve blocks of P = 8


class Errors(NamedTuple):
    """Worst relative error of the logits and of any parameter's gradient; 1e-6 means six digits agree."""

    value: float
    gradient: float


class Run(NamedTuple):
    logits: Tensor
    gradients: dict[str, Tensor]


def build(dtype: torch.dtype, seed: int = 0) -> MMRecModel:
    """A small model in which every part matters: weights well above their initial values."""
    model = MMRecModel(CONFIG, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(dtype))
    return model


def sample(rows: int, time: int = TIME, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Random tokens (rows, time) and a random weight for each logit, so that gradients are generic."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CONFIG.vocab_size, (rows, time), generator=generator)
    return tokens, torch.randn(rows, time, CONFIG.vocab_size, generator=generator, dtype=torch.float64)


def collect(model: MMRecModel, logits: Tensor, probe: Tensor) -> Run:
    """Gradients of a random linear function of the logits."""
    model.zero_grad()
    (logits * probe.to(logits.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(logits.detach(), gradients)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = expected.abs().max().double()
    return float((actual.double() - expected.double()).abs().max() / scale.clamp_min(1e-30))


def compare(actual: Run, expected: Run) -> Errors:
    """Worst relative errors between two runs of one model."""
    if actual.gradients.keys() != expected.gradients.keys():
        raise AssertionError("the two ways reach different parameters")
    gradient = max(relative_error(actual.gradients[name], expected.gradients[name]) for name in expected.gradients)
    return Errors(relative_error(actual.logits, expected.logits), gradient)


def run_chunks(model: MMRecModel, tokens: Tensor, sizes: Iterable[int], domain: str | None) -> Tensor:
    """Logits of ``tokens`` in chunks of the given sizes (cycled), the state carried and not detached."""
    state, start = None, 0
    pieces: list[Tensor] = []
    for size in itertools.cycle(sizes):
        if start >= tokens.shape[1]:
            return torch.cat(pieces, dim=1)
        logits, state = model(tokens[:, start : start + size], state, domain)
        pieces.append(logits)
        start += size
    raise AssertionError("no chunk sizes")


def whole_against_chunks(dtype: torch.dtype, domain: str | None, sizes: Sequence[int] = (5, 1, 17, 8, 3, 32)) -> Errors:
    """The whole sequence against chunks of uneven sizes."""
    model = build(dtype)
    tokens, probe = sample(2)
    expected = collect(model, model(tokens, None, domain)[0], probe)
    return compare(collect(model, run_chunks(model, tokens, sizes, domain), probe), expected)


def whole_against_tokens(dtype: torch.dtype, domain: str | None) -> Errors:
    """The whole sequence against one token at a time."""
    return whole_against_chunks(dtype, domain, sizes=(1,))


def chunks_against_chunks(dtype: torch.dtype, domain: str | None) -> Errors:
    """Chunks of one size against chunks of another that shares no boundary pattern with it."""
    model = build(dtype)
    tokens, probe = sample(2)
    expected = collect(model, run_chunks(model, tokens, (16,), domain), probe)
    return compare(collect(model, run_chunks(model, tokens, (7, 13), domain), probe), expected)


def packed_against_alone(dtype: torch.dtype, domain: str | None) -> Errors:
    """Documents packed into rows, one of them behind left padding, against each document alone."""
    model = build(dtype)
    tokens, probe = sample(2)
    spans = [(0, slice(0, 37)), (0, slice(37, TIME)), (1, slice(23, TIME))]  # row 1: 23 tokens of padding
    reset = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, span in spans:
        reset[row, span.start] = True
    counted = torch.zeros(probe.shape, dtype=probe.dtype)
    for row, span in spans:
        counted[row, span] = probe[row, span]
    packed = collect(model, model(tokens, None, domain, reset)[0], counted)
    packed = packed._replace(logits=torch.cat([packed.logits[row, span] for row, span in spans]))
    alone = torch.cat([model(tokens[row, None, span], None, domain)[0][0] for row, span in spans])
    probe_alone = torch.cat([probe[row, span] for row, span in spans])
    return compare(packed, collect(model, alone, probe_alone))


def compare_backends(domain: str | None) -> Errors:
    """The kernels of the native back end in float32 against the reference in float64, in chunks and with resets."""
    model = build(torch.float32)
    tokens, probe = sample(3)
    reset = torch.zeros(tokens.shape, dtype=torch.bool)
    reset[0, 30] = reset[1, 0] = reset[2, 77] = True

    def run(model: MMRecModel) -> Run:
        first, state = model(tokens[:, :40], None, domain, reset[:, :40])
        second, _ = model(tokens[:, 40:], state, domain, reset[:, 40:])
        return collect(model, torch.cat([first, second], dim=1), probe)

    expected = run(copy.deepcopy(model).double())
    with ops.use_backend("native"):
        return compare(run(model), expected)


PAIRS: dict[str, Callable[[torch.dtype, str | None], Errors]] = {
    "whole / chunks": whole_against_chunks,
    "whole / token by token": whole_against_tokens,
    "chunks / other chunks": chunks_against_chunks,
    "packed and left-padded / alone": packed_against_alone,
}


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Worst relative errors between the ways to run the model.")
    parser.parse_args(argv)
    print(f"{'pair':34} {'type':9} {'domain':7} {'value':>9} {'gradient':>9}")

    def row(name: str, kind: str, domain: str | None, errors: Errors) -> None:
        print(f"{name:34} {kind:9} {domain or 'fused':7} {errors.value:9.1e} {errors.gradient:9.1e}")

    domains: tuple[str | None, ...] = ("text", None)
    for name, pair in PAIRS.items():
        for dtype, domain in itertools.product((torch.float64, torch.float32), domains):
            row(name, str(dtype).removeprefix("torch."), domain, pair(dtype, domain))
    if ops.status()["cpu"].backend == "native":
        for domain in domains:
            row("native / reference", "float32", domain, compare_backends(domain))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
