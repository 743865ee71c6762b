"""Bits per byte: the one quality number of a language model, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm_rec.data.pack import TokenStore
from mm_rec.model import MMRecModel
from mm_rec.state import ModelState, map_state

__all__ = ["Documents", "Score", "bytes_by_position", "evaluate", "position_bounds", "select_documents"]

TOKENS_PER_BATCH = 2048
CHUNK = 512
FIRST_BOUND = 64
SPREAD = 8
"""A capped selection takes at most one part in so many of its bytes from one document."""


@dataclass(frozen=True)
class Documents:
    """Documents to score.

    Attributes:
        tokens: of each, BOS first.
        n_bytes: UTF-8 bytes of all that counts.
        masks: for each document and token whether it counts, as in a :class:`TokenStore`; None if all do.
        cut: the numbers of those that are the beginning of a longer document.
    """

    tokens: list[np.ndarray]
    n_bytes: int
    masks: list[np.ndarray] | None = None
    cut: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of some documents, in bits, and what it is spread over: only what counts."""

    bits: float
    n_bytes: int
    n_tokens: int
    n_documents: int
    bits_by_position: tuple[float, ...]
    """What ``bits`` is made up of, by the place of a token in its document; see :func:`position_bounds`."""

    @property
    def bits_per_byte(self) -> float:
        """Bits of all bytes of the documents, divided by their UTF-8 bytes."""
        return self.bits / self.n_bytes


def position_bounds(count: int) -> list[int]:
    """Bounds of ``count`` ranges of places in a document, each twice as far out as the one before.

    >>> position_bounds(4)
    [0, 64, 128, 256, 512]
    """
    return [0, *(FIRST_BOUND << index for index in range(count))]


def bytes_by_position(documents: Documents, token_bytes: np.ndarray) -> list[int]:
    """The bytes that :attr:`Score.bits_by_position` is spread over; ``token_bytes`` as in :func:`select_documents`."""
    longest = max(map(len, documents.tokens))
    total = np.zeros(_range_of(longest) + 1, dtype=np.int64)
    for index, tokens in enumerate(documents.tokens):
        counted = 1 if documents.masks is None else documents.masks[index]
        places = np.searchsorted(position_bounds(len(total))[1:], np.arange(len(tokens)), side="right")
        np.add.at(total, places, token_bytes[tokens] * counted)
    sizes: list[int] = total.tolist()
    return sizes


def _range_of(place: int) -> int:
    """The number of the range that a place in a document belongs to."""
    return (place // FIRST_BOUND).bit_length()


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
    cut: set[int] = set()
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
        if size < store.n_bytes[index]:
            cut.add(len(chosen))
        chosen.append(tokens)
        if mask is not None:
            masks.append(mask[: len(tokens)])
        total += size
        if max_bytes is not None and total >= max_bytes - max_bytes // 64:
            break
    return Documents(chosen, total, masks if store.loss_mask is not None else None, frozenset(cut))


@torch.inference_mode()
def evaluate(
    model: MMRecModel,
    documents: Documents,
    domain: str | None,
    *,
    between: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda tokens: None,
    carry: Callable[[ModelState], ModelState] = lambda state: state,
) -> Score:
    """Score documents: each starts with BOS and an empty state and is read in order with the state carried.

    The token after a document's last byte is not counted. Documents of similar length share a batch; how
    they are batched changes the result by rounding only.

    Args:
        model: to score with, on any device.
        documents: at least one.
        domain: the expert that reads them; None fuses all experts.
        between: called between two pieces of work.
        progress: called with the number of tokens after each piece that was read.
        carry: makes of the state after a piece the one before the next.
    """
    masks = documents.masks or [np.ones(len(tokens), dtype=np.uint8) for tokens in documents.tokens]
    order = sorted(zip(documents.tokens, masks, strict=True), key=lambda pair: len(pair[0]), reverse=True)
    rows = max(1, TOKENS_PER_BATCH // CHUNK)
    nats = 0.0
    by_position = torch.zeros(_range_of(len(order[0][0])) + 1, dtype=torch.float64)
    bounds = torch.tensor(position_bounds(len(by_position))[1:])
    for first in range(0, len(order), rows):
        of_group = 0.0
        for place, piece in _read_group(model, order[first : first + rows], domain, between, carry):
            of_group += float(piece.double().sum().cpu())
            places = torch.arange(place, place + piece.shape[1])
            by_position.index_add_(0, torch.bucketize(places, bounds, right=True), piece.double().sum(0).cpu())
            progress(piece.numel())
        nats += of_group
    n_tokens = sum(int(mask[1:].sum(dtype=int)) for mask in masks)
    bits = tuple((by_position / math.log(2)).tolist())
    return Score(nats / math.log(2), documents.n_bytes, n_tokens, len(order), bits)


def _read_group(
    model: MMRecModel,
    group: Sequence[tuple[np.ndarray, np.ndarray]],
    domain: str | None,
    between: Callable[[], None],
    carry: Callable[[ModelState], ModelState],
) -> Iterator[tuple[int, Tensor]]:
    """Documents sorted from long to short, side by side; a row leaves when its document ends.

    Yields the place of the first token of a piece in its document, and the nats (rows, tokens) of what counts in it.
    """
    device = model.embedding.weight.device
    lengths = torch.tensor([len(tokens) - 1 for tokens, _ in group])
    padded = np.zeros((len(group), int(lengths[0]) + 1), dtype=np.int64)
    counted = np.zeros((len(group), int(lengths[0])), dtype=np.float32)
    for row, (tokens, mask) in enumerate(group):
        padded[row, : len(tokens)] = tokens
        counted[row, : len(tokens) - 1] = mask[1:]
    ids, weight = torch.from_numpy(padded).to(device), torch.from_numpy(counted).to(device)
    state = None
    for start in range(0, ids.shape[1] - 1, CHUNK):
        between()
        alive = int((lengths > start).sum())
        if state is not None:
            state = map_state(carry(state), _first_rows(alive))
        stop = min(start + CHUNK, ids.shape[1] - 1)
        output, state = model(
            ids[:alive, start:stop],
            state,
            domain,
            targets=ids[:alive, start + 1 : stop + 1],
            weight=weight[:alive, start:stop],
        )
        yield start + 1, output.nll


def _first_rows(count: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[:count]
