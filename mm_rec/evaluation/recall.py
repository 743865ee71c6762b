"""How far back a model remembers: something said once in a long text, and asked for thousands of tokens later.

A row is a passage of a document, a needle, then so many tokens of the document, then the question. Ten answers of one
kind and length are compared, and all ten occur in the row, each once: a model that only finds likely what it has seen
is right in one of ten. What is hidden and asked stands in :mod:`mm_rec.evaluation.needle_templates`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_rec.evaluation.needle_templates import KINDS, NOISE, NeedleKind
from mm_rec.model import MMRecModel
from mm_rec.state import ModelState, flatten_state, map_state
from mm_rec.text.tokenizer import Tokenizer

__all__ = [
    "CANDIDATES",
    "Haystack",
    "Needles",
    "cells",
    "find_needles",
    "piece_of",
    "row_tokens",
    "state_bytes",
    "wilson_interval",
]

CANDIDATES = 10
BEFORE = 256  # tokens of the document before the needle
QUESTION = 200  # about so many tokens are read after the distance: the question and all candidates
CPU_TOKENS, CUDA_TOKENS = 4096, 2**17  # of a forward pass
CPU_ROWS, CUDA_ROWS = 8, 64
GREEDY_MORE = 2  # tokens beyond the length of the answer that a free answer has


class Needles(NamedTuple):
    """Answers to needles of one kind at one distance.

    Attributes:
        kind: the name of the kind.
        distance: tokens between the needle and the question.
        trials: rows.
        right: how many of them found the right one of ten candidates likeliest.
        free: how many began a free answer, the likeliest token each time, with it.
        low, high: the 95% interval of the share of right ones.
        chance: that of guessing.
    """

    kind: str
    distance: int
    trials: int
    right: int
    free: int
    low: float
    high: float
    chance: float = 1 / CANDIDATES

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.trials


def wilson_interval(right: int, trials: int) -> tuple[float, float]:
    """Returns the 95% interval of a share (Wilson 1927), which holds for few trials and for shares near 0 and 1.

    >>> [round(bound, 3) for bound in wilson_interval(95, 100)]
    [0.888, 0.978]
    """
    z, share = 1.96, right / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    middle, scale = share + z * z / (2 * trials), 1 + z * z / trials
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def state_bytes(model: MMRecModel, domain: str | None = None) -> int:
    """Bytes of the state of one row; with ``domain``, of that expert alone."""
    return sum(tensor.nbytes for tensor in flatten_state(model.initial_state(1, domain)).values())


class Haystack:
    """The text in which needles are hidden: documents end to end, without their BOS."""

    def __init__(self, documents: Sequence[np.ndarray], tokenizer: Tokenizer) -> None:
        self.tokens = np.concatenate([document[1:] for document in documents]).astype(np.int64)
        self._ends = np.array([one.rstrip(b"\"'")[-1:] in (b".", b"!", b"?", b"\n") for one in tokenizer.token_bytes])

    def holds(self, distance: int) -> bool:
        """Whether the text is long enough for needles over so many tokens."""
        return len(self.tokens) >= distance + BEFORE

    def passage(self, rng: random.Random, length: int) -> np.ndarray:
        """So many tokens from a random place on.

        Raises:
            ValueError: if the text is shorter.
        """
        last = len(self.tokens) - length
        if last < 0:
            raise ValueError(f"a passage of {length} tokens needs more than {len(self.tokens)}")
        first = rng.randint(0, last)
        return self.tokens[first : first + length]

    def gaps(self, text: np.ndarray) -> np.ndarray:
        """Places in ``text`` after the end of a sentence or line; its own end if there is none."""
        found = np.flatnonzero(self._ends[text]) + 1
        return found if len(found) else np.array([len(text)])


class _Row(NamedTuple):
    """Tokens from BOS to the end of the question, and the candidates' tokens, the right one first."""

    tokens: list[int]
    candidates: list[list[int]]
    answer: str


@torch.inference_mode()
def find_needles(
    model: MMRecModel,
    tokenizer: Tokenizer,
    domain: str | None,
    kind: NeedleKind,
    distance: int,
    haystack: Haystack | None,
    *,
    trials: int = 200,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Needles:
    """Hide needles of one kind and ask for them.

    Args:
        model: to measure, on any device.
        tokenizer: of the model.
        domain: the expert that reads; None fuses all.
        kind: of the needles.
        distance: tokens between needle and question.
        haystack: the text to hide them in; a kind in noise needs none.
        trials: rows.
        seed: of everything that is drawn.
        progress: called with the number of tokens after each piece that was read.

    Raises:
        ValueError: if the haystack is too short for the distance.
    """
    if kind.in_noise:
        sentence = tokenizer.encode(NOISE)
        repeats = (distance + BEFORE) // len(sentence) + 2
        haystack = Haystack([np.array([tokenizer.bos_id, *sentence * repeats])], tokenizer)
    assert haystack is not None, "a kind that is not in noise needs a text"
    make = _Maker(tokenizer, kind, haystack, distance)
    at_once, _ = piece_of(trials, model.embedding.weight.device)
    right = free = 0
    for first in range(0, trials, at_once):
        names = [f"{seed}/{kind.name}/{distance}/{trial}" for trial in range(first, min(first + at_once, trials))]
        group = [make.row(random.Random(name)) for name in names]
        state = _read(model, [row.tokens[:-1] for row in group], domain, progress)
        last = torch.tensor([row.tokens[-1] for row in group], device=model.embedding.weight.device)
        right += _right_candidates(model, state, last, group, domain)
        free += _right_free_answers(model, state, last, group, domain, tokenizer)
    return Needles(kind.name, distance, trials, right, free, *wilson_interval(right, trials))


class _Maker:
    """Makes rows of one kind at one distance."""

    def __init__(self, tokenizer: Tokenizer, kind: NeedleKind, haystack: Haystack, distance: int) -> None:
        self._tokenizer, self._kind, self._haystack, self._distance = tokenizer, kind, haystack, distance
        counts = [len(ids) for ids in tokenizer.encode_batch([f" {value}" for value in kind.values])]
        usual = max(set(counts), key=counts.count, default=0)
        by_fit = sorted(zip(counts, kind.values, strict=True), key=lambda pair: abs(pair[0] - usual))
        fitting = sum(count == usual for count in counts)
        self._words = [value for _, value in by_fit[: max(fitting, CANDIDATES)]]

    def row(self, rng: random.Random) -> _Row:
        kind = self._kind
        values = rng.sample(self._words, CANDIDATES) if kind.values else self._numbers(rng)
        keys = rng.sample(kind.keys, kind.needles) if kind.keys else [""]
        statement, question = rng.choice(kind.wordings)
        said = [statement.format(key=key, value=value) for key, value in zip(keys, values, strict=False)]
        said += [rng.choice(kind.others).format(value=value) for value in values[kind.needles :]]
        needle, *others = self._tokenizer.encode_batch([" " + sentence for sentence in said])
        before: list[list[int]] = []
        after: list[list[int]] = []
        for sentence in others:
            fits = sum(map(len, after)) + len(sentence) <= self._distance // 2
            is_after = fits and rng.random() < self._distance / (self._distance + BEFORE)
            (after if is_after else before).append(sentence)
        left = self._distance - sum(map(len, after))
        text = self._haystack.passage(rng, BEFORE + left)
        place = int(self._haystack.gaps(text[:BEFORE])[-1])
        tokens = [self._tokenizer.bos_id, *self._with(rng, text[:place], before), *needle]
        tokens += self._with(rng, text[place : place + left], after)
        tokens += self._tokenizer.encode("\n\n" + question.format(key=keys[0]))
        candidates = self._tokenizer.encode_batch([f" {value}" for value in values])
        return _Row(tokens, candidates, values[0])

    def _numbers(self, rng: random.Random) -> list[str]:
        """Ten different numbers of five digits and as many tokens as the first."""
        drawn: dict[str, None] = {}
        length = 0
        while len(drawn) < CANDIDATES:
            number = str(rng.randrange(10_000, 100_000))
            count = len(self._tokenizer.encode(f" {number}"))
            length = length or count
            if count == length:
                drawn[number] = None
        return list(drawn)

    def _with(self, rng: random.Random, text: np.ndarray, sentences: list[list[int]]) -> list[int]:
        """``text`` with the sentences at random places between its own."""
        gaps = self._haystack.gaps(text)
        places = sorted(int(rng.choice(gaps)) for _ in sentences)
        tokens: list[int] = []
        for begin, end, sentence in zip([0, *places], [*places, len(text)], [*sentences, []], strict=True):
            tokens += [*text[begin:end].tolist(), *sentence]
        return tokens


def piece_of(rows: int, device: torch.device) -> tuple[int, int]:
    """Returns how many of ``rows`` are read side by side, and how many tokens of each in one forward pass."""
    most, tokens = (CUDA_ROWS, CUDA_TOKENS) if device.type == "cuda" else (CPU_ROWS, CPU_TOKENS)
    at_once = math.ceil(rows / math.ceil(rows / most))  # so that the last group is not a small one
    return at_once, tokens // at_once


def row_tokens(distance: int) -> int:
    """About how many tokens are read for one row."""
    return BEFORE + distance + QUESTION


def cells(distances: Sequence[int], haystack: Haystack | None) -> list[tuple[NeedleKind, int]]:
    """Returns the kinds and distances that can be measured; without a haystack only those in noise."""
    return [
        (kind, distance)
        for kind in KINDS
        for distance in distances
        if kind.in_noise or (haystack is not None and haystack.holds(distance))
    ]


def _read(model: MMRecModel, rows: list[list[int]], domain: str | None, progress: Callable[[int], None]) -> ModelState:
    """The state after rows of any lengths, padded at their left."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    reset = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = torch.tensor(row)
        reset[index, length - len(row)] = True
    device = model.embedding.weight.device
    state = model.initial_state(len(rows), domain)
    _, chunk = piece_of(len(rows), device)
    for part, starts in zip(tokens.to(device).split(chunk, 1), reset.to(device).split(chunk, 1), strict=True):
        _, state = model.features(part, state, domain, starts)
        if device.type == "cuda":
            torch.cuda.synchronize()  # so that progress tells of what is done
        progress(part.numel())
    return state


def _right_candidates(model: MMRecModel, state: ModelState, last: Tensor, rows: list[_Row], domain: str | None) -> int:
    """In how many rows the right candidate is the likeliest; ``last`` is the token before it, not read yet."""
    state = map_state(state, lambda tensor: tensor.repeat_interleave(CANDIDATES, dim=0))
    continuations = [candidate for row in rows for candidate in row.candidates]
    length = max(map(len, continuations))
    targets = torch.zeros(len(continuations), length, dtype=torch.int64)
    weight = torch.zeros(len(continuations), length)
    for index, tokens in enumerate(continuations):
        targets[index, : len(tokens)] = torch.tensor(tokens)
        weight[index, : len(tokens)] = 1
    targets, weight = targets.to(last.device), weight.to(last.device)
    inputs = torch.cat([last.repeat_interleave(CANDIDATES)[:, None], targets[:, :-1]], dim=1)
    output, _ = model(inputs, state, domain, targets=targets, weight=weight)
    nats = output.nll.sum(dim=1).view(len(rows), CANDIDATES)
    return int((nats.argmin(-1) == 0).sum())


def _right_free_answers(
    model: MMRecModel, state: ModelState, last: Tensor, rows: list[_Row], domain: str | None, tokenizer: Tokenizer
) -> int:
    """In how many rows the likeliest tokens, one after the other, begin with the right answer."""
    tokens, drawn = last[:, None], []
    for _ in range(max(len(row.candidates[0]) for row in rows) + GREEDY_MORE):
        logits, state = model(tokens, state, domain)
        tokens = logits[:, -1:, : tokenizer.vocab_size].argmax(-1)
        drawn.append(tokens)
    texts = [tokenizer.decode(ids).strip() for ids in torch.cat(drawn, dim=1).tolist()]
    return sum(
        text.startswith(row.answer) and not text[len(row.answer) :][:1].isalnum()
        for text, row in zip(texts, rows, strict=True)
    )
