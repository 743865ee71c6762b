"""Which checkpoint of a run its model is loaded from: the best by validation, which is not always the newest."""

from __future__ import annotations

from pathlib import Path

from mm_rec.storage import checkpoint
from mm_rec.storage.checkpoint import CheckpointError, Event
from mm_rec.storage.run_config import CHECKPOINTS, read_config
from mm_rec.translation import Translatable

__all__ = ["BEST", "STOPPED_EARLY", "best_or_newest", "best_step", "resolve", "stopped_early"]

BEST = "best"
"""Key of a run's configuration: the step with the lowest validation so far, and its bits per byte."""
STOPPED_EARLY = "stopped_early"
"""Key of a run's configuration: the step after which it was ended, since validation rose."""


def best_step(run: Path) -> int | None:
    """Returns the step of the best checkpoint of a run folder; None if there was no validation yet."""
    noted = (read_config(run) or {}).get(BEST)
    step = noted.get("step") if isinstance(noted, dict) else None
    return step if isinstance(step, int) else None


def stopped_early(run: Path) -> int | None:
    """Returns the step after which a run was ended because validation rose; None if it was not."""
    step = (read_config(run) or {}).get(STOPPED_EARLY)
    return step if isinstance(step, int) else None


def best_or_newest(run: Path, on_event: Event | None = None) -> Path | None:
    """Returns the checkpoint of ``run`` to be used: the best by validation, without one the newest valid one.

    None if there is no valid one. Each that is passed over because it is damaged or missing is told to ``on_event``.
    """
    folder, step = run / CHECKPOINTS, best_step(run)
    if step is not None:
        path = folder / checkpoint.checkpoint_name(step)
        try:
            checkpoint.verify(path)
            return path
        except CheckpointError as error:
            if on_event is not None:
                on_event(Translatable("passed over the best checkpoint: {error}", error=error))
    return checkpoint.newest_valid(folder, on_event)


def resolve(path: Path, on_event: Event | None = None) -> Path:
    """Returns the checkpoint that is meant by ``path``: itself one, or a run folder for its best one.

    Raises:
        CheckpointError: if there is none.
    """
    found = best_or_newest(path, on_event) if (path / CHECKPOINTS).is_dir() else None
    return found or checkpoint.resolve(path, on_event)
