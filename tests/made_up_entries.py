"""Entries to make questions from, of made-up words, so that no two are alike but for the wording of their questions."""

import random
from collections.abc import Iterator

from mm_rec.data.questions.entries import Entry, Fact


def made_up_entries(count: int) -> Iterator[Entry]:
    """Entries of one fact or two."""
    chance = random.Random(0)

    def word() -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(8, 16)))

    for at in range(count):
        name, answer, other = word(), " ".join(word() for _ in range(4)), word()
        facts = (Fact("does", answer), Fact("parameters", other))[: 1 + at % 2]
        yield Entry(name, f"{word()}.{name}", f"{name}({other}): {answer}", facts)
