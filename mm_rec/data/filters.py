"""Quality filters and near-duplicate removal.

The rules for code are those of StarCoder (Li et al. 2023, arXiv:2305.06161, section 3.1), those for text follow Gopher
(Rae et al. 2021, arXiv:2112.11446, section A.1.1). Near-duplicates are found by MinHash and locality-sensitive hashing
(Broder 1997; Lee et al. 2022, arXiv:2107.06499).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from array import array
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mm_rec.translation import Translatable, join_texts

__all__ = ["NearDuplicates", "count_reasons", "quality_problem"]

_BLOCK = 4096  # signatures that are kept in one piece
_FIRST_PLACES = 1024
_EMPTY = 2**32 - 1

_SAMPLE = 20_000  # characters that a document is judged by
_MIN_TEXT, _MIN_CODE = 40, 40  # characters

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufffd]")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]+")
_LETTER = re.compile(r"[^\W\d_]+")
_GENERATED = re.compile(
    r"auto[- ]?generated|automatically generated|@generated|generated .{0,80}do not (edit|modify)", re.I
)


def quality_problem(text: str, domain: str) -> str | None:
    """Why a document should not be trained on, in a few words, or None if it is fine.

    ``domain`` is ``code`` for programs; everything else is held to the rules for prose.

    >>> quality_problem("= = Plot = =", "text")
    'too short'
    """
    if len(text.strip()) < (_MIN_CODE if domain == "code" else _MIN_TEXT):
        return Translatable("too short")
    sample = text[:_SAMPLE]
    if len(_CONTROL.findall(sample)) > 0.01 * len(sample):
        return Translatable("not printable")
    return _code_problem(sample) if domain == "code" else _text_problem(sample)


def count_reasons(counts: Mapping[str, int]) -> Translatable:
    """Returns how many documents or rows were left out for each reason, as a list in one line."""
    parts = (Translatable("{count:,} {reason}", count=count, reason=Translatable(why)) for why, count in counts.items())
    return join_texts(", ", parts)


def _text_problem(sample: str) -> str | None:
    if _matched(_LETTER, sample) < 0.5 * len(sample) and _letters_and_marks(sample) < 0.5 * len(sample):
        return Translatable("few letters")
    lines = [line for line in sample.split("\n") if line.strip()]
    if len(lines) >= 6 and len(set(lines)) < 0.7 * len(lines):
        return Translatable("repeated lines")
    if _compressed_share(sample) < 0.15:
        return Translatable("repetitive")
    return None


def _letters_and_marks(sample: str) -> int:
    """Returns the number of letters and of the signs that belong to one, as vowels do in Hindi and Thai."""
    return sum(unicodedata.category(sign)[0] in "LM" for sign in sample)


def _code_problem(sample: str) -> str | None:
    if _GENERATED.search(sample[:1000]):
        return Translatable("generated")
    lines = sample.split("\n")
    if max(map(len, lines)) > 1000 or len(sample) > 100 * len(lines):
        return Translatable("long lines")
    if _matched(_LETTER_OR_DIGIT, sample) < 0.25 * len(sample):
        return Translatable("few letters or digits")
    if _compressed_share(sample) < 0.08:
        return Translatable("repetitive")
    return None


def _matched(pattern: re.Pattern[str], sample: str) -> int:
    return sum(map(len, pattern.findall(sample)))


def _compressed_share(sample: str) -> float:
    """Size after compression relative to that before; short samples don't repeat enough to tell."""
    content = sample.encode("utf-8", "replace")
    return len(zlib.compress(content, 1)) / len(content) if len(content) >= 1000 else 1.0


class NearDuplicates:
    """Finds documents that share about four fifths of their five-word sequences with an earlier one.

    A document's signature is the minimum, over its word sequences, of each of 128 hash functions; the share of equal
    entries of two signatures estimates the Jaccard similarity of their sets of sequences. Documents are compared if
    they agree in one of 16 bands of 8 entries, which finds a similarity of 0.8 in 95 of 100 cases.

    Memory: BYTES_A_DOCUMENT. Signatures lie in blocks of numbers. For each band a hash table holds the number of the
    first document of each value; the values themselves are those of the signatures.
    """

    BYTES_A_DOCUMENT = 768
    """At most: 512 of the signature, and 16 places of 4 bytes in tables that are a quarter to a half full."""

    _WORDS = 5
    _BANDS, _ROWS = 16, 8
    _SIMILAR = 0.75  # estimated; the estimate is 0.04 off on average
    _CHUNK = 1024  # sequences at a time, so that the products stay in the cache

    def __init__(self) -> None:
        bits = np.random.PCG64(5).random_raw(2 * self._BANDS * self._ROWS)
        self._factors: NDArray[np.uint64] = bits[::2] | np.uint64(1)
        self._terms: NDArray[np.uint64] = bits[1::2]
        self._mix = np.random.PCG64(6).random_raw(self._WORDS) | np.uint64(1)
        self._keys = np.random.PCG64(7).random_raw(self._ROWS) | np.uint64(1)
        self._blocks: list[bytearray] = []
        self._count = 0
        self._tables = [array("I", [_EMPTY]) * _FIRST_PLACES for _ in range(self._BANDS)]

    def add(self, text: str) -> bool:
        """Remember ``text``, unless it is a near-duplicate of one remembered: then return True."""
        signature = self._signature(text)
        content = signature.tobytes()
        places = self._places(self._hashes(signature.reshape(self._BANDS, self._ROWS)).tolist(), content)
        earlier = {table[place] for table, place in zip(self._tables, places, strict=True)} - {_EMPTY}
        for i in earlier:
            other = np.frombuffer(self._read(i, 0, len(content)), np.uint32)
            if np.mean(signature == other) >= self._SIMILAR:
                return True
        if self._count % _BLOCK == 0:
            self._blocks.append(bytearray(_BLOCK * len(content)))
        start = self._count % _BLOCK * len(content)
        self._blocks[-1][start : start + len(content)] = content
        for table, place in zip(self._tables, places, strict=True):
            if table[place] == _EMPTY:
                table[place] = self._count
        self._count += 1
        if 2 * self._count > len(self._tables[0]):
            self._tables = [self._grown(band, table) for band, table in enumerate(self._tables)]
        return False

    def _read(self, i: int, start: int, end: int) -> bytearray:
        """Bytes of the signature of document ``i``."""
        ahead = i % _BLOCK * 4 * self._BANDS * self._ROWS
        return self._blocks[i // _BLOCK][ahead + start : ahead + end]

    def _places(self, hashes: list[int], content: bytes) -> list[int]:
        """The place of each band of a signature in its table, or the empty one where it belongs."""
        mask, places = len(self._tables[0]) - 1, []
        for band, (table, hashed) in enumerate(zip(self._tables, hashes, strict=True)):
            start, end = 4 * band * self._ROWS, 4 * (band + 1) * self._ROWS
            place = hashed & mask
            while (i := table[place]) != _EMPTY and self._read(i, start, end) != content[start:end]:
                place = (place + 1) & mask
            places.append(place)
        return places

    def _hashes(self, bands: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Hashes (...) of the values (..., 8) of bands."""
        mixed: NDArray[np.uint64] = bands.astype(np.uint64) @ self._keys
        return mixed ^ (mixed >> np.uint64(29))

    def _grown(self, band: int, table: array[int]) -> array[int]:
        """A table twice as large with the same content. All its values are different: their order doesn't matter."""
        grown = array("I", [_EMPTY]) * (2 * len(table))
        mask = len(grown) - 1
        blocks = [np.frombuffer(block, np.uint32).reshape(_BLOCK, self._BANDS, self._ROWS) for block in self._blocks]
        hashes = [self._hashes(block[:, band]).tolist() for block in blocks]
        for i in table:
            if i != _EMPTY:
                place = hashes[i // _BLOCK][i % _BLOCK] & mask
                while grown[place] != _EMPTY:
                    place = (place + 1) & mask
                grown[place] = i
        return grown

    def _signature(self, text: str) -> NDArray[np.uint32]:
        words = np.fromiter(map(zlib.crc32, text.lower().encode("utf-8", "replace").split()), dtype=np.uint64)
        words = np.pad(words, (0, max(0, self._WORDS - len(words))))
        count = len(words) - self._WORDS + 1
        sequences = np.zeros(count, dtype=np.uint64)
        for i in range(self._WORDS):
            sequences = (sequences ^ words[i : i + count]) * self._mix[i]
            sequences ^= sequences >> np.uint64(29)
        minima = np.full(len(self._factors), np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, count, self._CHUNK):
            hashes = self._factors[:, None] * sequences[start : start + self._CHUNK] + self._terms[:, None]
            np.minimum(minima, hashes.min(axis=1), out=minima)
        return (minima >> np.uint64(32)).astype(np.uint32)
