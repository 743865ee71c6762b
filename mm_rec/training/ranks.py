"""What rank 0 of several processes tells the others about a stage, and what the others have in place of its run folder.

Rank 0 alone reads and writes the run folder. Before a stage it sends one message, :class:`StageStart`, from which
every rank builds the same trainer; after it the path of the final checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from mm_rec import processes
from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batch
from mm_rec.storage.checkpoint import Checkpoint
from mm_rec.storage.resume import rewind
from mm_rec.storage.run_folder import Run, RunFolder

__all__ = [
    "NoRunFolder",
    "StageStart",
    "broadcast_path",
    "broadcast_start",
    "own_batch",
    "rewind_run",
]


@dataclass(frozen=True)
class StageStart:
    """What a stage starts from.

    Attributes:
        config: the shape of the model.
        weights: the weights to start from, by parameter name; None for new ones.
        checkpoint: the checkpoint of this run to go on from; None before its first.
        finished: the best checkpoint if nothing is left to do, else None.
        lengths: how many steps a run with a time budget was given so far, as in :meth:`RunFolder.lengths`.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor] | None = None
    checkpoint: Checkpoint | None = None
    finished: Path | None = None
    lengths: Sequence[tuple[int, int, float]] = ()


def broadcast_start(start: StageStart | None) -> StageStart:
    """Returns the start that rank 0 passes; the other ranks pass None."""
    if processes.world_size() == 1:
        assert start is not None, "one process is rank 0"
        return start
    message = {}
    if start is not None:
        message = {
            "config": start.config.to_dict(),
            "finished": str(start.finished) if start.finished else None,
            "lengths": list(start.lengths),
        }
    message = processes.broadcast_json(message)
    return StageStart(
        ModelConfig.from_dict(message["config"]),
        processes.broadcast_tensors(None if start is None else start.weights),
        _broadcast_checkpoint(None if start is None else start.checkpoint),
        Path(message["finished"]) if message["finished"] else None,
        [(step, steps, seconds) for step, steps, seconds in message["lengths"]],
    )


def _broadcast_checkpoint(found: Checkpoint | None) -> Checkpoint | None:
    """Returns the checkpoint, or the None, that rank 0 passes; its tensors are sent when they are looked up."""
    if processes.world_size() == 1:
        return found
    head = processes.broadcast_json(
        found
        and {
            "path": str(found.path),
            "sha256": found.sha256,
            "config": found.config.to_dict(),
            "trainer": found.trainer,
            "tokenizer": found.tokenizer_json.decode(),
        }
    )
    if head is None:
        return None
    weights, optimizer, carried = (
        processes.BroadcastTensors(getattr(found, name, None)) for name in ("weights", "optimizer", "carried")
    )
    return Checkpoint(
        Path(head["path"]),
        head["sha256"],
        ModelConfig.from_dict(head["config"]),
        weights,
        optimizer,
        carried,
        head["trainer"],
        head["tokenizer"].encode(),
    )


def rewind_run(run: Run) -> Checkpoint | None:
    """Rank 0 takes its run back to the newest valid checkpoint; returns that checkpoint, or None, on every rank."""
    return _broadcast_checkpoint(rewind(run) if isinstance(run, RunFolder) else None)


def broadcast_path(path: Path) -> Path:
    """Returns the path that rank 0 passes."""
    return Path(processes.broadcast_json(str(path)))


def own_batch(batch: Batch) -> Batch:
    """Returns the rows of a micro-batch that this process reads, weighted so that losses are averaged."""
    if processes.world_size() == 1:
        return batch
    return replace(
        batch,
        tokens=processes.own_rows(batch.tokens),
        targets=processes.own_rows(batch.targets),
        weight=processes.own_rows(batch.weight) * processes.world_size(),
        reset=processes.own_rows(batch.reset),
    )


class NoRunFolder:
    """The run folder (:class:`mm_rec.storage.run_folder.Run`) of ranks other than 0: it reads and writes nothing."""

    def __init__(self) -> None:
        self.path, self.checkpoints, self.samples = (Path(os.devnull),) * 3
        self.step = 0
        self.next_command = ""  # rank 0 alone speaks

    def save(self, step: int, *, trainer: Mapping[str, Any], **content: Any) -> Path:
        """Only note the step: rank 0 writes the checkpoint."""
        self.step = step
        return self.path

    def note(self, key: str, value: Any) -> None:
        """Do nothing: rank 0 writes the configuration."""

    def log_metrics(self, step: int, **values: Any) -> None:
        """Do nothing: rank 0 writes the records."""

    def log_loss(self, step: int, loss: float) -> None:
        """Do nothing: rank 0 writes the records."""

    def log_timing(self, step: int, **values: Any) -> None:
        """Do nothing: rank 0 writes the records."""

    def note_length(self, step: int, steps: int, seconds: float) -> None:
        """Do nothing: rank 0 writes the records."""

    def event(self, message: str) -> None:
        """Do nothing: rank 0 writes the records."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: there is no lock to release."""
