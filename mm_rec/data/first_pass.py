"""What is used of a domain's documents, and which of them are held out for validation."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from mm_rec.data.documents.folder import LeftOut
from mm_rec.data.documents.kinds import kind_of
from mm_rec.data.documents.reading import Documents
from mm_rec.data.filters import NearDuplicates, quality_problem
from mm_rec.data.held_out import VALID_BYTES, VALID_SHARE, take_within
from mm_rec.errors import UserError

__all__ = ["Survey", "survey_domain"]

PROGRESS_SECONDS = 10.0
"""Between two lines about how far the reading is."""


@dataclass
class Survey:
    """What is known of a domain after its documents were read once. Texts are not kept but read again.

    Attributes:
        documents: reads the data files, in the same order each time.
        read: how many documents were read.
        dropped: how many documents the filters left out, by reason.
        dropped_of: the same, by file and reason.
        kept: hash and bytes of each document that is used, by its number in the order of reading.
        valid: numbers of the held-out documents.
        cut: number of a document of which only the end is held out, and about how many bytes of it.
    """

    documents: Documents
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_of: Counter[tuple[Path, str]] = field(default_factory=Counter)
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)
    valid: set[int] = field(default_factory=set)
    cut: tuple[int, int] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the documents that are used."""
        return sum(size for _, size in self.kept.values())

    def dropped_by_file(self) -> list[LeftOut]:
        """Returns the files of which the filters left documents out."""
        return [
            LeftOut(path, kind.name, why, count)
            for (path, why), count in self.dropped_of.items()
            if (kind := kind_of(path)) is not None
        ]

    def train_texts(self, max_bytes: int | None = None) -> Iterator[str]:
        """The training documents; with ``max_bytes`` a selection of about that size, the same for the same texts."""
        chosen: set[int] = set()
        left = self.n_bytes if max_bytes is None else max_bytes
        for number in self._by_hash():
            if left <= 0:
                break
            if number not in self.valid:
                chosen.add(number)
                left -= self.kept[number][1]
        for number, text in self._texts(chosen):
            yield _cut(text, self.cut[1])[0] if self.cut is not None and number == self.cut[0] else text

    def valid_texts(self) -> Iterator[str]:
        """The held-out documents."""
        if self.cut is None:
            yield from (text for _, text in self._texts(self.valid))
        else:
            yield from (_cut(text, self.cut[1])[1] for _, text in self._texts({self.cut[0]}))

    def _by_hash(self) -> list[int]:
        """Numbers of the documents that are used, in an order that depends on nothing but their texts."""
        return sorted(self.kept, key=lambda number: (self.kept[number][0], number))

    def _texts(self, numbers: set[int]) -> Iterator[tuple[int, str]]:
        last = max(numbers, default=-1)
        for number, document in enumerate(self.documents.read()):
            if number in numbers:
                yield number, document.text
            if number >= last:
                return

    def split(self) -> bool:
        """Choose what is held out; False if there is too little for a split."""
        total = self.n_bytes
        budget = int(min(VALID_BYTES, max(VALID_SHARE * total, min(total / len(self.kept), 0.1 * total))))
        order = self._by_hash()
        sizes = {number: size for number, (_, size) in self.kept.items()}
        whole = take_within(order, sizes, budget)
        # Where the first document is too large, smaller ones take its place.
        self.valid.update(whole or take_within([one for one in order if sizes[one] <= budget], sizes, budget))
        if self.valid:
            return True
        self.cut = (order[0], budget)
        ((_, text),) = self._texts({order[0]})
        return all(_cut(text, budget))


def survey_domain(
    name: str,
    documents: Documents,
    *,
    max_samples: int | None = None,
    filters: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Survey:
    """Read the documents of the domain ``name`` for the first time, filter them and choose what is held out.

    Args:
        name: ``code`` has filters of its own, which programs have in every domain.
        documents: those of the data files.
        max_samples: stop after so many documents that are used.
        filters: leave out documents of low quality and near-duplicates.
        tell: takes a line from time to time.

    Raises:
        UserError: for a bad row too many, or if too little is left.
    """
    survey = Survey(documents)
    duplicates = NearDuplicates()
    told = time.monotonic()
    with closing(documents.read()) as read:
        for number, (text, path, is_program) in enumerate(read):
            survey.read += 1
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                tell(f"{name}: {survey.read:,} documents so far, at {path}")
            problem = quality_problem(text, "code" if is_program else name) if filters else None
            if problem is None and filters and duplicates.add(text):
                problem = "near-duplicate"
            if problem is not None or not text:
                survey.dropped[problem or "empty"] += 1
                survey.dropped_of[path, problem or "empty"] += 1
                continue
            content = text.encode()
            survey.kept[number] = (int.from_bytes(hashlib.sha256(content).digest()[:8], "big"), len(content))
            if len(survey.kept) == max_samples:
                break
    if not survey.kept or not survey.split():
        dropped = "".join(f", {count} {reason}" for reason, count in survey.dropped.items())
        raise UserError(
            f"there is too little {name} data: {len(survey.kept)} of {survey.read} documents can be used{dropped}; "
            f"{documents.files[0].parent} needs more or longer ones"
        )
    return survey


def _cut(text: str, tail_bytes: int) -> tuple[str, str]:
    """``text`` in two, the second of about ``tail_bytes`` bytes, cut after a line if there is one."""
    tail = text.encode()[-tail_bytes:].decode(errors="ignore") if tail_bytes else ""
    line_end = tail.find("\n") + 1
    if 0 < line_end < len(tail):
        tail = tail[line_end:]
    return text[: len(text) - len(tail)], tail
