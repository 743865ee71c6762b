"""Row 12: training in less address space than it takes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline_workloads import shared_pipeline
from tiny_runs import clear
from workload import Trial, workload

SIZES = {"seq_len": 512, "batch_size": 4, "max_steps": 2}
SHARES = (0.25, 0.5, 0.75)


def estimate(log: str) -> float:
    """The bytes that a run says it takes."""
    found = re.search(r"memory  about ([\d.]+) ([kMG])B of", log)
    assert found is not None, log
    return float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


@workload(12, "a limit on memory (RLIMIT_AS) of 25, 50, 75% and random shares of what the run takes", unit="limits",
          quick=3, soak=60, idle=["enough: it ran"])  # fmt: skip
def little_memory(folder: Path) -> Iterator[Trial]:
    pipeline = shared_pipeline()
    command = pipeline.command("stage1", folder / "free", **SIZES)
    free = pipeline.supervisor.run("tiny_runs.run", command=command)
    assert free.status == 0, free.log
    needed = estimate(free.log)

    def trial(seed: int) -> str:
        share = SHARES[seed] if seed < len(SHARES) else random.Random(seed).uniform(0.0, 1.1)
        root = folder / f"limited{seed}"
        command = pipeline.command("stage1", root, **SIZES)
        child = pipeline.supervisor.run("tiny_runs.run_limited", command=command, n_bytes=int(share * needed))
        assert "Traceback" not in child.log, child.log
        if child.status == 0:
            assert share > 0.9, (share, child.log)
            outcome = "enough: it ran"
        else:
            assert child.status == 2, (share, child.status, child.log)
            message = child.log[child.log.index("error: ") :].splitlines()[0]
            early = "training would take" in message and "are free; " in message
            assert early or "out of memory" in message, message
            outcome = "refused before the start, with the estimate" if early else "ended with a clear message"
        clear(root)
        return outcome

    yield trial
