"""What questions are made from: an entry is a function, a term or a section, with the facts that its passage states."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["LONGEST_ANSWER", "LONGEST_PASSAGE", "Entry", "Fact", "join_lines", "sentences"]

LONGEST_PASSAGE = 400
"""Characters of a passage, so that it lies in the short-term memory of a small model together with its question."""

LONGEST_ANSWER = 200

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)`'\"çğıöşü][.!?])\s+(?=[A-Z`'\"*ÇĞİÖŞÜ])")


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked.

    Attributes:
        kind: one of :data:`mm_rec.data.questions.wordings.WORDINGS`.
        answer: as it stands in the passage.
        subject: what is asked about, where that is not the entry itself: a parameter.
    """

    kind: str
    answer: str
    subject: str = ""


@dataclass(frozen=True)
class Entry:
    """One function, term or section.

    Attributes:
        name: as a question names it where the passage is at hand.
        full_name: as a question names it where there is no passage.
        passage: the text that states the facts.
        facts: what can be asked.
        language: of the questions, one of :data:`mm_rec.data.questions.wordings.WORDINGS`.
    """

    name: str
    full_name: str
    passage: str
    facts: tuple[Fact, ...]
    language: str = "en"

    @property
    def key(self) -> str:
        """What decides whether the entry is held out: entries of one name are so together, wherever they stand."""
        return self.name.casefold()


def join_lines(text: str) -> str:
    r"""Returns a paragraph on one line.

    >>> join_lines("one\n   two ")
    'one two'
    """
    return " ".join(text.split())


def sentences(paragraph: str) -> list[str]:
    """Returns the sentences of a paragraph that stands on one line.

    >>> sentences("Return a list. Raises `KeyError`, e.g. for no name.")
    ['Return a list.', 'Raises `KeyError`, e.g. for no name.']
    """
    return _SENTENCE_END.split(paragraph)
