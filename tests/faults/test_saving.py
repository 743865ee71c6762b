"""A save that is killed or fails, at any of its system calls: the checkpoint before it stays, nothing is mixed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import saving
from supervisor import CHANGING, WRITING, Child, Supervisor, can_trace, rounds, small_disk

from mm_rec import checkpoint, storage

needs_trace = pytest.mark.skipif(bool(can_trace()), reason=str(can_trace()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoint of step 50."""
    path = tmp_path / "checkpoints"
    path.mkdir()
    saving.save(str(path), 50)
    return path


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


def count_calls(supervisor: Supervisor, folder: Path, kinds: str) -> list[tuple[str, int]]:
    """The system calls of a save that nothing disturbs."""
    whole = supervisor.run("saving.save", inject=kinds, folder=str(folder), step=60)
    assert whole.status == 0, whole.log
    storage.remove_folder(folder / "step_000060")
    return whole.calls()


@needs_trace
def test_killed_at_any_system_call(supervisor: Supervisor, folder: Path) -> None:
    calls = count_calls(supervisor, folder, CHANGING)
    assert len(calls) > 60
    outcomes = set()
    chosen = random.Random(0).sample(calls[:-2], rounds(30, len(calls) - 2))
    for name, k in [*chosen, *calls[-2:]]:  # the last ones come after the renaming
        inject = f"{name}:signal=SIGKILL:when={k}"
        child = supervisor.run("saving.save", inject=inject, folder=str(folder), step=100)
        assert child.status == -9, (inject, child.log)
        storage.remove_leftovers(folder)
        outcomes.add(check_after(folder, inject))
        if (folder / "step_000100").exists():
            storage.remove_folder(folder / "step_000100")
    assert outcomes == {50, 100}


@needs_trace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_failing_at_any_system_call(supervisor: Supervisor, folder: Path, error: str) -> None:
    calls = count_calls(supervisor, folder, WRITING)
    assert len(calls) > 40
    chosen = random.Random(error).sample(calls, rounds(25, len(calls)))
    refused = 0
    for name, k in chosen:
        inject = f"{name}:error={error}:when={k}"
        child = supervisor.run("saving.save", inject=inject, folder=str(folder), step=100)
        context = (inject, child.faults(), child.log)
        assert child.faults(), context
        if child.status != 0:  # some calls may fail without harm, such as the making of a folder that is there
            check_refusal(child, folder / "step_000100", context)
            refused += 1
        if check_after(folder, context) == 100:
            storage.remove_folder(folder / "step_000100")
        else:
            assert child.status == 2, context
    assert refused >= len(chosen) - 3


@pytest.mark.parametrize("limit", [0, 100, 4096, 8192])
def test_a_write_cut_short(supervisor: Supervisor, folder: Path, limit: int) -> None:
    child = supervisor.run("saving.save_beyond_limit", folder=str(folder), step=100, limit=limit)
    check_refusal(child, folder / "step_000100", limit)
    assert "file too large" in child.log
    assert check_after(folder, limit) == 50


@pytest.mark.parametrize("pages", [1, 3, 8, 12])
def test_a_disk_that_fills_up(supervisor: Supervisor, tmp_path: Path, pages: int) -> None:
    with small_disk(tmp_path / "disk", 4096 * (pages + 40)) as impossible:
        if impossible:
            pytest.skip(f"no file system can be mounted here: {impossible}")
        folder = tmp_path / "disk" / "checkpoints"
        folder.mkdir()
        first = supervisor.run("saving.save_without_check", folder=str(folder), step=50)
        assert first.status == 0, first.log
        (tmp_path / "disk" / "other").write_bytes(bytes(storage.free_bytes(folder) - 4096 * pages))
        for work in ("save_without_check", "save"):
            child = supervisor.run(f"saving.{work}", folder=str(folder), step=100)
            check_refusal(child, folder / "step_000100", (work, pages))
            assert "no space left on device" in child.log
            assert check_after(folder, (work, pages)) == 50


@pytest.mark.parametrize("seed", range(rounds(10, 200)))
def test_killed_at_any_instant_a_run_goes_on_as_if_never_stopped(
    supervisor: Supervisor, tmp_path: Path, seed: int
) -> None:
    rng, steps, kills = random.Random(seed), 10, 0
    assert supervisor.run("saving.train", root=str(tmp_path / "straight"), steps=steps).status == 0
    arguments = {"root": str(tmp_path / "killed"), "steps": steps, "seconds_a_step": 0.002}
    while kills < 4:
        child = supervisor.start("saving.train", **arguments)
        child.go()
        time.sleep(rng.uniform(0, 0.06))
        child.kill()
        if child.wait() == 0:
            break
        kills += 1
    last = supervisor.run("saving.train", **arguments)
    assert last.status == 0, last.log
    check_run(tmp_path, steps)


@needs_trace
@pytest.mark.parametrize("seed", range(rounds(3, 100)))
def test_killed_at_any_system_call_a_run_goes_on_as_if_never_stopped(
    supervisor: Supervisor, tmp_path: Path, seed: int
) -> None:
    rng, steps = random.Random(seed), 7
    straight = supervisor.run("saving.train", inject=CHANGING, root=str(tmp_path / "straight"), steps=steps)
    assert straight.status == 0, straight.log
    arguments = {"root": str(tmp_path / "killed"), "steps": steps}
    statuses = []
    while 0 not in statuses and len(statuses) < 8:
        name, k = rng.choice(straight.calls())
        child = supervisor.run("saving.train", inject=f"{name}:signal=SIGKILL:when={k}", **arguments)
        statuses.append(child.status)
    assert statuses[0] == -9
    assert set(statuses) <= {0, -9}, child.log
    last = supervisor.run("saving.train", **arguments)
    assert last.status == 0, last.log
    check_run(tmp_path, steps)


def check_run(folder: Path, steps: int) -> None:
    """The run that was killed has the records and the checkpoints of the one that was not, and nothing else."""
    straight, killed = folder / "straight" / "stage1", folder / "killed" / "stage1"
    assert [path.name for path in (folder / "killed").glob("stage1*")] == ["stage1"]
    for name in ("loss_log.txt", "metrics.jsonl"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
        assert len((killed / name).read_text().splitlines()) == steps
    files = [
        {path.relative_to(run): path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
        for run in (straight, killed)
    ]
    assert files[0] == files[1]
    assert not list(killed.rglob(".tmp-*"))
