"""What preparing data will take, from a look at its first documents: said before the work begins."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mm_rec.data.documents.kinds import LeftOutError, kind_of
from mm_rec.data.documents.reading import ReadOptions, texts_without_parsing
from mm_rec.data.files import COMPRESSED
from mm_rec.data.filters import NearDuplicates, quality_problem
from mm_rec.errors import UserError
from mm_rec.machine.device import available_memory
from mm_rec.storage.files import format_bytes, require_space
from mm_rec.system import cores
from mm_rec.translation import Translatable

__all__ = ["PreparationEstimate", "estimate_preparation"]

SAMPLE_DOCUMENTS, SAMPLE_SECONDS = 200, 0.3
"""Looked at of each domain, whichever comes first."""

COMPRESSED_TIMES = 4.0
"""Text in a compressed file, as a multiple of its size; other kinds have theirs in their table."""

KEPT_BYTES = 250
"""Memory for what is known of a document beside its signature."""

BATCH_BYTES = 100_000_000
"""Memory for the documents that are tokenized at a time, and their tokens."""

READ_BYTES_A_SECOND, ENCODED_BYTES_A_SECOND = 80e6, 2e6
"""Reading again, on one core, and tokenizing, on each core: a careful guess for any machine."""

BYTES_A_TOKEN = 3.0

TYPICAL_BYTES = 2000
"""Of a document, where the first ones hold no text."""

SHORTEST_BYTES = 40
"""Of a document that the filters keep: shorter ones take no memory."""


@dataclass(frozen=True)
class PreparationEstimate:
    """What preparing takes: text to read, documents, seconds, and bytes of memory and of disk."""

    n_bytes: int
    documents: int
    seconds: float
    memory: int
    disk: int

    def check(self, folder: Path) -> None:
        """Refuse what cannot fit.

        Args:
            folder: where the result goes; need not exist yet.

        Raises:
            UserError: naming what is needed, what there is and the remedy.
            StorageError: if it is the disk that is too small.
        """
        available = available_memory(torch.device("cpu"))
        if self.memory > available:
            fitting = max(1, int(self.documents * available / self.memory * 0.8))
            raise UserError(
                "preparing these {documents:,} documents would take about {memory} of memory and "
                "{available} are free; prepare fewer, with --max_samples {fitting}",
                documents=self.documents,
                memory=format_bytes(self.memory),
                available=format_bytes(available),
                fitting=fitting,
            )
        require_space(folder, self.disk)

    def describe(self) -> Translatable:
        """The estimate in words."""
        return Translatable(
            "preparing about {documents:,} documents, {size} of text: about {time}, {memory} of memory and "
            "{disk} of disk",
            documents=self.documents,
            size=format_bytes(self.n_bytes),
            time=_describe_time(self.seconds),
            memory=format_bytes(self.memory),
            disk=format_bytes(self.disk),
        )


def estimate_preparation(
    files: Mapping[str, Sequence[Path]],
    *,
    max_samples: int | None,
    filters: bool,
    options: ReadOptions | None = None,
) -> PreparationEstimate:
    """Returns what preparing the data files of each domain will take.

    Args:
        files: by domain.
        max_samples: documents of each domain at most.
        filters: near-duplicates are looked for, which takes most of the memory and time.
        options: how the files are to be read; None for the usual way.
    """
    n_bytes = documents = 0
    seconds = 0.0
    for name, paths in files.items():
        there = int(sum(path.stat().st_size * _unpacked_times(path) for path in paths))
        size, rate = _look(name, paths, filters, options or ReadOptions())
        count = max(1, int(there / max(size, SHORTEST_BYTES if filters else 1)))
        if max_samples is not None and max_samples < count:
            there, count = there * max_samples // count, max_samples
        n_bytes += there
        documents += count
        seconds += there * rate + 2 * there / READ_BYTES_A_SECOND
    seconds += n_bytes / (ENCODED_BYTES_A_SECOND * cores())
    memory = documents * (KEPT_BYTES + (NearDuplicates.BYTES_A_DOCUMENT if filters else 0)) + BATCH_BYTES
    return PreparationEstimate(n_bytes, documents, seconds, memory, int(4 * n_bytes / BYTES_A_TOKEN) + 16 * documents)


def _look(name: str, paths: Sequence[Path], filters: bool, options: ReadOptions) -> tuple[float, float]:
    """The mean size of the first documents in bytes, empty ones left out, and seconds a byte that the filters take.

    Files that need parsing are not looked at.
    """
    duplicates, start = NearDuplicates(), time.monotonic()
    count = size = 0
    texts = itertools.chain.from_iterable(texts_without_parsing(path, options) for path in paths)
    try:
        for text in itertools.islice(filter(str.strip, texts), SAMPLE_DOCUMENTS):
            count, size = count + 1, size + len(text.encode())
            if filters and quality_problem(text, name) is None:
                duplicates.add(text)
            if time.monotonic() > start + SAMPLE_SECONDS:
                break
    except (UserError, LeftOutError):  # after which a sample need not look; the pass over all of them says which
        pass
    if not count:
        return TYPICAL_BYTES, 0.0
    return size / count, (time.monotonic() - start) / size


def _unpacked_times(path: Path) -> float:
    kind = kind_of(path)
    return COMPRESSED_TIMES if path.name.lower().endswith(COMPRESSED) else kind.unpacks_to if kind is not None else 1.0


def _describe_time(seconds: float) -> Translatable:
    if seconds < 100:
        return Translatable("{seconds:.0f} s", seconds=max(seconds, 1))
    if seconds < 6000:
        return Translatable("{minutes:.0f} min", minutes=seconds / 60)
    return Translatable("{hours:.1f} h", hours=seconds / 3600)
