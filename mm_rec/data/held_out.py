"""How much of the data is held out for validation, and which documents that makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["VALID_BYTES", "VALID_SHARE", "take_within"]

Key = TypeVar("Key")

VALID_SHARE = 0.03
"""Share of the bytes that is held out."""

VALID_BYTES = 262_144
"""Bytes that are held out at most, so that validating stays cheap."""


def take_within(order: Iterable[Key], sizes: Mapping[Key, int], budget: float) -> list[Key]:
    """Returns the first keys of ``order`` whose sizes together stay within ``budget``.

    >>> take_within("abc", {"a": 2, "b": 3, "c": 1}, 4)
    ['a']
    """
    chosen = []
    for key in order:
        budget -= sizes[key]
        if budget < 0:
            break
        chosen.append(key)
    return chosen
