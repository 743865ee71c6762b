"""Made-up documents for a quick test of the machinery (``--use_synthetic``). They teach a model nothing of a language.

Sentences and functions are put together from short lists of words, with sums that are right, so that there is
something to learn and the loss of a working model falls fast.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from mm_rec.storage.files import write_atomic

__all__ = ["DEFAULT_SAMPLES", "synthetic_code", "synthetic_text", "write_synthetic"]

DEFAULT_SAMPLES = 200

_NAMES = ("Ada", "Baran", "Clara", "Deniz", "Emre", "Fatma", "Grace", "Hakan", "Ines", "Jonas")
_THINGS = ("apples", "books", "candles", "drums", "eggs", "flags", "gloves", "hats", "keys", "lamps")
_PLACES = ("market", "school", "harbour", "garden", "station", "library", "kitchen", "workshop")
_OPERATIONS = (("add", "+"), ("subtract", "-"), ("multiply", "*"))


def synthetic_text(n: int, seed: int = 0) -> list[str]:
    """``n`` different short stories with sums."""
    return _distinct(n, random.Random(f"text {seed}"), _story)


def synthetic_code(n: int, seed: int = 0) -> list[str]:
    """``n`` different Python modules of a few functions."""
    return _distinct(n, random.Random(f"code {seed}"), _module)


def write_synthetic(folder: Path, n: int = DEFAULT_SAMPLES, seed: int = 0) -> None:
    """Write ``n`` documents of each kind as ``text/synthetic.jsonl`` and ``code/synthetic.jsonl`` into ``folder``."""
    for domain, documents in (("text", synthetic_text(n, seed)), ("code", synthetic_code(n, seed))):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(document) + "\n" for document in documents)
        write_atomic(folder / domain / "synthetic.jsonl", content.encode())


def _distinct(n: int, chance: random.Random, make: Callable[[random.Random], str]) -> list[str]:
    documents: dict[str, None] = {}
    while len(documents) < n:
        documents[make(chance)] = None
    return list(documents)


def _story(chance: random.Random) -> str:
    sentences = []
    for _ in range(chance.randint(4, 12)):
        name, other = chance.sample(_NAMES, 2)
        thing, place = chance.choice(_THINGS), chance.choice(_PLACES)
        had, got = chance.randint(2, 99), chance.randint(2, 99)
        sentences.append(
            chance.choice(
                (
                    f"{name} had {had} {thing} and got {got} more at the {place}, so now there are {had + got}.",
                    f"When {name} left the {place}, {other} counted {had} {thing} and was happy.",
                    f"{name} asked {other} for the {thing}, because the {place} had none.",
                    f"Of {had + got} {thing} in the {place}, {name} gave {got} to {other} and kept {had}.",
                )
            )
        )
    return " ".join(sentences)


def _module(chance: random.Random) -> str:
    functions = []
    for _ in range(chance.randint(2, 6)):
        verb, sign = chance.choice(_OPERATIONS)
        thing, number = chance.choice(_THINGS), chance.randint(2, 99)
        functions.append(
            chance.choice(
                (
                    f"def {verb}_{thing}({thing}):\n    return {thing} {sign} {number}\n",
                    f"def {verb}_all_{thing}(values):\n    total = {number}\n    for value in values:\n"
                    f"        total = total {sign} value\n    return total\n",
                    f"def {verb}_if_positive({thing}, limit={number}):\n    if {thing} > 0:\n"
                    f"        return {thing} {sign} limit\n    return {thing}\n",
                )
            )
        )
    return "\n\n".join(functions)
