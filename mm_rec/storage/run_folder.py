"""Run folders: who owns one, and what is written into it; :mod:`mm_rec.storage.resume` finds the one that is meant.

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

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mm_rec.storage import checkpoint, files
from mm_rec.storage.checkpoint import Event
from mm_rec.storage.lock import Lock
from mm_rec.storage.run_config import (
    read_config,
)

__all__ = ["LOCK", "METRICS", "RECORDS", "Run", "RunFolder"]

METRICS, LOSS_LOG, TIMING, EVENTS, LOCK = "metrics.jsonl", "loss_log.txt", "timing.jsonl", "events.log", "run.lock"
RECORDS = (METRICS, LOSS_LOG)
"""Files that hold the same bytes whether a run was stopped or not; resuming cuts them back to its checkpoint."""


class Run(Protocol):
    """What a trainer needs of its run folder; :class:`RunFolder` has it on rank 0, a stand-in on the other ranks."""

    path: Path
    checkpoints: Path
    samples: Path
    step: int

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
    """A run folder that this process owns: found or made by :func:`mm_rec.storage.resume.open_run`, given up by
    :meth:`release` or with the process.

    Attributes:
        path: the folder.
        config: the content of config.yaml: ``stage``, ``identity``, ``settings`` and more.
        checkpoints, samples: folders inside.
        step: of the newest checkpoint, 0 without one; known after :func:`mm_rec.storage.resume.rewind`.
    """

    def __init__(self, path: Path, on_event: Event | None = None) -> None:
        """Own the existing run folder ``path``."""
        self.path, self.checkpoints, self.samples = path, path / "checkpoints", path / "samples"
        self.step = 0
        self._on_event = on_event
        self._lock = Lock(path / LOCK)
        self.config = read_config(path) or {}
        if self._lock.dead_owner:
            self.event(f"took over from {self._lock.dead_owner}, which ended without releasing the folder")

    def cut_back(self, name: str, size: int) -> None:
        """Cut the record ``name`` back to what it was when it had ``size`` bytes."""
        path = self.path / name
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
