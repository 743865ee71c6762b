"""Pairs of a question and its answer, made from entries; and which of them are held out.

The seed chooses wordings and order alone. Whole entries are held out by the hash of their name, and no question that is
held out is nearly the same as one to train on.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mm_rec.data.questions.entries import Entry, Fact
from mm_rec.data.questions.similarity import NearTexts
from mm_rec.data.questions.wordings import MEMORY_KINDS, WORDINGS
from mm_rec.translation import Translatable

__all__ = ["SORTS", "Pair", "Questions", "count_pairs", "make_questions"]

SORTS = ("open", "memory")
"""With a passage at hand, or without."""

HELD_OUT_SHARE = 0.06
LEAST_SIMILARITY = 0.8
"""From here on two questions count as the same."""

_MOST_HELD_OUT = 100
"""Questions of a sort that are held out, so that comparing them takes seconds."""
_QUESTIONS_OF_AN_ENTRY = 3
_MEMORY_SHARE = 0.25
_MOST_TURNS = 3
_MOST_ALIKE = 0.02
"""Share of the pairs of a sort that may have one and the same answer, which a model could otherwise guess."""


@dataclass(frozen=True)
class Pair:
    """A question with its answer.

    Attributes:
        entry: what is asked about, by its full name.
        sort: one of :data:`SORTS`.
        kind: one of :data:`mm_rec.data.questions.wordings.WORDINGS`.
        question: all that the user says, the passage included.
        answer: copied from the entry's passage.
    """

    entry: str
    sort: str
    kind: str
    question: str
    answer: str

    def row(self) -> dict[str, Any]:
        """Returns the pair as a row of a file of conversations, with what is to be known of it beside them."""
        return {"entry": self.entry, "sort": self.sort, "kind": self.kind, "messages": self.messages()}

    def messages(self) -> list[dict[str, str]]:
        """Returns the pair as a conversation of one turn."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Questions:
    """What was made.

    Attributes:
        train: pairs to train on, in random order.
        conversations: conversations of several turns about one passage, of the same pairs' entries.
        held_out: pairs of other entries, in random order, those of the sorts in turn as long as there are both.
    """

    train: list[Pair]
    conversations: list[list[dict[str, str]]]
    held_out: list[Pair]

    def describe(self) -> Translatable:
        """Returns the numbers of pairs in words."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in count_pairs(self.train).most_common())
        return Translatable(
            "{train:,} pairs to train on ({kinds}), {talks:,} conversations of several turns, and {held_out:,} pairs "
            "held out",
            train=len(self.train),
            kinds=kinds,
            talks=len(self.conversations),
            held_out=len(self.held_out),
        )


def count_pairs(pairs: Iterable[Pair]) -> Counter[str]:
    """Returns how many pairs there are by sort and kind."""
    return Counter(f"{pair.sort} {pair.kind}" for pair in pairs)


def make_questions(entries: Iterable[Entry], *, seed: int = 0, most: int | None = None) -> Questions:
    """Makes questions from entries; the same entries and seed give the same questions.

    Args:
        entries: in any order; of several with one passage the first counts.
        seed: of the wordings and the order.
        most: pairs to train on at most, and a third of that of conversations.
    """
    distinct = list({entry.passage: entry for entry in entries}.values())
    random.Random(seed).shuffle(distinct)
    kept = [entry for entry in distinct if not _is_held_out(entry)]
    train = _limit_alike([pair for entry in kept for pair in _pairs(entry, seed, _MEMORY_SHARE)])[:most]
    others = [entry for entry in distinct if _is_held_out(entry)]
    held_out = _limit_alike([pair for entry in others for pair in _pairs(entry, seed, 1.0)])
    conversations = [talk for entry in kept if len(talk := _conversation(entry, seed)) > 2]
    conversations = conversations[: None if most is None else most // 3]
    asked = [pair.question for pair in train]
    asked += [talk[0]["content"] for talk in conversations]
    near = NearTexts(asked, LEAST_SIMILARITY)
    random.Random(f"{seed}/train").shuffle(train)
    return Questions(train, conversations, _in_turn([_far_ones(held_out, sort, near) for sort in SORTS]))


def _is_held_out(entry: Entry) -> bool:
    first = hashlib.sha256(entry.key.encode()).digest()[:8]
    return int.from_bytes(first, "big") < HELD_OUT_SHARE * 2**64


def _pairs(entry: Entry, seed: int, memory_share: float) -> list[Pair]:
    """Some of the questions about an entry: one of each kind at most, and one from memory for a share of these."""
    chance = _chance(entry, seed)
    pairs = [_ask(entry, fact, "open", chance) for fact in _choose(entry, chance, _QUESTIONS_OF_AN_ENTRY)]
    remembered = [fact for fact in entry.facts if fact.kind in MEMORY_KINDS]
    if remembered and chance.random() < memory_share * len(pairs):
        pairs.append(_ask(entry, chance.choice(remembered), "memory", chance))
    return pairs


def _conversation(entry: Entry, seed: int) -> list[dict[str, str]]:
    """A passage with questions about it, one a turn."""
    chance = random.Random(f"{_chance(entry, seed).random()}/talk")
    messages: list[dict[str, str]] = []
    for fact in _choose(entry, chance, _MOST_TURNS):
        messages += _ask(entry, fact, "memory" if messages else "open", chance).messages()
    return messages


def _chance(entry: Entry, seed: int) -> random.Random:
    return random.Random(f"{seed}/{entry.full_name}/{entry.passage}")


def _choose(entry: Entry, chance: random.Random, most: int) -> list[Fact]:
    by_kind: dict[str, list[Fact]] = defaultdict(list)
    for fact in entry.facts:
        by_kind[fact.kind].append(fact)
    chosen = [chance.choice(facts) for facts in by_kind.values()]
    return chance.sample(chosen, min(most, len(chosen)))


def _ask(entry: Entry, fact: Fact, sort: str, chance: random.Random) -> Pair:
    name = entry.name if sort == "open" else entry.full_name
    question = chance.choice(WORDINGS[entry.language][fact.kind]).format(name=name, subject=fact.subject)
    if sort == "open":
        question = f"{entry.passage}\n\n{question}"
    return Pair(entry.full_name, sort, fact.kind, question, fact.answer)


def _limit_alike(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs without those whose answer is that of many others already."""
    totals = Counter(pair.sort for pair in pairs)
    seen: Counter[tuple[str, str]] = Counter()
    kept = []
    for pair in pairs:
        seen[pair.sort, pair.answer] += 1
        if seen[pair.sort, pair.answer] <= max(3, _MOST_ALIKE * totals[pair.sort]):
            kept.append(pair)
    return kept


def _far_ones(pairs: Sequence[Pair], sort: str, near: NearTexts) -> list[Pair]:
    """The first pairs of a sort, one an entry, whose questions are not near to one to train on."""
    found: list[Pair] = []
    named: set[str] = set()
    for pair in pairs:
        if pair.sort == sort and pair.entry not in named and not near.has_near(pair.question):
            found.append(pair)
            named.add(pair.entry)
            if len(found) == _MOST_HELD_OUT:
                break
    return found


def _in_turn(groups: Sequence[list[Pair]]) -> list[Pair]:
    longest = max(map(len, groups))
    return [group[at] for at in range(longest) for group in groups if at < len(group)]
