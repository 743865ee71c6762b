"""Draws of many rows at once: the kernel keeps what the definition keeps, and no row depends on another."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.inference.sampling import Sampler, Sampling, next_tokens
from mm_rec.ops.inference import sample

SETTINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0, 0.7, 1.5), (0, 1, 40, 5000), (0.3, 0.95, 1), (0, 0.05), (1, 1.3)
    )
]


def some_logits(rows: int, vocabulary: int, spread: float) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))


def texts(settings: list[Sampling], vocabulary: int, banned: tuple[int, ...] = ()) -> list[Sampler]:
    seen = [0, 3, 3, vocabulary - 1]
    return [Sampler(one, torch.Generator().manual_seed(number), banned, seen) for number, one in enumerate(settings)]


@pytest.mark.native
@pytest.mark.parametrize("vocabulary", [7, 64, 1003, 8384])
@pytest.mark.parametrize("spread", [0, 0.5, 4])
def test_the_kernel_draws_what_the_definition_draws(vocabulary: int, spread: float) -> None:
    logits = some_logits(len(SETTINGS), vocabulary, spread)
    banned = tuple(range(1, vocabulary, 5))
    with ops.use_backend("native"):
        found = next_tokens(logits, texts(SETTINGS, vocabulary, banned))
    with ops.use_backend("reference"):
        expected = next_tokens(logits, texts(SETTINGS, vocabulary, banned))
    different = [place for place, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert len(different) <= (0 if spread else 8), different  # of equal weights a rounded sum decides which is the last
    assert not set(found) & set(banned)


@pytest.mark.native
def test_no_row_depends_on_its_neighbours_or_the_threads() -> None:
    logits = some_logits(len(SETTINGS), 1003, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = next_tokens(logits, texts(SETTINGS, 1003))
    finally:
        torch.set_num_threads(before)
    alone = [next_tokens(logits[[i]], [one])[0] for i, one in enumerate(texts(SETTINGS, 1003))]
    assert together == alone


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_equally_likely_tokens_are_kept_from_the_lowest_id(backend: str) -> None:
    logits = torch.zeros(1, 500)
    with ops.use_backend(backend):
        for sampling, kept in ((Sampling(top_k=10, top_p=1), 10), (Sampling(top_p=0.0999), 50)):
            sampler = Sampler(sampling, torch.Generator().manual_seed(0))
            found = {next_tokens(logits, [sampler])[0] for _ in range(600)}
            assert found == set(range(kept))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_no_mass_keeps_the_likeliest_token(backend: str) -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(2))
    sampler = Sampler(Sampling(temperature=5.0, top_p=0), torch.Generator().manual_seed(0))
    with ops.use_backend(backend):
        assert {next_tokens(logits, [sampler])[0] for _ in range(100)} == {int(logits.argmax())}


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_frequencies_follow_the_probabilities(backend: str) -> None:
    logits = torch.tensor([[2.0, 1.9, 1.0, 0.0, -1.0, -torch.inf] * 7])
    sampler = Sampler(Sampling(temperature=0.7, top_p=1), torch.Generator().manual_seed(0))
    with ops.use_backend(backend):
        found = torch.tensor([next_tokens(logits, [sampler])[0] for _ in range(8000)]).bincount(minlength=42) / 8000
    assert torch.allclose(found, (logits[0] / 0.7).softmax(0), atol=0.01)


@pytest.mark.native
def test_the_kernel_ends_in_a_token_whatever_the_logits() -> None:
    """Callers are told of such logits before; the kernel must stay inside of its row all the same."""
    logits = torch.zeros(5, 40)
    logits[0], logits[1], logits[2, 3], logits[3, 5] = torch.nan, -torch.inf, torch.nan, torch.inf
    logits[4, 7] = -torch.inf
    for sampling in SETTINGS[::7]:
        samplers = [Sampler(sampling, torch.Generator()) for _ in range(5)]
        found = sample(logits, [one.row() for one in samplers])
        assert all(0 <= token < 40 for token in found)
        assert found[3] == 5


def test_logits_are_left_as_they_were() -> None:
    logits = some_logits(2, 64, 1)
    before = logits.clone()
    next_tokens(logits, texts([Sampling(repetition_penalty=2)] * 2, 64, (1, 2)))
    assert torch.equal(logits, before)
