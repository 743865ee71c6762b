"""The validations of a run so far: which step was best, and whether going on only makes it worse.

All of it follows from the records of the run, so a run that was stopped decides as one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mm_rec.storage.run_folder import read_metrics

__all__ = ["Validations"]

PATIENCE = 3
"""So many validations in a row that are worse than the best are no accident."""
RISE = 0.01
"""How far the last of them has to be above the best."""


class Validations:
    """Bits per byte on held-out documents by step, the mean of all domains. The step 0, before training, is left out.

    >>> seen = Validations()
    >>> for step, score in enumerate([3.0, 2.0, 1.5, 1.6, 1.6, 1.7]):
    ...     print(step, seen.best_step, seen.is_rising)
    ...     seen.add(step, {"text": score})
    0 None False
    1 None False
    2 1 False
    3 2 False
    4 2 False
    5 2 False
    >>> seen.best_step, seen.best_score, seen.is_rising
    (2, 1.5, True)
    """

    def __init__(self) -> None:
        self._scores: dict[int, float] = {}

    @classmethod
    def read(cls, metrics: Path) -> Validations:
        """Returns those that the records of a run in ``metrics.jsonl`` hold."""
        found = cls()
        for record in read_metrics(metrics):
            if "valid" in record:
                found.add(record["step"], record["valid"])
        return found

    def add(self, step: int, scores: Mapping[str, float]) -> None:
        """Take note of a validation: bits per byte by domain."""
        if step > 0:
            self._scores[step] = sum(scores.values()) / len(scores)

    @property
    def best_step(self) -> int | None:
        """The step of the lowest score, of equal ones the first; None before the first validation."""
        return min(self._scores, key=self._scores.__getitem__, default=None)

    @property
    def best_score(self) -> float | None:
        """The lowest score."""
        return min(self._scores.values(), default=None)

    @property
    def is_rising(self) -> bool:
        """Whether the last :data:`PATIENCE` validations are worse than the best, and the last by :data:`RISE`."""
        scores = list(self._scores.values())
        best = min(scores, default=0.0)
        return best not in scores[-PATIENCE:] and len(scores) > PATIENCE and scores[-1] > (1 + RISE) * best
