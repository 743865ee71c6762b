"""Draws the next token of many texts at once, each from its own logits, generator and settings."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.ops.inference import SampleRow, runs_native, sample
from mm_rec.translation import Translatable

__all__ = ["Sampler", "Sampling", "SamplingOptions", "next_tokens"]

FIRST_LIKELIEST = 256
MIN_TOP_P = 1e-12
"""Keeps the likeliest token alone, as 0 does; the kernel looks for a share above 0."""
MIN_TEMPERATURE = 1e-6
"""Below it float32 overflows; the likeliest token is then all there is anyway."""


class SamplingOptions(TypedDict, total=False):
    """Fields of :class:`Sampling` as keywords, of which any may be left out; ``stop`` may be one string."""

    max_new_tokens: int
    repetition_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: str | Iterable[str]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """Settings of how tokens are drawn. The filters apply in the order in which they stand here.

    Attributes:
        max_new_tokens: how many tokens to draw at most.
        repetition_penalty: logits of tokens that occurred are divided by it if positive, else multiplied
            (CTRL, arXiv 1909.05858); 1 changes nothing.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability, at least one (arXiv 1904.09751).
        min_p: keep tokens at least this share as likely as the likeliest (arXiv 2407.01082).
        stop: text ends before the first of these strings.
        seed: the same seed gives the same text.
    """

    max_new_tokens: int = 200
    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            Translatable("max_new_tokens must be at least 0"): self.max_new_tokens >= 0,
            Translatable("repetition_penalty must be above 0"): 0 < self.repetition_penalty < float("inf"),
            Translatable("temperature must be at least 0"): 0 <= self.temperature < float("inf"),
            Translatable("top_k must be at least 0"): self.top_k >= 0,
            Translatable("top_p must be at least 0 and at most 1"): 0 <= self.top_p <= 1,
            Translatable("min_p must be at least 0 and at most 1"): 0 <= self.min_p <= 1,
            Translatable("stop strings must not be empty"): all(self.stop),
            Translatable("seed must be a number of at most 64 bits"): -(2**63) <= self.seed < 2**64,
        }
        for message, holds in checks.items():
            if not holds:
                raise UserError(message)

    @classmethod
    def from_options(cls, options: SamplingOptions, base: Sampling | None = None) -> Sampling:
        """Returns ``base``, or the defaults, with the given options.

        >>> Sampling.from_options({"temperature": 0, "stop": "."}).stop
        ('.',)

        Raises:
            UserError: if a setting is out of its range.
            TypeError: if there is no such setting, or it is no number.
        """
        given: dict[str, Any] = dict(options)
        defaults = dataclasses.asdict(cls())
        for name, value in given.items():
            if name not in defaults:
                raise TypeError(f"there is no sampling setting {name!r}; there are {', '.join(defaults)}")
            if name == "stop":
                if not isinstance(value, Iterable) or not all(isinstance(one, str) for one in value):
                    raise TypeError(f"stop must be a string or several, got {value!r}")
                given[name] = (value,) if isinstance(value, str) else tuple(value)
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            elif isinstance(defaults[name], int) and value != int(value):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        return dataclasses.replace(base or cls(), **given)


class Sampler:
    """Draws the tokens of one text, by :func:`next_tokens`.

    Args:
        sampling: how to draw.
        generator: of the CPU; a draw with a temperature above 0 takes one number from it.
        banned: tokens that are never drawn.
        seen: tokens that the repetition penalty counts from the start.

    Attributes:
        seen: the tokens so far, which the repetition penalty counts; may grow between draws.
        banned: the tokens that are never drawn; :meth:`ban` replaces them.
    """

    def __init__(
        self, sampling: Sampling, generator: torch.Generator, banned: Iterable[int] = (), seen: Iterable[int] = ()
    ) -> None:
        self.sampling = sampling
        self.generator = generator
        self.seen = array("q", seen)
        self._row = SampleRow(
            top_p=max(sampling.top_p, MIN_TOP_P),
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            temperature=sampling.temperature,
            top_k=min(sampling.top_k, 2**62),
        )
        self.ban(array("q", banned))

    def ban(self, tokens: array[int]) -> None:
        """Replaces the tokens that are never drawn."""
        self.banned = tokens
        self._row.barred, self._row.n_barred = tokens.buffer_info()

    def number(self) -> float:
        """Returns the next random number, uniform in [0, 1)."""
        if self.sampling.temperature == 0:
            return 0.0
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def row(self) -> SampleRow:
        """Returns what the native kernel reads for the next draw; valid until ``seen`` grows."""
        row = self._row
        row.number = self.number()
        if self.sampling.repetition_penalty != 1:
            row.seen, row.n_seen = self.seen.buffer_info()
        return row


def next_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draws a token for each text; what one gets does not depend on the others.

    Args:
        logits: (B, V) any floating type, any device; -inf for tokens that must not come.
        samplers: those of the B texts.

    Raises:
        UserError: if a row holds NaN or infinity, or no finite number.
    """
    scores = logits.detach().to("cpu", torch.float32)
    if not scores.amax(-1).isfinite().all():  # of rows with a NaN that is one, too
        raise UserError("the model gives no numbers: its weights are damaged, or its training ran away")
    if runs_native("sample", scores):
        return sample(scores, [sampler.row() for sampler in samplers])
    return [_draw(row, sampler) for row, sampler in zip(scores, samplers, strict=True)]


def _draw(scores: Tensor, sampler: Sampler) -> int:
    """Draws a token by ``scores`` (V,) float32: the reference of the kernel."""
    sampling, scores = sampler.sampling, scores.clone()
    if sampling.repetition_penalty != 1 and sampler.seen:
        index = torch.tensor(sorted(set(sampler.seen)))
        old = scores[index]
        scores[index] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    scores[list(sampler.banned)] = -torch.inf
    if sampling.temperature == 0:
        return int(scores.argmax())
    ids, probability = _kept((scores - scores.max()) / max(sampling.temperature, MIN_TEMPERATURE), sampling)
    ids, order = ids.sort()
    cumulative = probability[order].double().cumsum(0)
    draw = sampler.number() * cumulative[-1]
    return int(ids[min(int(torch.searchsorted(cumulative, draw, right=True)), len(ids) - 1)])


def _kept(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that the filters of ``sampling`` keep and their probabilities; scores (V,) are float32."""
    if not sampling.top_k and sampling.top_p == 1:  # nothing asks for an order
        probability = scores.softmax(0)
        keep = (probability >= sampling.min_p * probability.max()) & (probability > 0)
        return keep.nonzero()[:, 0], probability[keep]
    count = min(sampling.top_k or len(scores), len(scores))
    # A few tokens usually have all the probability that top_p asks for, and sorting a whole vocabulary takes longer
    # than a step of a small model.
    size = count if sampling.top_k else min(FIRST_LIKELIEST, count)
    while True:
        ordered, ids = _largest(scores, size)
        probability = (ordered - (ordered if sampling.top_k else scores).logsumexp(0)).exp()
        keep = (probability >= sampling.min_p * probability[0]) & (probability > 0)
        if sampling.top_p < 1:  # a token stays if those before it don't reach top_p yet
            keep &= probability.cumsum(0) - probability < sampling.top_p
        keep[0] = True
        if size == count or not keep[-1]:
            return ids[keep], probability[keep]
        size = min(8 * size, count)


def _largest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first ``size`` values of a stable descending sort of ``scores``, and their places."""
    candidates = (scores >= scores.topk(size).values[-1]).nonzero()[:, 0]
    ordered, order = scores[candidates].sort(descending=True, stable=True)
    return ordered[:size], candidates[order[:size]]
