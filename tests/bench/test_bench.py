"""The comparison of training steps that `mm-rec bench` and the benchmarks print."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.bench.training import Contender, compare_steps
from mm_rec.config import PRESETS


def test_a_peer_without_the_memory_is_left_out_and_the_others_go_on() -> None:
    calls = []

    def step(name: str) -> Contender:
        def run(tokens: Tensor, targets: Tensor) -> None:
            calls.append(name)
            if name == "large":
                raise torch.OutOfMemoryError("CUDA out of memory")

        return Contender(name, run, 1.0, 1)

    times = compare_steps(PRESETS["tiny"], "fp32", 1, 16, {name: step(name) for name in ("one", "large", "other")}, 2)
    assert list(times) == ["one", "other"]
    assert calls == ["one", "large", "other", "one", "other", "one", "other"]
    assert [len(one.all_seconds) for one in times.values()] == [2, 2]
