"""Rows 1, 2, 3: saves that are killed or fail at any of their system calls, runs that are killed at any of theirs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import saving
from supervisor import CHANGING, WRITING, Child, Supervisor, can_trace, small_disk
from workload import Complete, Impossible, Trial, workload

from mm_rec.storage import checkpoint, files

ERRORS = ("ENOSPC", "EIO")


def opened(folder: Path, *, traced: bool = True) -> tuple[Supervisor, Path]:
    """A supervisor, and a folder with the checkpoint of step 50."""
    if traced and (reason := can_trace()):
        raise Impossible(reason)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    saving.save(str(checkpoints), 50)
    return Supervisor(folder), checkpoints


def check_after(folder: Path, context: object) -> int:
    """The newest checkpoint is loaded, right and whole, and nothing else is there; returns its step."""
    events: list[str] = []
    newest = checkpoint.load_newest(folder, events.append)
    assert newest is not None, context
    assert events == [], context
    assert saving.check(checkpoint.load(folder / "step_000050")) == 50, context
    assert {path.name for path in folder.iterdir()} == {"step_000050", newest.path.name}, context
    return saving.check(newest)


def check_refusal(child: Child, path: Path, context: object) -> None:
    """The program ended with one line that names the path, the bytes needed and the bytes free."""
    assert child.status == 2, (context, child.log)
    assert child.log.startswith(f"error: cannot write {path}: "), context
    assert " needed, " in child.log, context
    assert " free); " in child.log, context
    assert child.log.count("\n") == 1, (context, child.log)


def calls_of_a_save(supervisor: Supervisor, folder: Path, kinds: str) -> list[tuple[str, int]]:
    """The system calls of a save that nothing disturbs: name, and the how manieth of that name."""
    whole = supervisor.run("saving.save", inject=kinds, folder=str(folder), step=60)
    assert whole.status == 0, whole.log
    files.remove_folder(folder / "step_000060")
    return whole.calls()


@workload(2, "kill -9 at every system call of a save", unit="system calls", quick=30, soak=1000)
def save_killed_at_every_call(folder: Path) -> Iterator[Trial]:
    supervisor, checkpoints = opened(folder)
    calls = calls_of_a_save(supervisor, checkpoints, CHANGING)
    assert len(calls) > 60
    random.Random(0).shuffle(calls)

    def trial(seed: int) -> str:
        if seed >= len(calls):
            raise Complete
        name, k = calls[seed]
        inject = f"{name}:signal=SIGKILL:when={k}"
        child = supervisor.run("saving.save", inject=inject, folder=str(checkpoints), step=100)
        assert child.status == -9, (inject, child.log)
        files.remove_leftovers(checkpoints)
        step = check_after(checkpoints, inject)
        if (checkpoints / "step_000100").exists():
            files.remove_folder(checkpoints / "step_000100")
        return "the old checkpoint is the newest" if step == 50 else "the new checkpoint is the newest"

    yield trial


@workload(
    3, "no space (ENOSPC) and I/O errors (EIO) at every system call of a save", unit="system calls",
    quick=40, soak=1000,
)  # fmt: skip
def save_failing_at_every_call(folder: Path) -> Iterator[Trial]:
    supervisor, checkpoints = opened(folder)
    calls = calls_of_a_save(supervisor, checkpoints, WRITING)
    assert len(calls) > 40
    faults = [(error, *call) for call in calls for error in ERRORS]
    random.Random(0).shuffle(faults)
    path = checkpoints / "step_000100"

    def trial(seed: int) -> str:
        if seed >= len(faults):
            raise Complete
        error, name, k = faults[seed]
        inject = f"{name}:error={error}:when={k}"
        child = supervisor.run("saving.save", inject=inject, folder=str(checkpoints), step=100)
        context = (inject, child.faults(), child.log)
        assert child.faults(), context
        if child.status != 0:
            check_refusal(child, path, context)
        step = check_after(checkpoints, context)
        if step == 100:
            files.remove_folder(path)
        if child.status == 0:  # some may fail without harm, such as the making of a folder that is there
            assert step == 100, context
            return f"{error}: saved all the same"
        return f"{error}: refused, the old checkpoint is the newest"

    yield trial


@workload(3, "a limit on file sizes that cuts a write short", unit="limits", quick=4, soak=100)
def save_with_short_writes(folder: Path) -> Iterator[Trial]:
    supervisor, checkpoints = opened(folder, traced=False)
    path = checkpoints / "step_000100"

    def trial(seed: int) -> str:
        limit = [0, 100, 4096, 8192][seed] if seed < 4 else random.Random(seed).randrange(8100)
        child = supervisor.run("saving.save_beyond_limit", folder=str(checkpoints), step=100, limit=limit)
        check_refusal(child, path, limit)
        assert "file too large" in child.log, child.log
        assert check_after(checkpoints, limit) == 50
        return "refused, the old checkpoint is the newest"

    yield trial


@workload(3, "a disk that fills up, before a save and in its midst", unit="disks", quick=4, soak=60)
def save_on_a_full_disk(folder: Path) -> Iterator[Trial]:
    supervisor, _ = opened(folder, traced=False)

    def trial(seed: int) -> str:
        pages = [1, 3, 8, 12][seed % 4] if seed < 4 else random.Random(seed).randint(1, 14)
        with small_disk(folder / "disk", 4096 * (pages + 40)) as impossible:
            if impossible:
                raise Impossible(f"no file system can be mounted here: {impossible}")
            checkpoints = folder / "disk" / "checkpoints"
            checkpoints.mkdir()
            first = supervisor.run("saving.save_without_check", folder=str(checkpoints), step=50)
            assert first.status == 0, first.log
            (folder / "disk" / "other").write_bytes(bytes(files.free_bytes(checkpoints) - 4096 * pages))
            for work in ("save_without_check", "save"):
                child = supervisor.run(f"saving.{work}", folder=str(checkpoints), step=100)
                check_refusal(child, checkpoints / "step_000100", (work, pages))
                assert "no space left on device" in child.log
                assert check_after(checkpoints, (work, pages)) == 50
        return "refused, the old checkpoint is the newest"

    yield trial


@workload(1, "kill -9 at random system calls of a run that saves and prunes", unit="runs", quick=3, soak=100,
          idle=["came out byte for byte"])  # fmt: skip
def runs_killed_at_system_calls(folder: Path) -> Iterator[Trial]:
    steps = 7
    supervisor, _ = opened(folder)
    straight = supervisor.run("saving.train", inject=CHANGING, root=str(folder / "straight"), steps=steps)
    assert straight.status == 0, straight.log
    calls = straight.calls()

    def trial(seed: int) -> dict[str, int]:
        rng, root = random.Random(seed), folder / f"killed{seed}"
        statuses: list[int | None] = []
        while 0 not in statuses and len(statuses) < 8:
            name, k = rng.choice(calls)
            inject = f"{name}:signal=SIGKILL:when={k}"
            child = supervisor.run("saving.train", inject=inject, root=str(root), steps=steps)
            statuses.append(child.status)
        assert statuses[0] == -9
        assert set(statuses) <= {0, -9}, child.log
        last = supervisor.run("saving.train", root=str(root), steps=steps)
        assert last.status == 0, last.log
        check_run(folder / "straight", root, steps)
        files.remove_folder(root)
        return {"kills": statuses.count(-9), "came out byte for byte": 1}

    yield trial


def check_run(straight: Path, killed: Path, steps: int) -> None:
    """The run that was killed has the records and the checkpoints of the one that was not, and nothing else."""
    assert [path.name for path in killed.glob("stage1*")] == ["stage1"]
    runs = [straight / "stage1", killed / "stage1"]
    for name in ("loss_log.txt", "metrics.jsonl"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
        assert len((runs[1] / name).read_text().splitlines()) == steps
    files = [
        {path.relative_to(run): path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
        for run in runs
    ]
    assert files[0] == files[1]
    left = list(killed.rglob(".tmp-*"))
    assert not left, left
