"""Fair timing on a machine that others use too: contenders take turns, medians decide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Action", "alternate", "median_seconds", "timed"]

Action = Callable[[], Any]


def timed(action: Action) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternate(actions: Mapping[str, Action], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call: ``rounds`` times each action in turn, after one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            seconds = timed(action)
            if turn:
                times[name].append(seconds)
    return times


def median_seconds(actions: Mapping[str, Action], rounds: int) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that a busy machine slows all alike."""
    return {name: statistics.median(times) for name, times in alternate(actions, rounds).items()}
