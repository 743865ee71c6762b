"""Fair timing on a machine that others use too: contenders take turns, medians decide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Action", "alternate", "median_seconds", "recorded", "timed"]

Action = Callable[[], Any]
CALLS = {"cpu": 1, "cuda": 10}
"""In one timing of something short: a GPU works on while it is given more, so that launches don't count."""


def recorded(action: Action) -> Action:
    """The same on a GPU as a graph, so that launches cost nothing; on the CPU the action itself."""
    if torch.get_default_device().type != "cuda":
        return action
    action()  # for all that is made at a first time
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def timed(action: Action, calls: int = 1) -> float:
    """Seconds of a call, the mean of ``calls`` in a row; waits for what PyTorch's default device still has to do."""
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        action()
    _wait()
    return (time.perf_counter() - start) / calls


def _wait() -> None:
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def alternate(actions: Mapping[str, Action], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call: ``rounds`` times each action in turn, after one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    calls = CALLS.get(torch.get_default_device().type, 1)
    for turn in range(rounds + 1):
        for name, action in actions.items():
            seconds = timed(action, calls)
            if turn:
                times[name].append(seconds)
    return times


def median_seconds(actions: Mapping[str, Action], rounds: int) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that a busy machine slows all alike."""
    return {name: statistics.median(times) for name, times in alternate(actions, rounds).items()}
