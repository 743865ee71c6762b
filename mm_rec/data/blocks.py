"""A flat array in a file, of which every block is compared with its hash whenever it is read.

The file is read once from its start to its end when it is opened, compared with the SHA-256 that it has to have, and
the hash of each block is kept. From then on a block is read into memory, hashed and handed on: nothing is mapped, so
that whoever changes, cuts or replaces the file meanwhile never changes what is trained on. Threads may read at the same
time, and so may processes that share what is open since one was made as a copy of the other.
"""

from __future__ import annotations

import hashlib
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_rec import system
from mm_rec.regular_file import open_regular
from mm_rec.storage.files import DamageError
from mm_rec.translation import Translatable

__all__ = ["BlockArray"]

_BLOCK_BYTES = 1 << 14
"""A row of a batch needs a kilobyte or two; a block is hashed in some 10 µs, and its hash takes 1/512 of its size."""
_CACHED_BLOCKS = 1 << 10
"""Blocks that stay in memory: the lanes of a batch, and all of a small set of conversations."""
_BLOCKS_AT_ONCE = 1 << 8


class BlockArray:
    """A read-only array of unsigned integers in a file.

    Args:
        path: the file.
        dtype: type of the numbers, whose size is a power of two.
        n_bytes, sha256: what the file has to be.
        whole: the folder that is made anew as a whole if the file is damaged.

    Attributes:
        dtype: type of the numbers.
        largest: the largest of them.

    Raises:
        DamageError: if the file cannot be read or is not what it has to be, now or at any later read.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], n_bytes: int, sha256: str, whole: Path) -> None:
        self.dtype = dtype
        self.largest = 0
        self._path = path
        self._whole = whole
        self._length = n_bytes // dtype.itemsize
        self._block_length = _BLOCK_BYTES // dtype.itemsize
        self._shift = self._block_length.bit_length() - 1
        self._hashes: list[bytes] = []
        self._cache: dict[int, NDArray[Any]] = {}
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise self._unreadable(error) from error
        weakref.finalize(self, self._file.close)
        self._check_whole(n_bytes, sha256)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[Any]:
        """The numbers of a slice of step 1 or at the places (N,), in memory of their own."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            if step != 1:
                raise IndexError("only stretches and places can be read")
            index = np.arange(start, stop)
        result = np.empty(len(index), self.dtype)
        blocks = index >> self._shift
        edges = np.flatnonzero(np.diff(blocks)) + 1
        for first, last in pairwise([0, *edges.tolist(), len(index)]):  # as long as places lie in one block
            if first < last:
                number = int(blocks[first])
                result[first:last] = self._block(number)[index[first:last] - (number << self._shift)]
        return result

    def sum(self) -> int:
        """Returns the sum of all numbers."""
        return sum(int(self._block(number).sum(dtype=int)) for number in range(len(self._hashes)))

    def _check_whole(self, n_bytes: int, sha256: str) -> None:
        """Read the file for the first time."""
        digest, total = hashlib.sha256(), 0
        while content := self._read(total, _BLOCKS_AT_ONCE * _BLOCK_BYTES):
            digest.update(content)
            total += len(content)
            view = memoryview(content)
            self._hashes += [_hash(view[start : start + _BLOCK_BYTES]) for start in range(0, len(view), _BLOCK_BYTES)]
            numbers = np.frombuffer(content, self.dtype, len(content) // self.dtype.itemsize)
            self.largest = max(self.largest, int(numbers.max(initial=0)))
        if total != n_bytes or n_bytes % self.dtype.itemsize:
            raise self._damaged(
                Translatable("does not have the {n_bytes} bytes that its index states", n_bytes=n_bytes)
            )
        if digest.hexdigest() != sha256:
            raise self._damaged("does not match its SHA-256")

    def _block(self, number: int) -> NDArray[Any]:
        block = self._cache.pop(number, None)
        if block is None:
            content = self._read(number * _BLOCK_BYTES, _BLOCK_BYTES)
            if _hash(content) != self._hashes[number]:
                raise self._damaged(
                    Translatable(
                        "was changed while it was in use; delete {whole}, the next run makes it anew", whole=self._whole
                    )
                )
            block = np.frombuffer(content, self.dtype)
            if len(self._cache) >= _CACHED_BLOCKS:
                self._cache.pop(next(iter(self._cache)), None)  # another thread may have been faster
        self._cache[number] = block  # the last one to go
        return block

    def _read(self, place: int, n_bytes: int) -> bytearray:
        """The bytes from ``place`` on: ``n_bytes``, or up to the end of the file."""
        content = bytearray()
        try:
            while len(content) < n_bytes and (
                part := system.read_at(self._file.fileno(), n_bytes - len(content), place + len(content))
            ):
                content += part
        except OSError as error:
            raise self._unreadable(error) from error
        return content

    def _unreadable(self, error: OSError) -> DamageError:
        return self._damaged(Translatable("cannot be read: {reason}", reason=error.strerror or error))

    def _damaged(self, how: str) -> DamageError:
        return DamageError("{path} {how}", path=self._path, how=how)


def _hash(content: bytearray | memoryview) -> bytes:
    return hashlib.sha256(content).digest()
