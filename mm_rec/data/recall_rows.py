"""Rows that train recall, made from the documents of a token store.

Each is a passage of the store's own text into which things are inserted that come again or are asked for later, at all
distances: facts about made-up keys, lists of pairs, sentences of the text with a word changed, passages as they are.
The loss counts the text, the answers and what is repeated; what nobody could foresee, such as the value of a new fact,
does not count.

Most rows are *sparse*: a few things among much text of which nothing is asked, each asked for far away. They teach
which tokens are worth keeping. The others hold many things at all distances, and teach to find them.
"""

from __future__ import annotations

import codecs
import functools
import heapq
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mm_rec.data.pack import Document, TokenStore
from mm_rec.data.recall_wordings import CODE, NOUNS, TEXT, Wordings
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["LONGEST", "Part", "part_of_tokens", "recall_documents", "recall_row"]

LONGEST = 32_768
"""About the most tokens of a row, and so of text between a fact and a question about it."""

SHORTEST = 256  # or a quarter of the longest, if that is less
LONGEST_SHARE = 1 / 16  # of all rows of a store that one row may be
NEAREST, SPARSEST = 40, 8  # bytes between insertions: from so many to one such part of the row
SPARSE = 0.6  # share of rows that are sparse
INSERTIONS = 1.5, 2, 3, 4  # about so many things in a sparse row
FAR = 300  # bytes between a thing and a question about it, at least, in a sparse row: the window does not reach so far
MOST_VERSIONS = 4  # of a sentence, each with another word
LONGEST_LIST, LIST_SPARES = 24, 200  # pairs, of which there is one for so many bytes of the row at most
END = 0.4  # share of facts that are asked for again at the row's end
DECODED_AT_ONCE = 2048  # tokens
TRIES = 1000  # to find a key of the text's own words that the row has not used

_PIECE = {
    "text": re.compile(r"[^\n.!?]*(?:[.!?][\"'”’)]*\s+|\n+)"),
    "code": re.compile(r"[^\n]*\n+"),
}
_WORD = re.compile(r"(?<![^\W_])[^\W\d_]{4,12}(?![^\W_])")
_CONSONANTS, _VOWELS, _LETTERS = "bdfgklmnprstvz", "aeiou", "abcdefghkmnpqrstuvwxyz"


class Part(NamedTuple):
    """Some text of a row.

    Attributes:
        text: the text.
        counts: whether the loss counts it.
        answers: whether it is a value that was said before.
    """

    text: str
    counts: bool
    answers: bool = False


class Documents(Protocol):
    """What rows are made of; a token store is it."""

    @property
    def n_documents(self) -> int:
        """How many there are."""

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of one, from BOS."""


class Fact(NamedTuple):
    """What is said once and asked for later; ``key`` is None where the noun alone tells it."""

    noun: str
    key: str | None
    value: str


def recall_documents(
    store: TokenStore, tokenizer: Tokenizer, domain: str, tokens: int, seed: int, longest: int = LONGEST
) -> Iterator[Document]:
    """Rows of about ``tokens`` tokens together, at least one; the same arguments give the same rows.

    Args:
        store: the documents that they are made of.
        tokenizer: that of the store.
        domain: ``code`` has wordings of its own.
        tokens: of all rows.
        seed: of everything that is drawn.
        longest: about the most tokens of a row.
    """
    bytes_per_token = max(int(store.n_bytes.sum()), 1) / store.n_tokens
    most = min(max(tokens * LONGEST_SHARE, SHORTEST), longest)
    fewest = min(SHORTEST, most / 4)
    lengths = tokenizer.token_sizes
    for index in itertools.count():
        rng = random.Random(f"{seed}/{domain}/{index}")
        size = fewest * (most / fewest) ** rng.random()
        parts = recall_row(rng, store, tokenizer, domain, round(size * bytes_per_token))
        text = "".join(part.text for part in parts)
        ids = tokenizer.encode(text)
        yield Document([tokenizer.bos_id, *ids], len(text.encode()), [0, *_counted(parts, np.cumsum(lengths[ids]))])
        tokens -= len(ids)
        if tokens <= 0:
            return


def recall_row(rng: random.Random, documents: Documents, tokenizer: Tokenizer, domain: str, n_bytes: int) -> list[Part]:
    """Returns one row of about ``n_bytes`` bytes; all that is drawn comes from ``rng``."""
    return _Row(rng, documents, tokenizer, domain, n_bytes).parts()


def part_of_tokens(parts: Sequence[Part], ends: np.ndarray) -> np.ndarray:
    """Returns the index of the part that each token is of: the one with the byte at which the token ends."""
    bounds = np.cumsum([len(part.text.encode()) for part in parts])
    return np.searchsorted(bounds, ends)


def _counted(parts: list[Part], ends: np.ndarray) -> list[int]:
    """For each token, whether it is of a part that counts."""
    counts = np.array([part.counts for part in parts], dtype=int)
    chosen: list[int] = counts[part_of_tokens(parts, ends)].tolist()
    return chosen


class _Row:
    """One row while it is made: text goes in piece by piece, and what is due goes between."""

    def __init__(self, rng: random.Random, store: Documents, tokenizer: Tokenizer, domain: str, size: int) -> None:
        self._rng = rng
        self._size = size
        self._is_sparse = rng.random() < SPARSE
        self._is_code = domain == "code"
        self._wordings: Wordings = CODE if self._is_code else TEXT
        pieces = functools.partial(_pieces, rng, store, tokenizer, _PIECE["code" if self._is_code else "text"])
        self._pieces, self._others = pieces(), pieces()  # the row's text, and sentences to be changed
        self._parts: list[Part] = []
        self._bytes = self._bytes_waiting = 0
        self._waiting: list[tuple[int, int, list[Part]]] = []  # place in bytes, order, what to insert there
        self._count = itertools.count()
        self._used: set[str] = set()
        self._words: list[str] = []
        self._text: list[str] = []  # pieces so far, to be repeated
        self._versions: list[tuple[str, str, str]] = []  # of a sentence, to be said: what begins it, a word, the rest

    def parts(self) -> list[Part]:
        """The row."""
        rng, gap = self._rng, self._gap()
        following = rng.random() * gap
        while self._bytes + self._bytes_waiting < self._size:
            piece = next(self._pieces)
            self._words += [word for word in _WORD.findall(piece) if word.islower()]
            self._text.append(piece)
            self._add([Part(piece, True)])
            while self._waiting and self._waiting[0][0] <= self._bytes:
                parts = heapq.heappop(self._waiting)[2]
                self._bytes_waiting -= _size_of(parts)
                self._insert(parts)
            if self._bytes >= following:
                self._insert(self._event())
                following = self._bytes + rng.expovariate(1 / gap)
        last = [parts for _, _, parts in self._waiting]
        rng.shuffle(last)
        for parts in last:
            self._insert(parts)
        return self._parts

    def _gap(self) -> float:
        """Bytes between two things that are inserted, on average."""
        if self._is_sparse:
            return self._size / self._rng.choice(INSERTIONS)
        sparsest = max(self._size / SPARSEST, 2 * NEAREST)
        return float(NEAREST * (sparsest / NEAREST) ** self._rng.random())

    def _add(self, parts: list[Part]) -> None:
        self._parts += parts
        self._bytes += _size_of(parts)

    def _insert(self, parts: list[Part]) -> None:
        """Between two pieces of the text, of which the first ends with white space."""
        self._add([*parts, Part(self._rng.choice(self._wordings.separators), False)])

    def _later(self, parts: list[Part], at_end: bool = False) -> None:
        """Insert at a random place behind the present one: in a sparse row at any that is far, else near and far are
        equally likely on a logarithmic scale.
        """
        left = max(self._size - self._bytes, NEAREST + 1)
        if at_end:
            distance: float = left
        elif self._is_sparse:
            distance = FAR + self._rng.random() * max(left - FAR, 1)
        else:
            distance = NEAREST * (left / NEAREST) ** self._rng.random()
        heapq.heappush(self._waiting, (self._bytes + round(distance), next(self._count), parts))
        self._bytes_waiting += _size_of(parts)

    def _event(self) -> list[Part]:
        """Something new, of which something comes later."""
        if self._versions:
            return self._version()
        draw = self._rng.uniform(0.3 if self._is_sparse else 0.0, 1.0)  # lists and passages are no single things
        if draw < 0.15 and len(self._text) > 2:
            self._repeat_passage()
        if draw < 0.3:
            return self._list()
        if draw < 0.7 and self._change_sentence():
            return self._version()
        return self._fact()

    def _repeat_passage(self) -> None:
        """The last few pieces of the text come again."""
        passage = "".join(self._text[-self._rng.randint(1, 4) :])
        self._later([Part(self._rng.choice(self._wordings.again), False), Part(passage, True)])

    def _change_sentence(self) -> bool:
        """Plan some versions of a new sentence, each with a word and a later one changed; False if it has too few."""
        rng, sentence = self._rng, next(self._others).rstrip()
        words = [found.span() for found in _WORD.finditer(sentence) if found[0].islower()]
        if len(words) < 2:
            return False
        last = rng.randrange(1, len(words))
        (key_begin, key_end), (begin, end) = words[rng.randrange(last)], words[last]
        count = 1 if rng.random() < 0.5 else rng.randint(2, MOST_VERSIONS)
        is_number = rng.random() < 0.5
        keys, values = ([self._new(self._word) for _ in range(count)] for _ in range(2))
        for key, word in zip(keys, values, strict=True):
            value = self._value(0) if is_number else word
            self._versions.append((sentence[:key_begin] + key + sentence[key_end:begin], value, sentence[end:]))
        return True

    def _version(self) -> list[Part]:
        """Say the next version of a sentence; its beginning comes again later, and the changed word is the answer."""
        rng = self._rng
        before, value, after = self._versions.pop(0)
        starts = [0, *(found.start() for found in _WORD.finditer(before))]
        for _ in range(rng.randint(1, 2)):
            start = starts[rng.randrange(max(len(starts) // 2, 1))]  # half of the beginning stays at least
            self._later([Part(before[start:], False), Part(value, True, True), Part(after, True)])
        if rng.random() < END:
            self._later([Part(before, False), Part(value, True, True), Part(after, True)], at_end=True)
        return [Part(before + value + after, False)]

    def _fact(self) -> list[Part]:
        rng, wordings = self._rng, self._wordings
        has_key = rng.random() < 0.8
        key = self._key(rng.randrange(4)) if has_key else None
        fact = Fact(self._noun(unique=not has_key), key, self._value(rng.randrange(5)))
        for _ in range(rng.randint(1, 3)):
            self._later(self._question(fact))
        if rng.random() < END:
            self._later(self._question(fact), at_end=True)
        return _filled(rng.choice(wordings.statements if has_key else wordings.statements_without_key), fact, False)

    def _list(self) -> list[Part]:
        rng = self._rng
        longest = min(LONGEST_LIST, max(self._size // LIST_SPARES, 2))
        noun, line = self._noun(), rng.choice(self._wordings.list_lines)
        key_kind, value_kind = rng.randrange(4), rng.randrange(4)
        facts = [
            Fact(noun, self._key(key_kind), self._value(value_kind))
            for _ in range(round(2 * (longest / 2) ** rng.random()))
        ]
        head = rng.choice(self._wordings.list_heads).format(noun=noun)
        for fact in facts:
            if rng.random() < 0.5:
                self._later(self._question(fact))
        if rng.random() < 0.5:
            shuffled = rng.sample(facts, len(facts))
            self._later([Part(head, False), *(part for fact in shuffled for part in _filled(line, fact, True))])
        return [Part("\n" + head, False), *(part for fact in facts for part in _filled(line, fact, False))]

    def _question(self, fact: Fact) -> list[Part]:
        wordings = self._wordings
        return _filled(
            self._rng.choice(wordings.questions_without_key if fact.key is None else wordings.questions), fact, True
        )

    def _noun(self, unique: bool = False) -> str:
        """A noun; a unique one tells its fact by itself."""
        noun = self._rng.choice(NOUNS)
        joint = "_" if self._is_code else " "
        return self._new(lambda: f"{self._word()}{joint}{noun}") if unique else noun

    def _key(self, kind: int) -> str:
        rng, joint, space = self._rng, *(("_", "_") if self._is_code else ("-", " "))
        kinds = (
            lambda: self._word() if rng.random() < 0.5 else self._made_up(),
            lambda: f"{self._word()}{joint}{self._word()}",
            lambda: f"{self._word()}{space}{rng.randint(2, 999)}",
            lambda: f"{''.join(rng.choices(_LETTERS, k=rng.randint(1, 3)))}{joint}{rng.randint(10, 9999)}",
        )
        return self._new(kinds[kind])

    def _new(self, make: Callable[[], str]) -> str:
        """Something that this row has not used yet; with a made-up word before it if the text has too few words."""
        made, joint, tries = make(), "_" if self._is_code else " ", 1
        while made in self._used:
            made = make() if tries < TRIES else f"{self._made_up()}{joint}{make()}"
            tries += 1
        self._used.add(made)
        return made

    def _value(self, kind: int) -> str:
        rng = self._rng
        if kind in (0, 1):
            digits = rng.randint(2, 7)
            return str(rng.randrange(10 ** (digits - 1), 10**digits))
        if kind == 2:
            text = self._word()
        elif kind == 3:
            text = "".join(rng.choices(_LETTERS + "0123456789", k=rng.randint(3, 8)))
        else:
            text = " ".join(self._word() for _ in range(rng.randint(2, 6)))
        return repr(text) if self._is_code else text

    def _word(self) -> str:
        """A word that occurred in the text lately, or, where there is none, one that is made up."""
        recent = self._words[-400:]
        return self._rng.choice(recent) if len(recent) > 20 else self._made_up()

    def _made_up(self) -> str:
        rng = self._rng
        return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 4)))


def _size_of(parts: list[Part]) -> int:
    """Bytes of the parts."""
    return sum(len(part.text.encode()) for part in parts)


def _filled(template: str, fact: Fact, counts: bool) -> list[Part]:
    """The template with the fact filled in; the value ``counts`` or not, the rest does not."""
    texts = template.split("{value}")
    filled = [text.format(noun=fact.noun, key=fact.key) for text in texts]
    parts = [Part(filled[0], False)]
    for text in filled[1:]:
        parts += [Part(fact.value, counts, counts), Part(text, False)]
    return parts


def _pieces(rng: random.Random, store: Documents, tokenizer: Tokenizer, piece: re.Pattern[str]) -> Iterator[str]:
    """Sentences or lines of documents of the store without end: each document from a random place on."""
    while True:
        document = store.document(rng.randrange(store.n_documents))[1:]
        document = document[rng.randrange(max(len(document) // 2, 1)) :]
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")  # a token may end inside a character
        is_whole, rest = False, ""  # the first piece may begin inside a sentence
        for start in range(0, len(document), DECODED_AT_ONCE):
            ids = document[start : start + DECODED_AT_ONCE].tolist()
            text, end = rest + decoder.decode(b"".join(tokenizer.token_bytes[i] for i in ids)), 0
            for match in piece.finditer(text):
                end = match.end()
                if is_whole:
                    yield match[0]
                is_whole = True
            rest = text[end:]
        yield rest + "\n"
