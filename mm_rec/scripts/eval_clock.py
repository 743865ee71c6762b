"""How long the measurements of ``mm-rec eval`` take: told before them, and what is left while they go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mm_rec.evaluation.bits_per_byte import Documents
    from mm_rec.evaluation.recall import Haystack
    from mm_rec.inference.loading import Loaded

__all__ = ["Clock", "Speeds", "choose_distances", "measure_speeds", "readers", "tokens_of_needles", "tokens_to_read"]

DISTANCES = {"cpu": [1024, 4096], "cuda": [1024, 4096, 16_384, 65_536]}
PROGRESS_SECONDS = 10.0
NEEDLE_SECONDS = 60.0
"""Where no distances are named, needles are hidden over as many as take this time."""


class Speeds(NamedTuple):
    """Seconds for each token that one expert reads of documents, and that is read for needles."""

    reading: float
    needles: float


def measure_speeds(loaded: Loaded, domain: str | None, trials: int) -> Speeds:
    """Measure how long a piece of a document and of a needle's row takes."""
    import torch

    from mm_rec.evaluation import bits_per_byte, recall

    model = loaded.model
    device = model.embedding.weight.device

    @torch.inference_mode()
    def seconds_per_token(rows: int, tokens: int, domain: str | None) -> float:
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        for _ in range(2):  # the first time takes longer
            start = time.monotonic()
            model(ids, None, domain, targets=ids)
            if device.type == "cuda":
                torch.cuda.synchronize()
        return (time.monotonic() - start) / ids.numel()

    chunk = bits_per_byte.CHUNK
    reading = seconds_per_token(bits_per_byte.TOKENS_PER_BATCH // chunk, chunk, model.config.experts[0])
    return Speeds(reading, seconds_per_token(*recall.piece_of(trials, device), domain))


def readers(loaded: Loaded) -> tuple[str | None, ...]:
    """Returns who reads documents: each expert, and None for all of them fused, where fusion is trained."""
    experts = loaded.model.config.experts
    return (*experts, None) if len(experts) > 1 and loaded.model.fusion.is_trained else experts


def tokens_to_read(loaded: Loaded, documents: Mapping[str, Documents]) -> int:
    """Returns how many tokens all readers read together; for the fused reading each expert reads them once more."""
    readings = sum(1 if reader else len(loaded.model.config.experts) for reader in readers(loaded))
    return readings * sum(len(tokens) for one in documents.values() for tokens in one.tokens)


def tokens_of_needles(trials: int, distances: Sequence[int]) -> int:
    """Returns how many tokens are read for needles over ``distances``, one for each kind and distance."""
    from mm_rec.evaluation.recall import row_tokens

    return trials * sum(map(row_tokens, distances))


def choose_distances(
    named: list[int] | None, loaded: Loaded, haystack: Haystack | None, trials: int, seconds: float
) -> list[int]:
    """The distances that were named, else the shortest of the usual ones that take NEEDLE_SECONDS together."""
    from mm_rec.evaluation.recall import cells

    if named is not None:
        return named
    usual = DISTANCES[loaded.model.embedding.weight.device.type]

    def time_of(distances: list[int]) -> float:
        return seconds * tokens_of_needles(trials, [distance for _, distance in cells(distances, haystack)])

    count = sum(time_of(usual[: number + 1]) <= NEEDLE_SECONDS for number in range(len(usual)))
    if count < len(usual):
        left_out = usual[count:]
        print(
            f"needles over {', '.join(f'{one:,}' for one in left_out)} tokens are left out: they would take about "
            f"{_in_words(time_of(left_out))}; --distances {','.join(map(str, usual))} asks for them"
        )
    return usual[:count]


class Clock:
    """Tells before a long measurement how long it will take, and during it how much is left."""

    def __init__(self, reading: float, needles: float) -> None:
        self._total, self._done = reading + needles, 0.0
        self._start = self._said = time.monotonic()
        if self._total:
            print(
                f"reading takes about {_in_words(self._total)}: {_in_words(reading)} for documents, "
                f"{_in_words(needles)} for needles",
                flush=True,
            )

    def counting(self, seconds_per_token: float) -> Callable[[int], None]:
        """Returns what is to be called with the number of tokens of each piece that was read."""

        def add(tokens: int) -> None:
            self._done += tokens * seconds_per_token
            now = time.monotonic()
            if now - self._said > PROGRESS_SECONDS and self._done:
                self._said = now
                left = (self._total / self._done - 1) * (now - self._start)
                print(f"  {min(self._done / self._total, 1):.0%}, about {_in_words(max(left, 0))} to go", flush=True)

        return add


def _in_words(seconds: float) -> str:
    from mm_rec.training.console import describe_seconds

    return describe_seconds(seconds)
