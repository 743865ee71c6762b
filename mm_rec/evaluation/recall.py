"""How far back a model remembers: associative recall of many pairs, and a pass key hidden in a long text.

Both give the share of right answers by distance, in tokens of filler between what is to be remembered and the
question. Answers are chosen among few, so that chance is known and a small model's memory shows before it can spell.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm_rec.model import MMRecModel
from mm_rec.state import ModelState, map_state
from mm_rec.text.tokenizer import CONTROL_TOKENS, Tokenizer

__all__ = ["Recall", "associative_recall", "passkey"]

PAIRS = 8
CANDIDATES = 10
CHUNK = 512
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Recall(NamedTuple):
    """Share of right answers at a distance; ``chance`` is that of guessing."""

    distance: int
    accuracy: float
    chance: float
    answers: int


@torch.inference_mode()
def associative_recall(
    model: MMRecModel,
    tokenizer: Tokenizer,
    domain: str | None,
    distances: Sequence[int],
    *,
    trials: int = 16,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> list[Recall]:
    """Multi-query associative recall (MQAR, arXiv 2312.04927), of eight pairs of random tokens.

    A row is ``k1 v1 ... k8 v8``, filler, and the pairs again in another order. An answer is right if, after a key
    of the second part, its own value is the likeliest of the eight.

    Args:
        model: to measure, on any device.
        tokenizer: of the model.
        domain: the expert that reads; None fuses all.
        distances: tokens of filler.
        trials: rows for each distance.
        seed: of the pairs.
        between: called between two pieces of work.
    """
    results = []
    ordinary = range(len(CONTROL_TOKENS), tokenizer.vocab_size)
    for distance in distances:
        rng = random.Random(f"{seed}/{distance}")
        rows, queries, values, right = [], [], [], []
        for _ in range(trials):
            tokens = rng.sample(ordinary, 2 * PAIRS)
            pairs = list(zip(tokens[::2], tokens[1::2], strict=True))
            order = rng.sample(range(PAIRS), PAIRS)
            rows.append([tokenizer.bos_id, *tokens, *_filler(tokenizer, distance)])
            queries.append([token for index in order for token in pairs[index]])
            values.append(tokens[1::2])
            right.append(order)
        state = _read(model, rows, domain, between)
        device = model.embedding.weight.device
        logits, _ = model(torch.tensor(queries, device=device), state, domain)
        candidates = torch.tensor(values, device=device)[:, None].expand(-1, PAIRS, -1)
        chosen = logits[:, ::2].gather(-1, candidates).argmax(-1).cpu()
        accuracy = float((chosen == torch.tensor(right)).double().mean())
        results.append(Recall(distance, accuracy, 1 / PAIRS, trials * PAIRS))
    return results


@torch.inference_mode()
def passkey(
    model: MMRecModel,
    tokenizer: Tokenizer,
    domain: str | None,
    distances: Sequence[int],
    *,
    trials: int = 16,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> list[Recall]:
    """Retrieval of a pass key (arXiv 2305.16300): a number said at the start, filler, then the question.

    An answer is right if the number is likelier than nine others. Arguments as in :func:`associative_recall`.
    """
    results = []
    question = tokenizer.encode(" What is the pass key? The pass key is")
    for distance in distances:
        rng = random.Random(f"{seed}/{distance}")
        rows, answers = [], []
        for _ in range(trials):
            keys = rng.sample(range(10_000, 100_000), CANDIDATES)
            statement = tokenizer.encode(f"The pass key is {keys[0]}. Remember it. {keys[0]} is the pass key.")
            rows.append([tokenizer.bos_id, *statement, *_filler(tokenizer, distance), *question[:-1]])
            answers += tokenizer.encode_batch([f" {key}" for key in keys])
        state = _read(model, rows, domain, between)
        state = map_state(state, lambda tensor: tensor.repeat_interleave(CANDIDATES, dim=0))
        nats = _continuation_nats(model, state, question[-1], answers, domain).view(trials, CANDIDATES)
        accuracy = float((nats.argmin(-1) == 0).double().mean())
        results.append(Recall(distance, accuracy, 1 / CANDIDATES, trials))
    return results


def _filler(tokenizer: Tokenizer, length: int) -> list[int]:
    sentence = tokenizer.encode(FILLER)
    return (sentence * (length // len(sentence) + 1))[:length]


def _read(model: MMRecModel, rows: list[list[int]], domain: str | None, between: Callable[[], None]) -> ModelState:
    """The state after rows of any lengths, padded at their left."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    reset = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = torch.tensor(row)
        reset[index, length - len(row)] = True
    device = model.embedding.weight.device
    state = model.initial_state(len(rows), domain)
    for chunk, starts in zip(tokens.to(device).split(CHUNK, 1), reset.to(device).split(CHUNK, 1), strict=True):
        between()
        no_loss = torch.zeros(chunk.shape, device=device)  # and so no logits
        _, state = model(chunk, state, domain, starts, targets=chunk, weight=no_loss)
    return state


def _continuation_nats(
    model: MMRecModel, state: ModelState, last: int, continuations: list[list[int]], domain: str | None
) -> Tensor:
    """(B,) negative log-likelihood of each row's continuation; ``last`` is the token before it, not read yet."""
    length = max(map(len, continuations))
    targets = torch.zeros(len(continuations), length, dtype=torch.int64)
    weight = torch.zeros(len(continuations), length)
    for index, tokens in enumerate(continuations):
        targets[index, : len(tokens)] = torch.tensor(tokens)
        weight[index, : len(tokens)] = 1
    inputs = torch.cat([torch.full((len(continuations), 1), last), targets[:, :-1]], dim=1)
    device = model.embedding.weight.device
    output, _ = model(inputs.to(device), state, domain, targets=targets.to(device), weight=weight.to(device))
    nats: Tensor = output.nll.sum(dim=1).cpu()
    return nats
