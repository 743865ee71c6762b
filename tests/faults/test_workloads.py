"""The first trials of every workload of the soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from workload import Complete, Impossible, Workload, all_workloads, counted


def first_trials(one: Workload, folder: Path) -> None:
    """Do the quick trials of a workload; asserts that they tried something."""
    outcomes: Counter[str] = Counter()
    with one.open(folder) as trial:
        for seed in range(one.quick):
            try:
                outcome = trial(seed)
                assert outcome, "the trial does not say what it tried"
            except Complete:
                break
            except Exception as error:
                error.add_note(f"{one.name}, seed {seed}")
                raise
            outcomes.update(counted(outcome))
    assert one.tried(outcomes), f"{one.name} tried nothing: {dict(outcomes)}"


NATIVE = ["changed_resumes"]
"""Workloads that choose another level of the native kernels."""
QUICK = [
    pytest.param(one, id=f"{one.row}-{one.name}", marks=[pytest.mark.native] if one.name in NATIVE else [])
    for one in all_workloads()
    if one.quick
]


@pytest.mark.parametrize("one", QUICK)
def test_a_promise_is_kept(one: Workload, tmp_path: Path) -> None:
    try:
        first_trials(one, tmp_path)
    except Impossible as reason:
        pytest.skip(str(reason))


def complete(seed: int) -> str:
    raise Complete


def workload_of(trial: Callable[[int], Any]) -> Workload:
    return Workload(0, "example", "", "trials", 2, 2, lambda folder: nullcontext(trial), idle=("nothing broke",))


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (lambda seed: None, "does not say what it tried"),
        (lambda seed: {}, "does not say what it tried"),
        (lambda seed: "nothing broke", "tried nothing"),
        (lambda seed: {"kills": 0, "nothing broke": 1}, "tried nothing"),
        (complete, "tried nothing"),
    ],
    ids=["no-outcome", "no-numbers", "idle", "no-kills", "no-trials"],
)
def test_a_workload_that_tries_nothing_fails(trial: Callable[[int], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        first_trials(workload_of(trial), tmp_path)


def test_one_trial_that_tries_something_is_enough(tmp_path: Path) -> None:
    first_trials(workload_of(lambda seed: {"kills": seed, "nothing broke": 1}), tmp_path)
