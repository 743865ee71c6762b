"""Row 20: parts of a run that are absent, emptied, renamed or changed, while it is idle and while it is trained in."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from changing import OF_A_RUN, elsewhere
from pipeline_workloads import shared_pipeline
from tiny_runs import STEPS, When, as_argument, clear, difference, result
from workload import Trial, workload

from mm_rec.storage.checkpoint import checkpoint_name, list_checkpoints

STAGE = "stage1"
MOMENTS = {
    "mm_rec.storage.run_folder:RunFolder.log_loss": STEPS,
    "mm_rec.storage.run_folder:RunFolder.log_timing": STEPS,
    "mm_rec.storage.run_folder:RunFolder.save": 6,
    "mm_rec.storage.checkpoint:save": 5,
    "mm_rec.system:sync": 60,
    "mm_rec.training.trainer:Trainer._evaluate": 3,
    "mm_rec.training.trainer:Trainer._sample": 2,
}
"""Functions just before a call of which a running training loses something, and how often at least each is called."""

LOST = ("checkpoints removed", "checkpoints emptied", "checkpoints on a disk that is not mounted")
REFUSED_IDLE = ("renamed", "on a disk that is not mounted", "a bit of config.yaml flipped", "config.yaml removed")
MAY_END_TRAINING = (
    *LOST, "samples removed", "renamed", "moved", "on a disk that is not mounted", "a bit of config.yaml flipped",
    "config.yaml removed",
)  # fmt: skip
"""A training that is renamed in the midst of a sample, say, or whose configuration is lost before it has begun, may end
in a line; its steps are saved before."""


def put_back(kind: str, run: Path, sound: Path) -> None:
    """Do what the message advises: put back what is missing, from where it went or from a copy."""
    if kind in ("renamed", "moved", "on a disk that is not mounted"):
        if run.is_symlink():
            run.unlink()
        (run.with_name("renamed") if kind == "renamed" else elsewhere(run)).rename(run)
    elif kind in LOST:
        if (run / "checkpoints").is_symlink():
            (run / "checkpoints").unlink()
        clear(run / "checkpoints")
        shutil.move(elsewhere(run).with_name("checkpoints"), run / "checkpoints")
    elif kind == "samples removed":
        shutil.move(elsewhere(run).with_name("samples"), run / "samples")
    elif "config.yaml" in kind:
        shutil.copyfile(sound / "config.yaml", run / "config.yaml")


def records(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("loss_log.txt", "metrics.jsonl") if (run / name).exists()}


def one_line(log: str) -> str:
    """The error with which a command ended: one line, no traceback."""
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, log
    assert "Traceback" not in log, log
    return lines[0]


def end_of(run: Path, kind: str = "") -> dict[str, bytes]:
    """Of a run all that has to come out the same, whatever older parts were taken away."""
    last = f"checkpoints/{checkpoint_name(STEPS)}"
    lost = ("samples/",) if kind == "samples removed" else ()
    return {name: content for name, content in result(run).items()
            if not name.startswith(("checkpoints/", *lost)) or name.startswith(last)}  # fmt: skip


class Absence:
    """The undisturbed run, and runs that were killed in each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pipeline = folder, shared_pipeline()
        self.pipeline.undisturbed(STAGE)
        self._killed: dict[int, Path] = {}

    def killed(self, step: int) -> Path:
        """A folder of runs with one that was killed in ``step``; in step 0 before its first checkpoint."""
        if step not in self._killed:
            root = self.folder / f"killed{step}"
            what = "mm_rec.storage.run_folder:RunFolder.log_loss" if step else "mm_rec.storage.checkpoint:save"
            when = as_argument(When(what, max(step, 1), 0.0))
            child = self.pipeline.supervisor.run("tiny_runs.run", command=self.pipeline.command(STAGE, root), when=when)
            assert child.status == -9, child.log
            self._killed[step] = root
        return self._killed[step]

    def check(self, run: Path, kind: str) -> None:
        whole = end_of(self.pipeline.folder / "whole" / STAGE, kind)
        assert difference(end_of(run, kind), whole) == [], kind

    def go_on(self, root: Path, kind: str, sound: Path) -> None:
        """Put back what is missing; the same command then comes to the same end."""
        put_back(kind, root / STAGE, sound)
        child = self.pipeline.supervisor.run("tiny_runs.run", command=self.pipeline.command(STAGE, root))
        assert child.status == 0, child.log
        self.check(root / STAGE, kind)


@workload(20, "a part of an idle run removed, emptied, renamed, linked, copied or changed by a bit", unit="runs",
          quick=2, soak=60)  # fmt: skip
def parts_lost_while_idle(folder: Path) -> Iterator[Trial]:
    absence = Absence(folder)

    def trial(seed: int) -> str:
        rng = random.Random(seed)
        kind, step = rng.choice(list(OF_A_RUN)), rng.choice([0, *range(1, STEPS + 1)])
        sound, root = absence.killed(step), folder / f"idle{seed}" / "runs"
        shutil.copytree(sound, root)
        run, before = root / STAGE, records(root / STAGE)
        completed = bool(list_checkpoints(run / "checkpoints"))
        OF_A_RUN[kind](run)
        child = absence.pipeline.supervisor.run("tiny_runs.run", command=absence.pipeline.command(STAGE, root))
        refused = kind in REFUSED_IDLE or (kind in LOST and completed)
        if refused:
            assert child.status == 2, child.log
            assert str(root) in one_line(child.log)
            home = {"renamed": run.with_name("renamed"), "on a disk that is not mounted": elsewhere(run)}.get(kind, run)
            assert records(home) == before, "records were cut"
            absence.go_on(root, kind, sound / STAGE)
        else:
            assert child.status == 0, child.log
            absence.check(run, kind)
        if kind == "moved":
            assert records(elsewhere(run)) == before
        clear(root.parent)
        began = "" if completed else ", before its first checkpoint"
        return f"{kind}{began}: {'refused, gone on with when put back' if refused else 'gone on with'}"

    yield trial


@workload(20, "a part of a run removed, emptied, renamed, linked, copied or changed while it is trained in",
          unit="runs", quick=2, soak=60)  # fmt: skip
def parts_lost_in_training(folder: Path) -> Iterator[Trial]:
    absence = Absence(folder)

    def trial(seed: int) -> str:
        rng, root = random.Random(seed), folder / f"trained{seed}" / "runs"
        kind, what = rng.choice(list(OF_A_RUN)), rng.choice(list(MOMENTS))
        run = root / STAGE
        change = {"what": what, "count": rng.randint(2, MOMENTS[what]), "kind": kind, "path": str(run)}
        child = absence.pipeline.supervisor.run(
            "tiny_runs.run", command=absence.pipeline.command(STAGE, root), change=change
        )
        assert f"changed {run}: {kind}" in child.log, child.log
        if child.status == 0:
            places = (run, run.with_name("renamed"), elsewhere(run))
            absence.check(next(one for one in places if (one / "loss_log.txt").exists()), kind)
            outcome = "gone on with"
        else:
            assert child.status == 2, child.log
            assert kind in MAY_END_TRAINING, child.log
            one_line(child.log)
            absence.go_on(root, kind, absence.killed(0) / STAGE)
            outcome = "ended in a line, gone on with when put back"
        clear(root.parent)
        return f"{kind}: {outcome}"

    yield trial
