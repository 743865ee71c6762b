"""Run folders: who owns one, and what is written into it; :mod:`mm_rec.storage.resume` finds the one that is meant.

    ROOT/STAGE, ROOT/STAGE-2, ...
        config.yaml                    identity and settings of the run, and the last step whose checkpoint is complete
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

import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mm_rec import system
from mm_rec.errors import UserError
from mm_rec.regular_file import append_regular, read_regular
from mm_rec.storage import checkpoint, files
from mm_rec.storage.checkpoint import Event
from mm_rec.storage.lock import Lock
from mm_rec.storage.run_config import CHECKPOINTS, COMPLETED, RECORDS, read_config, what_is_wrong, write_config

__all__ = ["EVENTS", "LOCK", "METRICS", "TIMING", "Run", "RunFolder", "read_metrics"]

METRICS, LOSS_LOG = RECORDS
TIMING, EVENTS, LOCK = "timing.jsonl", "events.log", "run.lock"
LENGTHS = "lengths"
"""Key of the configuration: how many steps a run with a time budget was given, and when."""


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of ``metrics.jsonl``. A line of which a part was lost is passed over; the run said so then."""
    for line in read_regular(path).decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            yield record


class Run(Protocol):
    """What a trainer needs of its run folder; :class:`RunFolder` has it on rank 0, a stand-in on the other ranks."""

    step: int

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def next_command(self) -> str:
        """Says which command goes on from the newest checkpoint."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints in it."""

    @property
    def samples(self) -> Path:
        """The folder of the samples in it."""

    def save(self, step: int, *, trainer: Mapping[str, Any], **content: Any) -> Path:
        """Write the checkpoint of ``step``; returns its path."""

    def note(self, key: str, value: Any) -> None:
        """Keep a plain value in the configuration of the run."""

    def log_metrics(self, step: int, **values: Any) -> None:
        """Record what a repeated run would yield again."""

    def log_loss(self, step: int, loss: float) -> None:
        """Record the loss of a step."""

    def log_timing(self, step: int, **values: Any) -> None:
        """Record what differs from run to run."""

    def note_length(self, step: int, steps: int, seconds: float) -> None:
        """Note that after ``step`` steps, ``seconds`` into its time, the run was given ``steps`` steps in all."""

    def event(self, message: str) -> None:
        """Record what happened, with the time."""


class RunFolder:
    """A run folder that this process owns: found or made by :func:`mm_rec.storage.resume.open_run`, given up by
    :meth:`release` or with the process.

    Attributes:
        config: the content of config.yaml: ``stage``, ``identity``, ``settings``, ``completed`` and more.
        step: of the newest checkpoint, 0 without one; known after :func:`mm_rec.storage.resume.find_newest`.
    """

    def __init__(self, path: Path, on_event: Event | None = None) -> None:
        """Own the existing run folder ``path``."""
        self._path = self._opened_as = path
        self.step = 0
        self._on_event = on_event
        self._written: dict[str, int] = {}  # bytes of each record, as this process left it
        self._lock = Lock(path / LOCK)
        config = read_config(path)
        if config is None:
            self._lock.release()
            raise UserError(what_is_wrong(path) or f"{path} is not a run folder")
        self.config = config
        if self._lock.dead_owner:
            self.event(f"took over from {self._lock.dead_owner}, which ended without releasing the folder")

    @property
    def path(self) -> Path:
        """Where the folder is. It may be renamed while this process owns it, and is written to where it is then.

        Raises:
            StorageError: if it was removed, or cannot be found.
        """
        if self._lock.held and not self._lock.is_in(self._path):
            found = self._lock.find_folder()
            if found is None:
                raise files.StorageError(
                    f"{self._path} was removed or moved to another disk while it was trained in; the same command "
                    "goes on from the checkpoints that are left, if you put it back"
                )
            moved, self._path = self._path, found
            self.event(f"{moved} was renamed to {found}; goes on there")
        return self._path

    @property
    def next_command(self) -> str:
        """Says which command goes on from the newest checkpoint, now that this one ends."""
        path = self.path
        if path == self._opened_as:
            return "the same command goes on from there"
        return (
            f"rename {path} back to {self._opened_as}, or add --resume_from {path}, "
            "and the same command goes on from there"
        )

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def samples(self) -> Path:
        """The folder of the samples, texts for the trainer."""
        return self.path / "samples"

    def cut_back(self, name: str, size: int) -> None:
        """Cut the record ``name`` back to what it was when it had ``size`` bytes."""
        path = self.path / name
        self._written.pop(name, None)
        with files.reporting_errors(path):
            append_regular(path).close()
            if path.stat().st_size < size:
                self.event(f"{path.name} has lost its end: {size} bytes were written, {path.stat().st_size} are there")
            else:
                os.truncate(path, size)
                system.sync(path)

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

        def write(folder: Path) -> None:
            path = folder / CHECKPOINTS / checkpoint.checkpoint_name(step)
            if not path.exists():
                records = self._sync_records(folder)
                run = {"stage": self.config["stage"], "identity": self.config["identity"], "records": records}
                checkpoint.save(path, trainer={"step": step, **trainer, "run": run}, **content)
            self.note_completed(step)

        self._write(write)
        self.step = step
        return self.checkpoints / checkpoint.checkpoint_name(step)

    def note_completed(self, step: int) -> None:
        """Note outside of the checkpoints that the one of ``step`` is complete, and the newest."""
        self.note(COMPLETED, step)

    def note(self, key: str, value: Any) -> None:
        """Keep a plain value in the configuration of the run, beside what identifies it."""
        if self.config.get(key) != value:
            self.config[key] = value
            write_config(self.path, self.config)

    @property
    def lengths(self) -> list[tuple[int, int, float]]:
        """What :meth:`note_length` has noted, in order."""
        return [(int(step), int(steps), float(seconds)) for step, steps, seconds in self.config.get(LENGTHS) or ()]

    def note_length(self, step: int, steps: int, seconds: float) -> None:
        """Note how many steps a run with a time budget is given, on the disk before it depends on it.

        Args:
            step: the steps that are done.
            steps: how many there are to be in all.
            seconds: how much of the time is used.
        """
        self.note(LENGTHS, [*(self.config.get(LENGTHS) or ()), [step, steps, round(seconds, 3)]])

    def _sync_records(self, folder: Path) -> dict[str, int]:
        """Flush the records to the disk; their sizes in bytes."""
        for name in RECORDS:
            with files.reporting_errors(folder / name):
                system.sync(folder / name)
        return {name: (folder / name).stat().st_size for name in RECORDS}

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
        def write(folder: Path) -> None:
            content = f"{line}\n".encode()
            with files.reporting_errors(folder / name), append_regular(folder / name) as file:
                start = file.tell()
                file.write(content)
            lost, self._written[name] = self._written.get(name, 0) - start, start + len(content)
            if lost > 0:
                self.event(f"{folder / name} was removed or cut while it was written; {lost:,} bytes are missing")

        self._write(write)

    def _write(self, write: Callable[[Path], None]) -> None:
        """Call ``write`` with the path of the folder, and once more if it was renamed meanwhile."""
        path = self.path
        try:
            write(path)
        except (OSError, files.StorageError):
            if self.path == path:
                raise
            write(self.path)

    def release(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
