"""Run folders: which run a command means, who owns it, and what is written into it.

    ROOT/STAGE, ROOT/STAGE-2, ...
        config.yaml                    identity and settings of the run
        checkpoints/step_000050/ ...   see checkpoint.py
        metrics.jsonl  loss_log.txt    records: the same bytes whether the run was ever stopped or not
        timing.jsonl  events.log       what depends on the clock, and what happened; never cut back
        samples/                       texts, for the trainer
        run.lock                       owned by the process that trains, for as long as it lives

A run folder has one identity for life: the stage, the settings that decide the result, and the hashes of data and
tokenizer. Settings that only say how far or how often (steps, intervals) may change when a run is continued. The
same command again continues the newest run of its identity. Nothing is ever overwritten.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

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

__all__ = ["RECORDS", "Run", "RunFolder"]

METRICS, LOSS_LOG, TIMING, EVENTS, LOCK = "metrics.jsonl", "loss_log.txt", "timing.jsonl", "events.log", "run.lock"
RECORDS = (METRICS, LOSS_LOG)
"""Files that hold the same bytes whether a run was stopped or not; resuming cuts them back to its checkpoint."""


class Run(Protocol):
    """What a trainer needs of its run folder; :class:`RunFolder` has it on rank 0, a stand-in on the other ranks."""

    path: Path
    checkpoints: Path
    samples: Path
    step: int

    def rewind(self) -> Checkpoint | None:
        """Load the newest valid checkpoint and cut the records back to it."""

    def save(self, step: int, *, trainer: Mapping[str, Any], **content: Any) -> Path:
        """Write the checkpoint of ``step``; returns its path."""

    def log_metrics(self, step: int, **values: Any) -> None:
        """Record what a repeated run would yield again."""

    def log_loss(self, step: int, loss: float) -> None:
        """Record the loss of a step."""

    def log_timing(self, step: int, **values: Any) -> None:
        """Record what differs from run to run."""

    def event(self, message: str) -> None:
        """Record what happened, with the time."""


class RunFolder:
    """A run folder that this process owns: made by :meth:`open`, given up by :meth:`release` or with the process.

    Attributes:
        path: the folder.
        config: the content of config.yaml: ``stage``, ``identity``, ``settings`` and more.
        checkpoints, samples: folders inside.
        step: of the newest checkpoint, 0 without one; known after :meth:`rewind`.
    """

    def __init__(self, path: Path, on_event: Event | None = None) -> None:
        """Own the existing run folder ``path``; see :meth:`open`, which finds or makes the right one."""
        self.path, self.checkpoints, self.samples = path, path / "checkpoints", path / "samples"
        self.step = 0
        self._on_event = on_event
        self._lock = Lock(path / LOCK)
        self.config = read_config(path) or {}
        if self._lock.dead_owner:
            self.event(f"took over from {self._lock.dead_owner}, which ended without releasing the folder")

    @classmethod
    def open(
        cls,
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
        """Find or make the run folder that a command means, and own it; :meth:`rewind` then readies it to go on.

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
            run = cls._resume(root, wanted, checkpoint.resolve(resume_from, on_event), allow_changes, on_event)
        else:
            with _choosing(root):
                runs = list_runs(root, stage)
                same = [path for _, path, config in runs if same_run(config, wanted)]
                if same and not fresh:
                    run = cls(same[-1], on_event)
                else:
                    run = cls._create(root, wanted, _why_new(runs, wanted, fresh), on_event)
        try:
            run._ready(plain(dict(settings or {})))
        except BaseException:
            run.release()
            raise
        return run

    @classmethod
    def _resume(
        cls, root: Path, wanted: Config, source: Path, allow_changes: bool, on_event: Event | None
    ) -> RunFolder:
        """The run that goes on from the checkpoint ``source``: its own, else one that begins with it."""
        origin = checkpoint.load(source).trainer.get("run", {})
        changes = differences({key: origin.get(key) for key in wanted}, wanted)
        if changes and not allow_changes:
            raise UserError(f"{source} is of another run: {'; '.join(changes)}. --allow_changes accepts that")
        home = source.parent.parent
        at_home = source.parent.name == "checkpoints" and same_run(read_config(home), wanted)
        if at_home and checkpoint.newest_valid(source.parent) == source:
            return cls(home, on_event)
        digest = hashlib.sha256((source / files.MANIFEST).read_bytes()).hexdigest()
        with _choosing(root):
            for _, path, config in reversed(list_runs(root, wanted["stage"])):
                started = (config or {}).get("started_from", {})
                if same_run(config, wanted) and started.get("manifest_sha256") == digest:
                    return cls(path, on_event)  # this command was stopped before, and comes again
            why = "; ".join([f"it starts from {source}", *changes])
            started = {"started_from": {"path": str(source), "manifest_sha256": digest}}
            return cls._create(root, wanted | started, why, on_event, source)

    @classmethod
    def _create(
        cls, root: Path, config: Config, why: str, on_event: Event | None, source: Path | None = None
    ) -> RunFolder:
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
        run = cls(path, on_event)
        run.event(f"new run {path}: {why}")
        return run

    def _ready(self, settings: Config) -> None:
        """Clean up after a dead owner, and note what is not as it was."""
        for folder in (self.path, self.checkpoints, self.samples):
            for leftover in files.remove_leftovers(folder):
                self.event(f"removed {leftover.name}, left over from an interrupted write")
        before = {key: self.config.get(key) or {} for key in ("versions", "settings")}
        now = {"versions": versions(), "settings": settings}
        if now != before:
            for key in now:
                if before[key] and before[key] != now[key]:
                    self.event(f"{key} changed: {'; '.join(differences(before[key], now[key]))}")
            self.config |= now
            write_config(self.path, self.config)

    def rewind(self) -> Checkpoint | None:
        """Load the newest valid checkpoint, set :attr:`step` and cut the records back; None if there is none yet.

        To be called before training, and to go back after a loss that ran away. What follows the saving of that
        step, such as its evaluation, has to be done again: its records are cut off too. Damaged checkpoints are
        passed over and set aside under another name.

        Raises:
            CheckpointError: if there are checkpoints but none is valid.
        """
        existing = checkpoint.list_checkpoints(self.checkpoints)
        newest = checkpoint.load_newest(self.checkpoints, self.event)
        if existing and newest is None:
            raise CheckpointError(f"no checkpoint of {self.path} is valid any more; start beside it with --fresh")
        self.step = checkpoint.checkpoint_step(newest.path) if newest else 0
        for path in existing:
            if checkpoint.checkpoint_step(path) > self.step:
                self.event(f"set {path.name} aside as {checkpoint.set_aside(path).name}")
        sizes = newest.trainer.get("run", {}).get("records", {}) if newest else {}
        for name in RECORDS:
            self._cut(self.path / name, sizes.get(name, 0))
        self.event(f"goes on from {newest.path.name}" if newest else "starts at step 0")
        return newest

    def _cut(self, path: Path, size: int) -> None:
        """Cut a file back to what it was when it had ``size`` bytes."""
        with files.reporting_errors(path):
            path.touch()
            if path.stat().st_size < size:
                self.event(f"{path.name} has lost its end: {size} bytes were written, {path.stat().st_size} are there")
            else:
                os.truncate(path, size)
                files.sync(path)

    def save(
        self,
        step: int,
        *,
        trainer: Mapping[str, Any],
        **content: Any,
    ) -> Path:
        """Write the checkpoint of ``step``, with how far the records are; returns its path.

        If this step is saved already, that checkpoint is left as it is.

        Args:
            step: optimizer steps taken.
            trainer: what the trainer keeps, as plain values.
            content: the other arguments of :func:`mm_rec.storage.checkpoint.save`.
        """
        path = self.checkpoints / checkpoint.checkpoint_name(step)
        if not path.exists():
            run = {"stage": self.config["stage"], "identity": self.config["identity"], "records": self._sync_records()}
            checkpoint.save(path, trainer={"step": step, **trainer, "run": run}, **content)
        self.step = step
        return path

    def _sync_records(self) -> dict[str, int]:
        """Flush the records to the disk; their sizes in bytes."""
        for name in RECORDS:
            with files.reporting_errors(self.path / name):
                files.sync(self.path / name)
        return {name: (self.path / name).stat().st_size for name in RECORDS}

    def log_metrics(self, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl. Only what a repeated run would yield again: no times, no speeds."""
        self._append(METRICS, json.dumps({"step": step, **values}))

    def log_loss(self, step: int, loss: float) -> None:
        """Append ``step,loss`` to loss_log.txt."""
        self._append(LOSS_LOG, f"{step},{loss}")

    def log_timing(self, step: int, **values: Any) -> None:
        """Append a line to timing.jsonl: speed, memory, processor use, anything that differs from run to run."""
        self._append(TIMING, json.dumps({"step": step, **values}))

    def event(self, message: str) -> None:
        """Append a line with the time to events.log, and tell ``on_event``."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append(EVENTS, f"{now} {message}")
        if self._on_event is not None:
            self._on_event(message)

    def _append(self, name: str, line: str) -> None:
        with files.reporting_errors(self.path / name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def release(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


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
