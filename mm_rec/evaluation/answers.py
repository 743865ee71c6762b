"""How well a model answers questions whose answers are known: token F1, as SQuAD defines it.

An answer is lower-cased, without punctuation and without the words a, an and the; F1 is that of the words that it has
in common with the right one (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mm_rec.errors import UserError
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.generate import generate
from mm_rec.inference.loading import Loaded
from mm_rec.inference.sampling import Sampling
from mm_rec.regular_file import read_regular

__all__ = ["GOOD_F1", "Question", "answer", "continue_question", "draw_questions", "token_f1"]

GOOD_F1 = 0.5
"""From here on an answer counts as right."""

LONGEST_ANSWER = 96
"""Tokens of an answer at most."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Question(NamedTuple):
    """A question, its right answer, and of which sort and kind it is (:mod:`mm_rec.data.questions.make`)."""

    text: str
    answer: str
    sort: str
    kind: str


def draw_questions(path: Path, count: int, seed: int = 0) -> list[Question]:
    """Returns ``count`` questions of a file of held-out pairs, drawn with ``seed``; those of the sorts take turns.

    Raises:
        UserError: if the file can't be read or has too few of a sort.
    """
    try:
        rows = [json.loads(line) for line in read_regular(path).decode().splitlines()]
        questions = [
            Question(row["messages"][0]["content"], row["messages"][1]["content"], row["sort"], row["kind"])
            for row in rows
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            "{path} is no file of held-out questions ({error}); `mm-rec data --source builtin` makes one",
            path=path,
            error=error,
        ) from None
    sorts = list(dict.fromkeys(question.sort for question in questions))
    chance = random.Random(seed)
    drawn = []
    for place, sort in enumerate(sorts):
        there = [question for question in questions if question.sort == sort]
        wanted = len(range(place, count, len(sorts)))
        if len(there) < wanted:
            raise UserError(
                "{path} has {count} questions of the sort {sort}, and {wanted} are to be drawn",
                path=path,
                count=len(there),
                sort=sort,
                wanted=wanted,
            )
        drawn.append(chance.sample(there, wanted))
    return [drawn[at % len(sorts)][at // len(sorts)] for at in range(count)] if sorts else []


def token_f1(said: str, right: str) -> float:
    """Returns the harmonic mean of precision and recall over the words of two answers.

    >>> token_f1("The list of names.", "a list"), token_f1("no", "yes"), token_f1("()", "[]")
    (0.5, 0.0, 1.0)
    """
    words, wanted = _words(said), _words(right)
    common = sum((Counter(words) & Counter(wanted)).values())
    if not words or not wanted:
        return float(words == wanted)
    return 2 * common / (len(words) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def answer(loaded: Loaded, question: str) -> Iterator[str]:
    """Yields the pieces of a model's likeliest answer to a question that begins a conversation."""
    sampling = Sampling(temperature=0, max_new_tokens=LONGEST_ANSWER)
    return ChatSession.start(loaded.model, loaded.tokenizer, sampling=sampling, domain=loaded.domain).reply(question)


def continue_question(loaded: Loaded, question: str) -> Iterator[str]:
    """Yields how a model that never learned to answer goes on after a question and an empty line, for one line."""
    sampling = Sampling(temperature=0, max_new_tokens=LONGEST_ANSWER, stop=("\n",))
    return generate(loaded.model, loaded.tokenizer, f"{question}\n\n", sampling, loaded.domain)


def share_of_good(scores: Sequence[float]) -> float:
    """Returns the share of answers that count as right."""
    return sum(score >= GOOD_F1 for score in scores) / len(scores)
