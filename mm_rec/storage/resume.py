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
from mm_rec.regular_file import open_regular
from mm_rec.storage import checkpoint, files
from mm_rec.storage.checkpoint import Checkpoint, CheckpointError, Event
from mm_rec.storage.lock import Lock
from mm_rec.storage.run_config import (
    CHECKPOINTS,
    COMPLETED,
    RECORDS,
    Config,
    completed_checkpoint,
    differences,
    list_runs,
    plain,
    read_config,
    require_configs,
    same_run,
    versions,
    write_config,
)
from mm_rec.storage.run_folder import RunFolder
from mm_rec.translation import Translatable, join_texts

__all__ = ["cut_back", "find_newest", "open_run", "require_checkpoints", "rewind"]


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
    """Find or make the run folder that a command means, and own it.

    :func:`find_newest` and :func:`cut_back`, or :func:`rewind` for both, then ready it to go on.

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
            identity, if a run may be the one that is meant and that cannot be told, or if the disk cannot be written.
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
            if not fresh:
                require_configs(runs)
            if same and not fresh:
                run = RunFolder(same[-1], on_event)
            else:
                if not fresh:
                    _require_no_other_name(root, runs, wanted)
                run = _create(root, wanted, _why_new(runs, wanted, fresh), on_event)
    try:
        _ready(run, plain(dict(settings or {})))
    except BaseException:
        run.release()
        raise
    return run


def rewind(run: RunFolder) -> Checkpoint | None:
    """Load the newest valid checkpoint of ``run`` and go back to it; None if there is none yet.

    What follows the saving of that step, such as its evaluation, has to be done again: its records are cut off too.

    Raises:
        CheckpointError: as :func:`find_newest`; nothing is changed then.
    """
    newest = find_newest(run)
    cut_back(run, newest.trainer if newest else None)
    return newest


def find_newest(run: RunFolder) -> Checkpoint | None:
    """Load the newest valid checkpoint of ``run``; None if there is none yet. Nothing is changed.

    Raises:
        CheckpointError: if there are checkpoints but none is valid, or one was completed and there is none.
    """
    newest = checkpoint.load_newest(run.checkpoints, run.event)
    if newest is None:
        require_checkpoints(run.path, run.config)
    run.step = checkpoint.checkpoint_step(newest.path) if newest else 0
    return newest


def require_checkpoints(run: Path, config: Config) -> None:
    """Raise CheckpointError if the run at ``run``, which has no valid checkpoint, is not just one that begins."""
    folder = run / CHECKPOINTS
    if checkpoint.list_checkpoints(folder):
        raise CheckpointError("no checkpoint of {run} is valid any more; start beside it with --fresh", run=run)
    completed = completed_checkpoint(run, config)
    if completed is None:
        return
    if folder.is_symlink() and not folder.exists():
        why = Translatable(
            "{folder} is a link to {target}, which cannot be reached; mount its disk",
            folder=folder,
            target=folder.readlink(),
        )
    elif not folder.exists():
        why = Translatable("there is no {folder}; put it back", folder=folder)
    else:
        why = Translatable("there is none in {folder}; put them back", folder=folder)
    raise CheckpointError(
        "{run} has completed {completed}, and {why}, or start beside it with --fresh",
        run=run,
        completed=completed,
        why=why,
    )


def cut_back(run: RunFolder, trainer: Mapping[str, Any] | None) -> None:
    """Take ``run`` back to the checkpoint that :func:`find_newest` found, whose ``trainer`` this is; None for none.

    To be called once nothing else can refuse to train: records are cut, and later checkpoints, which are damaged, are
    set aside under another name.
    """
    for folder in (run.checkpoints, run.samples):
        with files.reporting_errors(folder):
            folder.mkdir(exist_ok=True)
    completed = run.config.get(COMPLETED)
    if completed is not None and not (run.checkpoints / checkpoint.checkpoint_name(completed)).exists():
        run.event(
            Translatable(
                "{checkpoint} was completed and is not there any more", checkpoint=checkpoint.checkpoint_name(completed)
            )
        )
    for path in checkpoint.list_checkpoints(run.checkpoints):
        if checkpoint.checkpoint_step(path) > run.step:
            run.event(
                Translatable("set {name} aside as {new_name}", name=path.name, new_name=checkpoint.set_aside(path).name)
            )
    sizes = trainer.get("run", {}).get("records", {}) if trainer else dict.fromkeys(RECORDS, 0)
    for name, size in sizes.items():
        run.cut_back(name, size)
    if trainer:
        run.note_completed(run.step)
    run.event(
        Translatable("goes on from {checkpoint}", checkpoint=checkpoint.checkpoint_name(run.step))
        if trainer
        else Translatable("starts at step 0")
    )


def _resume(root: Path, wanted: Config, source: Path, allow_changes: bool, on_event: Event | None) -> RunFolder:
    """The run that goes on from the checkpoint ``source``: its own, else one that begins with it."""
    found = checkpoint.load(source)
    origin = found.trainer.get("run", {})
    changes = differences({key: origin.get(key) for key in wanted}, wanted)
    if changes and not allow_changes:
        raise UserError(
            "{source} is of another run: {changes}. --allow_changes accepts that",
            source=source,
            changes=join_texts("; ", changes),
        )
    home = source.parent.parent
    at_home = source.parent.name == CHECKPOINTS and same_run(read_config(home), wanted)
    if at_home and checkpoint.newest_valid(source.parent) == source:
        return RunFolder(home, on_event)
    with _choosing(root):
        for _, path, config in reversed(list_runs(root, wanted["stage"])):
            started = (config or {}).get("started_from", {})
            if same_run(config, wanted) and started.get("manifest_sha256") == found.sha256:
                return RunFolder(path, on_event)  # this command was stopped before, and comes again
        why = join_texts("; ", [Translatable("it starts from {source}", source=source), *changes])
        started = {"started_from": {"path": str(source), "manifest_sha256": found.sha256}}
        return _create(root, wanted | started, why, on_event, found)


def _create(
    root: Path, config: Config, why: str, on_event: Event | None, source: Checkpoint | None = None
) -> RunFolder:
    """A run folder under the next free number, with the checkpoint ``source`` as its first if given."""
    path = _next_path(root, config["stage"])
    with files.atomic_folder(path, manifest=False) as folder:
        (folder / CHECKPOINTS).mkdir()
        (folder / "samples").mkdir()
        completed = source.trainer["step"] if source else None
        write_config(folder, {**config, COMPLETED: completed, "versions": versions(), "settings": {}})
        if source is not None:
            name = checkpoint.checkpoint_name(source.trainer["step"])  # whatever the user has named it
            shutil.copytree(source.path, folder / CHECKPOINTS / name, copy_function=_link_or_copy)
            for name in RECORDS:
                record = source.path.parent.parent / name
                if record.exists():
                    with open_regular(record) as file, open(folder / name, "xb") as copy:
                        shutil.copyfileobj(file, copy)
    run = RunFolder(path, on_event)
    run.event(Translatable("new run {path}: {why}", path=path, why=why))
    return run


def _ready(run: RunFolder, settings: Config) -> None:
    """Clean up after a dead owner, and note what is not as it was."""
    for folder in (run.path, run.checkpoints, run.samples):
        for leftover in files.remove_leftovers(folder):
            run.event(Translatable("removed {name}, left over from an interrupted write", name=leftover.name))
    before = {key: run.config.get(key) or {} for key in ("versions", "settings")}
    now = {"versions": versions(), "settings": settings}
    if now != before:
        for key in now:
            if before[key] and before[key] != now[key]:
                run.event(
                    Translatable(
                        "{key} changed: {changes}",
                        key=key,
                        changes=join_texts("; ", differences(before[key], now[key])),
                    )
                )
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


def _require_no_other_name(root: Path, runs: list[tuple[int, Path, Config | None]], wanted: Config) -> None:
    """Raise UserError if the run that is ``wanted`` lies in ``root`` under a name that no run has by itself."""
    known = {path for _, path, _ in runs}
    for path in sorted(root.iterdir()):
        if path not in known and same_run(read_config(path), wanted):
            free = _next_path(root, wanted["stage"])
            raise UserError(
                "{path} is this run under another name; rename it to {free} to go on with it, or "
                "start anew beside it with --fresh",
                path=path,
                free=free,
            )


def _next_path(root: Path, stage: str) -> Path:
    """The run folder of the next free number."""
    number = max((number for number, _, _ in list_runs(root, stage)), default=0) + 1
    return root / (stage if number == 1 else f"{stage}-{number}")


def _why_new(runs: list[tuple[int, Path, Config | None]], wanted: Config, fresh: bool) -> str:
    """Why a command makes a new run beside ``runs``."""
    if not runs:
        return Translatable("the first of its kind here")
    _, path, config = runs[-1]
    if config is None:
        return Translatable("{name} is not a run folder", name=path.name)
    changes = differences(config["identity"], wanted["identity"])
    if fresh or not changes:
        return Translatable("asked for by --fresh")
    return Translatable("{name} is another run: {changes}", name=path.name, changes=join_texts("; ", changes))


def _link_or_copy(source: str, target: str) -> None:
    """Share the content of a file that never changes; copy it where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
