"""The first trials of every workload of the soak."""

from __future__ import annotations

from pathlib import Path

import pytest
from workload import Complete, Impossible, Workload, all_workloads


@pytest.mark.parametrize("one", [pytest.param(one, id=f"{one.row}-{one.name}") for one in all_workloads() if one.quick])
def test_a_promise_is_kept(one: Workload, tmp_path: Path) -> None:
    try:
        with one.open(tmp_path) as trial:
            for seed in range(one.quick):
                try:
                    trial(seed)
                except Complete:
                    break
                except Exception as error:
                    error.add_note(f"{one.name}, seed {seed}")
                    raise
    except Impossible as reason:
        pytest.skip(str(reason))
