"""Batches of tokens as a pure function of (stores, seed, index): resuming at any step is exact and instant.

``windows`` (short rows, no state carried): a domain's token stream is cut into windows of T inputs, which are
permuted anew in each epoch. ``lanes`` (state carried): its documents are permuted, laid end to end and split into B
lanes, and micro-batch k reads the k-th T tokens of each lane.

In both, each token of a domain is an input once per epoch; what is left of the last rows of an epoch is filled with
tokens of weight 0. A token's target is the token after it in its document; the last one of a document has no target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_rec.data.pack import TokenStore

__all__ = ["Batch", "Batches", "EvenBatches"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows and T tokens.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, the token after each; one of another document has weight 0.
        weight: (B, T) float32, 1 / (counted targets) where the target counts, else 0: the loss is
            ``(weight * nll).sum()``, a mean. All 0 in the rare batch without a counted target.
        reset: (B, T) bool, True where a document or a piece of one starts.
        domain: of all rows, or None if they are mixed.
    """

    tokens: Tensor
    targets: Tensor
    weight: Tensor
    reset: Tensor
    domain: str | None


class _Places(NamedTuple):
    """What a batch reads, (B, T) each: places in the stream, whether a state starts there, whether it is no filling."""

    where: Ints
    reset: Bools
    real: Bools


class Batches:
    """Micro-batches over token stores, one store a domain."""

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        layout: Literal["windows", "lanes"],
        mixed: bool = False,
        document_limit: int | None = None,
        more: Mapping[str, TokenStore] | None = None,
    ) -> None:
        """Lay out ``stores``.

        Args:
            stores: by domain; the order of the names doesn't matter.
            batch_size: B.
            seq_len: T.
            seed: of the permutations.
            layout: ``windows`` or ``lanes``.
            mixed: if False, each micro-batch is of one domain, and domains take turns in proportion to their tokens;
                if True, rows draw from all domains at once.
            document_limit: with ``lanes``, documents are cut into pieces of at most so many tokens, each of which
                starts with an empty state.
            more: further documents of some of the domains, which are never cut.

        Raises:
            ValueError: for a size below 1, no store, an unknown layout or a ``document_limit`` without lanes.
        """
        if not stores or batch_size < 1 or seq_len < 1:
            raise ValueError("batches need at least one store, one row and one token a row")
        if layout not in ("windows", "lanes"):
            raise ValueError(f"layout must be 'windows' or 'lanes', got {layout!r}")
        if document_limit is not None and (layout != "lanes" or document_limit < 1):
            raise ValueError("document_limit must be at least 1 and needs the layout 'lanes'")
        domains = sorted(stores)
        self._domains: list[str | None] = [None] if mixed else [*domains]
        self._streams: list[_Windows | _Lanes] = []
        for domain in self._domains:
            names = [name for name in domains if domain in (None, name)]
            whole = [more[name] for name in names if name in more] if more else []
            tokens = _Tokens([*(stores[name] for name in names), *whole])
            order = _Order(seed, domain or "mixed")
            self._streams.append(
                _Windows(tokens, order, batch_size, seq_len)
                if layout == "windows"
                else _Lanes(tokens, order, batch_size, seq_len, _limits(tokens, whole, document_limit))
            )
        self._shares = [stream.tokens.total for stream in self._streams]

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all stores."""
        return sum(self._shares)

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch ``index`` (from 0): the same for the same construction and index, whatever was read before."""
        turn, position = _turn(index, self._shares)
        stream = self._streams[turn]
        places = stream.places(position)
        tokens, targets, is_target = stream.tokens.read(places.where)
        counted = is_target & places.real
        weight = counted.astype(np.float32) / np.float32(max(int(counted.sum()), 1))
        return Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            weight=torch.from_numpy(weight),
            reset=torch.from_numpy(places.reset),
            domain=self._domains[turn],
        )

    def epochs(self, index: int) -> dict[str, float]:
        """How many times each domain was read before micro-batch ``index``; one entry ``mixed`` if domains are."""
        return {
            name or "mixed": count / stream.batches_per_epoch
            for name, stream, count in zip(self._domains, self._streams, _counts(index, self._shares), strict=True)
        }


class EvenBatches:
    """Micro-batches whose rows are windows of the domains in turn, as many of each however much data it has."""

    def __init__(self, stores: Mapping[str, TokenStore], *, batch_size: int, seq_len: int, seed: int) -> None:
        """Lay out ``stores``; arguments as of :class:`Batches`."""
        self._batch_size = batch_size
        self._rows = [
            Batches({name: stores[name]}, batch_size=1, seq_len=seq_len, seed=seed, layout="windows")
            for name in sorted(stores)
        ]

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch ``index`` (from 0), as :meth:`Batches.micro_batch`; its weights sum to 1 / B in each row."""
        first, n = index * self._batch_size, len(self._rows)
        rows = [self._rows[row % n].micro_batch(row // n) for row in range(first, first + self._batch_size)]
        return Batch(
            tokens=torch.cat([row.tokens for row in rows]),
            targets=torch.cat([row.targets for row in rows]),
            weight=torch.cat([row.weight for row in rows]) / self._batch_size,
            reset=torch.cat([row.reset for row in rows]),
            domain=None,
        )


def _counts(index: int, shares: list[int]) -> list[int]:
    """How many of the first ``index`` turns belong to each share, to within one turn of its proportion.

    The first share takes its rounded part of all turns, the second its part of what that leaves, and so on: closed
    in ``index``, and each further turn adds one to exactly one share.

    >>> [_counts(index, [1, 2]) for index in range(4)]
    [[0, 0], [0, 1], [1, 1], [1, 2]]
    """
    counts, left, weight = [], index, sum(shares)
    for share in shares:
        counts.append((2 * left * share + weight) // (2 * weight) if share < weight else left)
        left -= counts[-1]
        weight -= share
    return counts


def _turn(index: int, shares: list[int]) -> tuple[int, int]:
    """Whose turn ``index`` is, and how many turns that share had before."""
    before, after = _counts(index, shares), _counts(index + 1, shares)
    turn = next(i for i in range(len(shares)) if after[i] > before[i])
    return turn, before[turn]


class _Order:
    """Random numbers of each epoch of one stream, from raw bits, which stay the same across versions of numpy."""

    def __init__(self, seed: int, name: str) -> None:
        self._key = f"{seed}/{name}"

    def permutation(self, epoch: int, n: int) -> Ints:
        """0 to n-1 in random order."""
        return np.argsort(self._bits(f"{self._key}/{epoch}/order").random_raw(n), kind="stable")

    def below(self, epoch: int, n: int) -> int:
        """A number from 0 to n-1."""
        return int(self._bits(f"{self._key}/{epoch}/phase").random_raw()) % n

    @staticmethod
    def _bits(key: str) -> np.random.PCG64:
        return np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little"))


class _Tokens:
    """The stores of a stream as one long array of documents."""

    def __init__(self, stores: list[TokenStore]) -> None:
        self._stores = stores
        self._bases = np.cumsum([0, *(store.n_tokens for store in stores)])
        self.total = int(self._bases[-1])
        starts = [store.offsets[:-1] + base for store, base in zip(stores, self._bases[:-1], strict=True)]
        self.offsets: Ints = np.concatenate([*starts, [self.total]]).astype(np.int64)

    def starts(self, index: Ints) -> Bools:
        """Whether a document starts at each index; the end of the stream counts as a start."""
        found = self.offsets[np.searchsorted(self.offsets, index)]
        return np.asarray(found == index)

    def read(self, index: Ints) -> tuple[Ints, Ints, Bools]:
        """The tokens at ``index``, the tokens after them, and whether those are targets."""
        after = index + 1
        is_target = ~self.starts(after)
        after = np.minimum(after, self.total - 1)
        tokens, targets = np.empty_like(index), np.empty_like(index)
        for store, base in zip(self._stores, self._bases[:-1], strict=True):
            here = (index >= base) & (index < base + store.n_tokens)
            tokens[here] = store.tokens[index[here] - base]
            here = (after >= base) & (after < base + store.n_tokens)
            targets[here] = store.tokens[after[here] - base]
            if store.loss_mask is not None:
                is_target[here] &= store.loss_mask[after[here] - base] != 0
        return tokens, targets, is_target


class _Windows:
    """Rows of T tokens: the stream, rotated by a random phase, cut and permuted in each epoch.

    The phase cuts the stream in other places each time, so that no token is at the start of a row in every epoch.
    """

    def __init__(self, tokens: _Tokens, order: _Order, batch_size: int, seq_len: int) -> None:
        self.tokens = tokens
        self._shape = (batch_size, seq_len)
        self._rows = -(-tokens.total // seq_len)
        self.batches_per_epoch = self._rows / batch_size
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch: (order.below(epoch, tokens.total), order.permutation(epoch, self._rows))
        )

    def places(self, batch: int) -> _Places:
        """Of micro-batch ``batch`` of this stream; its rows may be of two epochs."""
        n_rows, length = self._shape
        positions, phases = np.empty(self._shape, dtype=np.int64), np.empty((n_rows, 1), dtype=np.int64)
        for row in range(n_rows):
            epoch, turn = divmod(batch * n_rows + row, self._rows)
            phases[row], windows = self._epoch(epoch)
            positions[row] = windows[turn] * length + np.arange(length)
        where = (phases + positions) % self.tokens.total
        reset = self.tokens.starts(where)
        reset[:, 0] = True
        return _Places(where, reset, positions < self.tokens.total)


class _Lanes:
    """Pieces of documents, permuted in each epoch, end to end in B lanes that are read T tokens at a time.

    Lane b holds tokens b·N/B to (b+1)·N/B of the N tokens of an epoch. A lane that starts inside of a piece starts
    with a reset there. Where a lane is at its end the row is filled with weight 0.
    """

    def __init__(self, tokens: _Tokens, order: _Order, batch_size: int, seq_len: int, limits: Ints | None) -> None:
        self.tokens = tokens
        self._seq_len = seq_len
        self._edges = np.arange(batch_size + 1) * tokens.total // batch_size
        self.batches_per_epoch = -(-int(np.diff(self._edges).max()) // seq_len)
        self._starts, self._lengths = _pieces(tokens.offsets, limits)
        self._order = order
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def _lay_out(self, epoch: int) -> tuple[Ints, Ints]:
        """Where the pieces of an epoch start in the stream, and where in the epoch (the last entry is its end)."""
        order = self._order.permutation(epoch, len(self._starts))
        return self._starts[order], np.concatenate([[0], np.cumsum(self._lengths[order])])

    def places(self, batch: int) -> _Places:
        """Of micro-batch ``batch`` of this stream, which continues the rows of the one before it."""
        epoch, step = divmod(batch, self.batches_per_epoch)
        starts, begins = self._epoch(epoch)
        position = self._edges[:-1, None] + step * self._seq_len + np.arange(self._seq_len)
        real = position < self._edges[1:, None]
        position = np.minimum(position, self.tokens.total - 1)
        piece = np.searchsorted(begins, position, side="right") - 1
        reset = begins[piece] == position
        if step == 0:
            reset[:, 0] = True
        return _Places(starts[piece] + position - begins[piece], reset, real)


def _limits(tokens: _Tokens, whole: list[TokenStore], limit: int | None) -> Ints | None:
    """The most tokens of a piece of each document; those of the stores ``whole``, the last ones, stay whole."""
    if limit is None:
        return None
    limits = np.full(len(tokens.offsets) - 1, limit)
    count = sum(store.n_documents for store in whole)
    limits[len(limits) - count :] = tokens.total
    return limits


def _pieces(offsets: Ints, limits: Ints | None) -> tuple[Ints, Ints]:
    """Start and length of the pieces, of at most so many tokens each, that documents are cut into.

    >>> _pieces(np.array([0, 5, 7, 11]), np.array([2, 2, 9]))
    (array([0, 2, 4, 5, 7]), array([2, 2, 1, 2, 4]))
    """
    lengths = np.diff(offsets)
    if limits is None:
        return offsets[:-1], lengths
    count = -(-lengths // limits)
    first = np.cumsum(count) - count
    limits = np.repeat(limits, count)
    within = (np.arange(int(count.sum())) - np.repeat(first, count)) * limits
    starts = np.repeat(offsets[:-1], count) + within
    return starts, np.minimum(np.repeat(offsets[1:], count) - starts, limits)
