"""Going on with a run: which run folder a command means, and which of its checkpoints training continues from.

After ``kill -9``, a full disk or a power cut the same command finds its run here, takes the newest checkpoint that is
whole, and cuts the records back to it; what was written half is removed or set aside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm_rec.errors import UserError
from mm_rec.storage import checkpoint, files
from mm_rec.storage.checkpoint import Checkpoint, CheckpointError, Event
from mm_rec.storage.lock import Lock
from mm_rec.storage.run_config import (
    Config,
    differences,
    list_runs,
    plain,
    read_config,
    same_run,
    versions,
    write_config,
)
from mm_rec.storage.run_folder import RECORDS, RunFolder

__all__ = ["open_run", "rewind"]


def open_run(
    root: Path,
    stage: str,
    identity: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    fresh: bool = False,
    resume_from: Path | None = None,
    allow_changes: bool = False,
    on_event: Event | None = None,
) -> RunFolder:
    """Find or make the run folder that a command means, and own it; :func:`rewind` then readies it to go on.

    Without ``resume_from`` that is the newest run in ``root`` of the same stage and identity, else a new one.
    With it, it is the run named, if that has the same identity and the checkpoint is its newest valid one;
    else a new run in ``root`` that begins with the checkpoint and the records up to it.

    Args:
        root: folder of runs, made if missing.
        stage: the kind of run; names the folder.
        identity: plain values that decide the result: settings, hashes of data and tokenizer.
        settings: plain values that may change when a run is continued: steps, intervals, paths.
        fresh: make a new run even if there is one of this identity.
        resume_from: a checkpoint, or a run folder for its newest valid checkpoint.
        allow_changes: accept a ``resume_from`` of another identity, and record the differences.
        on_event: is told every line of events.log as it is written.

    Raises:
        UserError: if another process owns the run, if ``resume_from`` is no valid checkpoint or of another
            identity, or if the disk cannot be written.
    """
    root, wanted = Path(root), plain({"stage": stage, "identity": dict(identity)})
    with files.reporting_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    if resume_from is not None:
        run = _resume(root, wanted, checkpoint.resolve(resume_from, on_event), allow_changes, on_event)
    else:
        with _choosing(root):
            runs = list_runs(root, stage)
            same = [path for _, path, config in runs if same_run(config, wanted)]
            if same and not fresh:
                run = RunFolder(same[-1], on_event)
            else:
                run = _create(root, wanted, _why_new(runs, wanted, fresh), on_event)
    try:
        _ready(run, plain(dict(settings or {})))
    except BaseException:
        run.release()
        raise
    return run


def rewind(run: RunFolder) -> Checkpoint | None:
    """Load the newest valid checkpoint of ``run`` and cut its records back to it; returns None if there is none yet.

    To be called before training, and to go back after a loss that ran away. What follows the saving of that
    step, such as its evaluation, has to be done again: its records are cut off too. Damaged checkpoints are
    passed over and set aside under another name.

    Raises:
        CheckpointError: if there are checkpoints but none is valid.
    """
    existing = checkpoint.list_checkpoints(run.checkpoints)
    newest = checkpoint.load_newest(run.checkpoints, run.event)
    if existing and newest is None:
        raise CheckpointError(f"no checkpoint of {run.path} is valid any more; start beside it with --fresh")
    run.step = checkpoint.checkpoint_step(newest.path) if newest else 0
    for path in existing:
        if checkpoint.checkpoint_step(path) > run.step:
            run.event(f"set {path.name} aside as {checkpoint.set_aside(path).name}")
    sizes = newest.trainer.get("run", {}).get("records", {}) if newest else {}
    for name in RECORDS:
        run.cut_back(name, sizes.get(name, 0))
    run.event(f"goes on from {newest.path.name}" if newest else "starts at step 0")
    return newest


def _resume(root: Path, wanted: Config, source: Path, allow_changes: bool, on_event: Event | None) -> RunFolder:
    """The run that goes on from the checkpoint ``source``: its own, else one that begins with it."""
    found = checkpoint.load(source)
    origin = found.trainer.get("run", {})
    changes = differences({key: origin.get(key) for key in wanted}, wanted)
    if changes and not allow_changes:
        raise UserError(f"{source} is of another run: {'; '.join(changes)}. --allow_changes accepts that")
    home = source.parent.parent
    at_home = source.parent.name == "checkpoints" and same_run(read_config(home), wanted)
    if at_home and checkpoint.newest_valid(source.parent) == source:
        return RunFolder(home, on_event)
    with _choosing(root):
        for _, path, config in reversed(list_runs(root, wanted["stage"])):
            started = (config or {}).get("started_from", {})
            if same_run(config, wanted) and started.get("manifest_sha256") == found.sha256:
                return RunFolder(path, on_event)  # this command was stopped before, and comes again
        why = "; ".join([f"it starts from {source}", *changes])
        started = {"started_from": {"path": str(source), "manifest_sha256": found.sha256}}
        return _create(root, wanted | started, why, on_event, source)


def _create(root: Path, config: Config, why: str, on_event: Event | None, source: Path | None = None) -> RunFolder:
    """A run folder under the next free number, with the checkpoint ``source`` as its first if given."""
    stage = config["stage"]
    number = max((number for number, _, _ in list_runs(root, stage)), default=0) + 1
    path = root / (stage if number == 1 else f"{stage}-{number}")
    with files.atomic_folder(path, manifest=False) as folder:
        (folder / "checkpoints").mkdir()
        (folder / "samples").mkdir()
        write_config(folder, {**config, "versions": versions(), "settings": {}})
        if source is not None:
            shutil.copytree(source, folder / "checkpoints" / source.name, copy_function=_link_or_copy)
            for name in RECORDS:
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(source.parent.parent / name, folder / name)
    run = RunFolder(path, on_event)
    run.event(f"new run {path}: {why}")
    return run


def _ready(run: RunFolder, settings: Config) -> None:
    """Clean up after a dead owner, and note what is not as it was."""
    for folder in (run.path, run.checkpoints, run.samples):
        for leftover in files.remove_leftovers(folder):
            run.event(f"removed {leftover.name}, left over from an interrupted write")
    before = {key: run.config.get(key) or {} for key in ("versions", "settings")}
    now = {"versions": versions(), "settings": settings}
    if now != before:
        for key in now:
            if before[key] and before[key] != now[key]:
                run.event(f"{key} changed: {'; '.join(differences(before[key], now[key]))}")
        run.config |= now
        write_config(run.path, run.config)


@contextlib.contextmanager
def _choosing(root: Path) -> Iterator[None]:
    """Keep other processes from choosing or making a run in ``root`` at the same time."""
    lock = Lock(root / ".lock", wait=True)
    try:
        files.remove_leftovers(root)
        yield
    finally:
        lock.release()


def _why_new(runs: list[tuple[int, Path, Config | None]], wanted: Config, fresh: bool) -> str:
    """Why a command makes a new run beside ``runs``."""
    if not runs:
        return "the first of its kind here"
    _, path, config = runs[-1]
    if config is None:
        return f"{path.name} is not a run folder"
    changes = differences(config["identity"], wanted["identity"])
    if fresh or not changes:
        return "asked for by --fresh"
    return f"{path.name} is another run: {'; '.join(changes)}"


def _link_or_copy(source: str, target: str) -> None:
    """Share the content of a file that never changes; copy it where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
