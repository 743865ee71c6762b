"""What a checkpoint went through, as its run folder and those before it tell: stages, settings, data, validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_rec.data.prepared import PreparedFacts, read_facts
from mm_rec.errors import UserError
from mm_rec.storage import checkpoint, files
from mm_rec.storage.lineage import DataFolder, run_of, trained_on
from mm_rec.storage.run_config import CHECKPOINTS, read_config
from mm_rec.storage.run_folder import METRICS, read_metrics

__all__ = ["TrainedStage", "read_history"]


@dataclass(frozen=True)
class TrainedStage:
    """One stage of the training of a model.

    Attributes:
        stage: its name.
        steps: the step of the checkpoint.
        settings: what decided the result: batch size, sequence length, rate and more.
        bits_per_byte: of the last validation up to that step, by domain; empty if there was none.
        data: what the prepared data say of themselves; None if they are not known or not there any more.
        starts_from: the hash of the checkpoint that it started from; None if it started from new weights.
    """

    stage: str
    steps: int
    settings: Mapping[str, Any]
    bits_per_byte: Mapping[str, float]
    data: PreparedFacts | None
    starts_from: str | None


def read_history(path: Path) -> list[TrainedStage]:
    """Returns the stages that the checkpoint at ``path`` went through, the first one first.

    A stage that started from a checkpoint outside of its folder of runs is the first that is known.
    """
    found: list[TrainedStage] = []
    place: Path | None = path
    while place is not None and (one := _read_stage(place)) is not None:
        found.insert(0, one)
        place = _before(place, one.starts_from)
    return found


def _read_stage(path: Path) -> TrainedStage | None:
    """The stage that wrote a checkpoint; None if that lies in no run folder."""
    noted = run_of(path)
    if noted is None:
        return None
    run, config = noted
    step, identity = checkpoint.checkpoint_step(path.resolve()), config["identity"]
    return TrainedStage(
        config["stage"], step, identity, _last_validation(run, step), _data_of(path), identity.get("starts_from")
    )


def _before(path: Path, sha256: str | None) -> Path | None:
    """The checkpoint with this hash in the folder of runs in which ``path`` lies; None if there is none."""
    if sha256 is None:
        return None
    root = path.resolve().parent.parent.parent
    for run in sorted(root.iterdir()):
        if read_config(run) is None:
            continue
        for one in checkpoint.list_checkpoints(run / CHECKPOINTS):
            try:
                if files.manifest_sha256(files.read_manifest(one)) == sha256:
                    return one
            except files.DamageError:
                continue
    return None


def _last_validation(run: Path, step: int) -> dict[str, float]:
    """Bits per byte by domain of the last validation of a run up to ``step``."""
    if not (run / METRICS).is_file():
        return {}
    found = [one["valid"] for one in read_metrics(run / METRICS) if "valid" in one and one["step"] <= step]
    return dict(found[-1]) if found else {}


def _data_of(path: Path) -> PreparedFacts | None:
    try:
        place: DataFolder = trained_on(path)[-1]
        facts = read_facts(place.path)
    except UserError:
        return None
    return facts if facts.documents_sha256 == place.sha256 else None
