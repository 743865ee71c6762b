"""On which prepared data the weights of a checkpoint were trained, as its run and the runs before it noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mm_rec.errors import UserError
from mm_rec.storage.run_config import CHECKPOINTS, Config, read_config

__all__ = ["TRAINED_ON", "DataFolder", "extended", "run_of", "trained_on"]

TRAINED_ON = "trained_on"
"""Key of a run's configuration: the prepared data of all stages that its weights went through, its own last."""


class DataFolder(NamedTuple):
    """Where prepared data lie, and the hash of what is in them."""

    path: Path
    sha256: str


def run_of(checkpoint: Path) -> tuple[Path, Config] | None:
    """Returns the run folder that holds a checkpoint, and its configuration; None if there is none."""
    checkpoint = checkpoint.resolve()
    run = checkpoint.parent.parent
    config = read_config(run) if checkpoint.parent.name == CHECKPOINTS else None
    return None if config is None else (run, config)


def trained_on(checkpoint: Path) -> list[DataFolder]:
    """Returns the prepared data that the weights of ``checkpoint`` were trained on; those of its own run come last.

    Raises:
        UserError: if that is not known: the checkpoint lies in no run folder, or an earlier version wrote the run.
    """
    found = run_of(checkpoint)
    if found is None:
        raise UserError("{path} lies in no run folder, so it is not known what it was trained on", path=checkpoint)
    run, config = found
    try:
        places = [DataFolder(Path(one["path"]), str(one["sha256"])) for one in config[TRAINED_ON]]
    except (KeyError, TypeError):
        places = []
    if not places:
        raise UserError(
            "{path} does not say what it was trained on, since an earlier version of MM-Rec began it", path=run
        )
    return places


def extended(before: Path | None, path: Path, sha256: str) -> list[dict[str, Any]]:
    """Returns what a run notes that trains on the data at ``path``, from the weights of the checkpoint ``before``."""
    try:
        places = [] if before is None else trained_on(before)
    except UserError:  # then nothing is known of what came before
        places = []
    own = DataFolder(path.resolve(), sha256)
    return [{"path": str(one.path), "sha256": one.sha256} for one in [*(p for p in places if p != own), own]]
