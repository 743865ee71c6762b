"""How much of some documents was seen in training: their paragraphs are compared with those of the training data.

A paragraph ends at an empty line, and a long one at the end of a line, too. White space does not count. Paragraphs of
a few words are not compared, since they are in many documents.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_rec.data.pack import TokenStore
from mm_rec.evaluation.bits_per_byte import Documents
from mm_rec.translation import Translatable

__all__ = ["Seen", "compare", "paragraphs"]

FEWEST_BYTES = 40
"""Bytes of the shortest paragraph that is compared, without its white space at both ends."""
MANY_BYTES = 500
"""A paragraph that has so many ends at the next end of a line."""

_EMPTY_LINE = re.compile(rb"\n[ \t\r]*\n")


class Seen(NamedTuple):
    """What was found of some documents.

    Attributes:
        n_paragraphs: how many paragraphs were compared.
        n_seen: how many of them are in the training data.
        rest: the documents, in which the bytes of seen paragraphs do not count; None if all or no paragraphs were seen.
    """

    n_paragraphs: int
    n_seen: int
    rest: Documents | None

    def describe(self) -> Translatable:
        """Returns the outcome in words.

        >>> Seen(8, 2, None).describe(), Seen(1, 0, None).describe()
        ('25% of its paragraphs (2 of 8) were seen in training', 'none of its 1 paragraphs was seen in training')
        """
        if not self.n_paragraphs:
            return Translatable(
                "it has no paragraph of {count} bytes to compare with the training data", count=FEWEST_BYTES
            )
        if not self.n_seen:
            return Translatable("none of its {count:,} paragraphs was seen in training", count=self.n_paragraphs)
        return Translatable(
            "{share:.0%} of its paragraphs ({seen:,} of {count:,}) were seen in training",
            share=self.n_seen / self.n_paragraphs,
            seen=self.n_seen,
            count=self.n_paragraphs,
        )


def paragraphs(text: bytes) -> Iterator[tuple[int, bytes]]:
    r"""Yields where each paragraph of ``text`` ends, with its white space, and the hash of what stands in it.

    The hash is empty for a paragraph that is too short to be compared.

    >>> [end for end, _ in paragraphs(b"one\n\n\ntwo\nthree")]
    [5, 15]
    """
    start = 0
    for end in _ends(text):
        words = b" ".join(text[start:end].split())
        yield end, hashlib.blake2b(words, digest_size=8).digest() if len(words) >= FEWEST_BYTES else b""
        start = end


def _ends(text: bytes) -> Iterator[int]:
    """The ends of the paragraphs, the last of which is that of the text."""
    start = 0
    while start < len(text):
        found = _EMPTY_LINE.search(text, start)
        end = len(text) if found is None else found.end()
        if end - start > MANY_BYTES:
            line_end = text.find(b"\n", start + MANY_BYTES, end) + 1
            end = line_end or end
        yield end
        start = end


def compare(documents: Documents, training: Iterable[TokenStore], token_bytes: Sequence[bytes]) -> Seen:
    """Compare documents with training data, of which one document is in memory at a time.

    Args:
        documents: what is to be scored; all of their tokens count.
        training: the token stores of the training data.
        token_bytes: the bytes that each token stands for.
    """
    own = [list(paragraphs(_text(tokens, token_bytes))) for tokens in documents.tokens]
    for index in documents.cut:  # its last paragraph is the beginning of one
        own[index][-1] = (own[index][-1][0], b"")
    wanted = {key for document in own for _, key in document if key}
    separated = [one or b"\n\n" for one in token_bytes]  # a control token ends a paragraph, as between messages
    found = {key for store in training for key in _keys(store, separated) if key in wanted}
    compared = [key for document in own for _, key in document if key]
    n_seen = sum(key in found for key in compared)
    if n_seen in (0, len(compared)):
        return Seen(len(compared), n_seen, None)
    sizes = np.array([len(one) for one in token_bytes])
    masks, n_bytes = [], 0
    for tokens, document in zip(documents.tokens, own, strict=True):
        ends = np.cumsum(sizes[tokens])
        # A token that reaches into the next paragraph belongs to that one.
        places = np.searchsorted([end for end, _ in document], ends)
        new = np.array([bool(key) and key not in found for _, key in document], dtype=np.uint8)
        masks.append(np.append(new, 0)[np.minimum(places, len(new))].astype(np.uint8))
        n_bytes += int((sizes[tokens] * masks[-1]).sum())
    kept = [index for index, mask in enumerate(masks) if mask[1:].any()]
    rest = Documents([documents.tokens[index] for index in kept], n_bytes, [masks[index] for index in kept])
    return Seen(len(compared), n_seen, rest)


def _text(tokens: NDArray[np.integer], token_bytes: Sequence[bytes]) -> bytes:
    return b"".join([token_bytes[token] for token in tokens.tolist()])


def _keys(store: TokenStore, token_bytes: Sequence[bytes]) -> Iterator[bytes]:
    for index in range(store.n_documents):
        for _, key in paragraphs(_text(store.document(index), token_bytes)):
            yield key
