"""Threads and precision: chosen by measured rates, kept by machine, and never against the user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mm_rec.machine import autotune
from mm_rec.machine.autotune import _choose, cache_file, threads_are_given, tune
from mm_rec.machine.device import select_precision, set_threads

CPU = torch.device("cpu")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """A quiet machine of two cores, one thread the faster; yields the candidates of each measurement."""
    calls: list[list[int]] = []

    def measure(candidates: list[int], precisions: list[str]) -> dict[tuple[str, int], float]:
        calls.append(candidates)
        return {(name, count): 1e9 / count for name in precisions for count in candidates}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in autotune.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(autotune, "_measure", measure)
    monkeypatch.setattr(autotune, "cores", lambda: 2)
    monkeypatch.setattr("psutil.getloadavg", lambda: (0.0, 0.0, 0.0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    tune.cache_clear()
    yield calls
    torch.set_num_threads(before)
    tune.cache_clear()


def test_the_choice() -> None:
    rates = {("fp32", 4): 100.0, ("fp32", 2): 105.0, ("fp32", 1): 60.0}
    assert _choose(rates, [4, 2, 1], False).threads == 4  # not clearly slower than two
    assert _choose(rates | {("fp32", 2): 130.0}, [4, 2, 1], False).threads == 2
    half = {("bf16", 4): 300.0, ("bf16", 2): 390.0, ("bf16", 1): 300.0}
    both = _choose(rates | half, [4, 2, 1], True)
    assert (both.threads, both.bf16) == (2, True)
    slow = {("bf16", count): 10.0 for count in (4, 2, 1)}
    assert not _choose(rates | slow, [4, 2, 1], True).bf16


def test_what_was_measured_is_kept(measured: list[list[int]]) -> None:
    first = tune(False)
    assert first.threads == 1
    assert measured == [[2, 1]]
    tune.cache_clear()
    assert tune(False) == first
    assert len(measured) == 1
    cache_file().write_text("{ not json")
    tune.cache_clear()
    assert tune(False) == first
    assert len(measured) == 2


def test_a_busy_machine_is_not_measured(measured: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.getloadavg", lambda: (2.0, 0.0, 0.0))
    assert tune(False) == autotune.Tuning(2, False, {})
    tune.cache_clear()
    assert tune(True) == autotune.Tuning(2, True, {})
    assert measured == []
    assert not cache_file().exists()


def test_what_the_user_set_wins(measured: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_threads(5) == 5
    assert threads_are_given()
    assert set_threads(None) == 5
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert set_threads(None) == 2
    assert measured == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("mm_rec.machine.device.has_fast_bf16", lambda _: False)
    assert set_threads(None) == 1
    assert select_precision("auto", CPU) == "fp32"
    assert select_precision("bf16", CPU) == "bf16"


def test_a_measurement_leaves_the_threads_as_they_are() -> None:
    before = torch.get_num_threads()
    rates = autotune._measure([1, 2], ["fp32", "bf16"])
    assert rates.keys() == {("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)}
    assert min(rates.values()) > 0
    assert torch.get_num_threads() == before
