"""Row 5: a run of 64 steps that is resumed at each of them, in every stage, with and without accumulation."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline_workloads import shared_pipeline
from tiny_runs import STAGES, clear, difference, result
from workload import Complete, Trial, workload

from mm_rec.storage.checkpoint import checkpoint_name

STEPS = 64
ACCUMULATIONS = (1, 3)
CASES = [(stage, parts, step) for stage in STAGES for parts in ACCUMULATIONS for step in range(1, STEPS)]


@workload(
    5, "resume at every step of 64, each stage, 1 and 3 micro-batches a step, over the ends of epochs",
    unit="resumes", quick=2, soak=len(CASES),
)  # fmt: skip
def resumed_at_every_step(folder: Path) -> Iterator[Trial]:
    cases = random.Random(0).sample(CASES, len(CASES))
    whole: dict[tuple[str, int], dict[str, bytes]] = {}
    pipeline = shared_pipeline()

    def run(stage: str, parts: int, root: Path, interval: int) -> str:
        sizes = {"seq_len": 80, "max_steps": STEPS, "accumulation": parts, "keep_checkpoints": 1000}
        intervals = {"checkpoint_interval": interval, "eval_interval": STEPS}
        child = pipeline.supervisor.run("tiny_runs.run", command=pipeline.command(stage, root, **sizes, **intervals))
        assert child.status == 0, child.log
        return child.log

    def trial(seed: int) -> str:
        if seed >= len(cases):
            raise Complete
        stage, parts, step = cases[seed]
        straight = folder / f"straight{parts}"
        if (stage, parts) not in whole:
            log = run(stage, parts, straight, 1)
            passes = re.search(r"\(([\d.,]+) passes over the data\)", log)
            assert passes is not None
            assert float(passes[1].replace(",", "")) > 1, "the data has to end before the run does"
            whole[stage, parts] = end_of(straight / stage)
        resumed = folder / f"resumed{seed}"
        shutil.copytree(straight / stage, resumed / stage, ignore=shutil.ignore_patterns("checkpoints", "samples"))
        (resumed / stage / "samples").mkdir()
        for sample in (straight / stage / "samples").glob("step_000000*"):
            shutil.copy(sample, resumed / stage / "samples")
        name = f"checkpoints/{checkpoint_name(step)}"
        shutil.copytree(straight / stage / name, resumed / stage / name)
        if stage in STAGES[3:]:
            shutil.copytree(straight / "prepared", resumed / "prepared")
        log = run(stage, parts, resumed, STEPS)
        assert f"goes on from {checkpoint_name(step)}" in log, log
        assert difference(end_of(resumed / stage), whole[stage, parts]) == [], (stage, parts, step)
        clear(resumed)
        return f"{stage}: bitwise equal at the end"

    yield trial


def end_of(run: Path) -> dict[str, bytes]:
    """Records, samples and the last checkpoint of a run."""
    last = f"checkpoints/{checkpoint_name(STEPS)}"
    return {name: content for name, content in result(run).items() if not name.startswith("checkpoints/")
            or name.startswith(last)}  # fmt: skip
