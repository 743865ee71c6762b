"""How many steps fit into a time: decided by the clock while a stage trains.

A decision counts from the step after it, and is on the disk before that step begins. So a run that was stopped goes on
with the decisions that it had, and comes out bit for bit as if it had not been stopped, up to its next decision.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

__all__ = ["Pace"]

DECISIONS = 100
"""About how many times in a run its length is decided anew."""
DECISIONS_AT_THE_END = 5
"""Near the end it is decided each time that this part of what is left is over, so that the run ends on time."""
REMEMBERED = 3
"""Decisions back to which the speed is measured: one slow step alone does not change much."""
LEAST_SHARE = 0.01
"""Share of the time that is given to the last steps even if it is over, so that the learning rate comes down."""


class Pace:
    """The clock of one stage with a time budget.

    Args:
        seconds: the budget.
        used: seconds of it that earlier processes have used.
        started: when this process began with the stage, on the clock; building the model counts, too.
        clock: seconds that only rise.
    """

    def __init__(
        self, seconds: float, used: float, started: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._zero = started - used
        self._paused = 0.0
        self._costs: dict[str, float] = {}
        self._marks: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)  # steps and training seconds at decisions
        self._decided = self.used

    @property
    def used(self) -> float:
        """Seconds of the budget that are used."""
        return self._clock() - self._zero

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; negative once it is over."""
        return self.seconds - self.used

    @contextlib.contextmanager
    def pausing(self, what: str) -> Iterator[None]:
        """Count what happens inside as no training: saving, validation and the like, each under a name."""
        start = self._clock()
        try:
            yield
        finally:
            took = self._clock() - start
            self._paused += took
            self._costs[what] = max(took, self._costs.get(what, 0.0))

    def start(self, step: int) -> None:
        """Measure the speed from here on, where ``step`` steps are done."""
        self._marks.append((step, self._training_seconds()))

    def decide(self, step: int, steps: int, pauses: int) -> int | None:
        """Returns how many steps there are to be in all, if it is time to decide that; None if not.

        Args:
            step: the steps that are done.
            steps: how many there are to be so far.
            pauses: how many validations are still to come, the last one included.
        """
        interval = min(self.seconds / DECISIONS, max(self.left, 0.0) / DECISIONS_AT_THE_END)
        if self.used - self._decided < interval and step < steps:
            return None
        now = self._training_seconds()
        first, then = self._marks[0]
        if step <= first:
            return None
        seconds_per_step = (now - then) / (step - first)
        reserved = sum(self._costs.values()) * pauses
        left = (self.left - reserved) / seconds_per_step
        least = math.floor(LEAST_SHARE * self.seconds / seconds_per_step)
        self._marks.append((step, now))
        self._decided = self.used
        return step + max(math.floor(left), min(least, steps - step), 0)

    def _training_seconds(self) -> float:
        return self._clock() - self._paused
