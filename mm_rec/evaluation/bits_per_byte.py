"""Bits per byte: the one quality number of a language model, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm_rec.data.pack import TokenStore
from mm_rec.model import MMRecModel
from mm_rec.state import map_state

__all__ = ["Documents", "Score", "evaluate", "select_documents"]

TOKENS_PER_BATCH = 2048
CHUNK = 512
SPREAD = 8
"""A capped selection takes at most one part in so many of its bytes from one document."""


@dataclass(frozen=True)
class Documents:
    """Documents to score.

    Attributes:
        tokens: of each, BOS first.
        n_bytes: UTF-8 bytes of all that counts.
        masks: for each document and token whether it counts, as in a :class:`TokenStore`; None if all do.
    """

    tokens: list[np.ndarray]
    n_bytes: int
    masks: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of some documents, in bits, and what it is spread over: only what counts."""

    bits: float
    n_bytes: int
    n_tokens: int
    n_documents: int

    @property
    def bits_per_byte(self) -> float:
        """Bits of all bytes of the documents, divided by their UTF-8 bytes."""
        return self.bits / self.n_bytes


def select_documents(store: TokenStore, token_bytes: np.ndarray, max_bytes: int | None = None) -> Documents:
    """The documents of a store to validate on: always the same ones.

    With a cap, documents are taken in the order of the store until it is reached, of each no more than its
    first ``max_bytes`` / 8 bytes, so that a few long ones don't stand for all.

    Args:
        store: one domain's held-out documents.
        token_bytes: (V,) the bytes that each token stands for, 0 for control tokens.
        max_bytes: how many bytes to take; None takes every document whole.
    """
    chosen: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    total = 0
    for index in range(store.n_documents):
        tokens, mask = store.document(index), store.mask(index)
        size = int(store.n_bytes[index])
        if max_bytes is not None:
            limit = min(max(max_bytes // SPREAD, 1), max_bytes - total)
            if size > limit:
                ends = np.cumsum(token_bytes[tokens] * (1 if mask is None else mask))
                tokens = tokens[: int(np.searchsorted(ends, limit, side="right"))]
                size = int(ends[len(tokens) - 1]) if len(tokens) else 0
        if len(tokens) < 2 or size == 0:
            continue
        chosen.append(tokens)
        if mask is not None:
            masks.append(mask[: len(tokens)])
        total += size
        if max_bytes is not None and total >= max_bytes - max_bytes // 64:
            break
    return Documents(chosen, total, masks if store.loss_mask is not None else None)


@torch.inference_mode()
def evaluate(
    model: MMRecModel,
    documents: Documents,
    domain: str | None,
    *,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Score documents: each starts with BOS and an empty state and is read in order with the state carried.

    The token after a document's last byte is not counted. Documents of similar length share a batch; how
    they are batched changes the result by rounding only.

    Args:
        model: to score with, on any device.
        documents: at least one.
        domain: the expert that reads them; None fuses all experts.
        between: called between two pieces of work.
    """
    masks = documents.masks or [np.ones(len(tokens), dtype=np.uint8) for tokens in documents.tokens]
    order = sorted(zip(documents.tokens, masks, strict=True), key=lambda pair: len(pair[0]), reverse=True)
    rows = max(1, TOKENS_PER_BATCH // CHUNK)
    nats = 0.0
    for first in range(0, len(order), rows):
        nats += _score_group(model, order[first : first + rows], domain, between)
    n_tokens = sum(int(mask[1:].sum(dtype=int)) for mask in masks)
    return Score(nats / math.log(2), documents.n_bytes, n_tokens, len(order))


def _score_group(
    model: MMRecModel,
    group: Sequence[tuple[np.ndarray, np.ndarray]],
    domain: str | None,
    between: Callable[[], None],
) -> float:
    """Nats of documents sorted from long to short, side by side; a row leaves when its document ends."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(tokens) - 1 for tokens, _ in group])
    padded = np.zeros((len(group), int(lengths[0]) + 1), dtype=np.int64)
    counted = np.zeros((len(group), int(lengths[0])), dtype=np.float32)
    for row, (tokens, mask) in enumerate(group):
        padded[row, : len(tokens)] = tokens
        counted[row, : len(tokens) - 1] = mask[1:]
    ids, weight = torch.from_numpy(padded).to(device), torch.from_numpy(counted).to(device)
    nats = torch.zeros((), dtype=torch.float64)
    state = None
    for start in range(0, ids.shape[1] - 1, CHUNK):
        between()
        alive = int((lengths > start).sum())
        if state is not None:
            state = map_state(state, _first_rows(alive))
        stop = min(start + CHUNK, ids.shape[1] - 1)
        output, state = model(
            ids[:alive, start:stop],
            state,
            domain,
            targets=ids[:alive, start + 1 : stop + 1],
            weight=weight[:alive, start:stop],
        )
        nats += output.nll.double().sum().cpu()
    return float(nats)


def _first_rows(count: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[:count]
