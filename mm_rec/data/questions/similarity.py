"""Which texts of many are nearly the same as a given one.

The similarity of two texts is 2·M / (m + n) with M the length of their longest common subsequence of characters, m and
n their lengths. It is never below the ratio of ``difflib.SequenceMatcher``, whose matches are one common subsequence.
All texts are compared at once, 64 characters a machine word (Hyyrö, "Bit-parallel LCS-length computation revisited").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NearTexts"]

Words = NDArray[np.uint64]
_BITS = 64
_AT_ONCE = 4096
_ONES = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)


class NearTexts:
    """Finds whether a text is near to one of many.

    Args:
        texts: those to compare with.
        least: the similarity from which two texts count as near.
    """

    def __init__(self, texts: Sequence[str], least: float) -> None:
        self._least = least
        self._texts = sorted(set(texts), key=len)
        self._lengths = np.array([len(text) for text in self._texts], dtype=np.int64)
        self._counts = _count_characters(self._texts)

    def has_near(self, text: str) -> bool:
        """Whether the similarity of ``text`` with one of the texts reaches the least that counts."""
        shorter, longer = self._least / (2 - self._least), (2 - self._least) / self._least
        first = int(np.searchsorted(self._lengths, shorter * len(text), side="left"))
        last = int(np.searchsorted(self._lengths, longer * len(text), side="right"))
        total = len(text) + self._lengths[first:last]
        common = np.minimum(self._counts[first:last], _count_characters([text])).sum(axis=1)
        candidates = np.flatnonzero(2 * common >= self._least * total) + first
        for begin in range(0, len(candidates), _AT_ONCE):
            rows = candidates[begin : begin + _AT_ONCE]
            if self._is_near([self._texts[row] for row in rows], text):
                return True
        return False

    def _is_near(self, patterns: list[str], text: str) -> bool:
        """Whether one of ``patterns`` reaches the similarity; rows that no longer can are left out on the way."""
        lengths = np.array([len(pattern) for pattern in patterns], dtype=np.int64)
        needed = self._least * (lengths + len(text)) / 2 - 1e-9
        masks = _masks(patterns, set(text))
        rows = np.full_like(masks[text[0]], np.iinfo(np.uint64).max)  # a bit 0 is a character of the subsequence
        for at, character in enumerate(text, 1):
            matched = rows & masks[character]
            rows = _add(rows, matched) | (rows & ~matched)
            if at % _BITS == 0 or at == len(text):
                found = _count_bits(np.ascontiguousarray(~rows))
                keep = found + (len(text) - at) >= needed
                if not keep.any():
                    return False
                if not keep.all():
                    rows, needed = rows[:, keep], needed[keep]
                    masks = {one: mask[:, keep] for one, mask in masks.items()}
        return True


def _masks(patterns: list[str], characters: set[str]) -> dict[str, Words]:
    """For each of ``characters`` the bits at which each pattern has it; a column a pattern."""
    width = _BITS * -(-max(map(len, patterns)) // _BITS)
    codes = np.zeros((len(patterns), width), dtype=np.uint32)
    for row, pattern in enumerate(patterns):
        codes[row, : len(pattern)] = _codes(pattern)
    packed = {one: np.packbits(codes == ord(one), axis=1, bitorder="little") for one in characters}
    return {one: np.ascontiguousarray(bits.view("<u8").astype(np.uint64).T) for one, bits in packed.items()}


def _count_bits(rows: Words) -> NDArray[np.int64]:
    """The ones of each column."""
    ones = _ONES[rows.view(np.uint8)].reshape(*rows.shape, 8)
    return np.asarray(ones.sum(axis=(0, 2), dtype=np.int64))


def _add(left: Words, right: Words) -> Words:
    """The sums of numbers of several words, the lowest first."""
    result = np.empty_like(left)
    carry = np.zeros(left.shape[1], dtype=np.uint64)
    for word in range(len(left)):
        total = left[word] + right[word]
        result[word] = total + carry
        carry = ((total < left[word]) | (result[word] < total)).astype(np.uint64)
    return result


def _count_characters(texts: Sequence[str]) -> NDArray[np.int16]:
    """How often each text has each character, those of one remainder counted together."""
    counts = np.zeros((len(texts), 128), dtype=np.int16)
    for row, text in enumerate(texts):
        counts[row] = np.bincount(_codes(text) % 128, minlength=128)
    return counts


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
