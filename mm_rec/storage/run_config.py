"""What a run is: its stage, identity and settings, as ``config.yaml`` keeps them.

The first line of the file is the hash of the rest, so that a change of any byte shows. Files of earlier versions have
no such line; they begin with the stage.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import mm_rec
from mm_rec.errors import UserError
from mm_rec.storage import files
from mm_rec.storage.yaml_file import parse_yaml, read_bounded
from mm_rec.translation import Translatable

__all__ = [
    "CHECKPOINTS",
    "COMPLETED",
    "RECORDS",
    "Config",
    "completed_checkpoint",
    "differences",
    "list_runs",
    "plain",
    "read_config",
    "require_configs",
    "same_run",
    "versions",
    "what_is_wrong",
    "write_config",
]

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
RECORDS = ("metrics.jsonl", "loss_log.txt")
"""Files that hold the same bytes whether a run was stopped or not; resuming cuts them back to its checkpoint."""
COMPLETED = "completed"
"""Key of the configuration: the step of the newest checkpoint that was completed, None before the first."""
_HASH_LINE = "# sha256 of the lines below: {}\n"
_FIRST_KEY = b"stage:"

Config = dict[str, Any]


def plain(values: Config) -> Config:
    """``values`` as they come back from a file: tuples as lists. A TypeError if JSON cannot hold them."""
    result: Config = json.loads(json.dumps(values))
    return result


def versions() -> dict[str, str]:
    """Versions of what decides the result of a run."""
    return {"mm_rec": mm_rec.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}


def read_config(run: Path) -> Config | None:
    """Returns the configuration of a run folder; None if ``run`` is not one or :func:`what_is_wrong` says why."""
    try:
        content = read_bounded(run / CONFIG)
        head, _, rest = content.partition(b"\n")
        if content.startswith(_FIRST_KEY):
            rest = content
        elif _hash_line(rest) != head + b"\n":
            return None
        config = parse_yaml(rest, run / CONFIG)
    except UserError:
        return None
    return config if isinstance(config, dict) and {"stage", "identity"} <= config.keys() else None


def what_is_wrong(run: Path) -> str | None:
    """Returns why ``run``, which :func:`read_config` cannot read, still has to be taken for a run; None if it is none.

    It is a link that leads nowhere, or a folder with what only a run has.
    """
    if run.is_symlink() and not run.exists():
        return Translatable(
            "{run} is a link to {target}, which cannot be reached; mount its disk, or remove the link",
            run=run,
            target=run.readlink(),
        )
    if (run / CONFIG).is_symlink() or (run / CONFIG).exists():
        problem = Translatable("is not what was written, or cannot be read")
    elif any((run / name).is_symlink() or (run / name).exists() for name in (CHECKPOINTS, *RECORDS)):
        problem = Translatable("is missing")
    else:
        return None
    return Translatable(
        "{config} {problem}; put it back, or go on beside it with --resume_from {run}",
        config=run / CONFIG,
        problem=problem,
        run=run,
    )


def require_configs(runs: Sequence[tuple[int, Path, Config | None]]) -> None:
    """Raise UserError if one of :func:`list_runs` is a run that cannot be told from others."""
    for _, path, config in runs:
        if config is None and (problem := what_is_wrong(path)):
            raise UserError(problem)


def write_config(run: Path, config: Config) -> None:
    """Replace the configuration of a run folder.

    Other than ASCII is escaped: PyYAML would write some line separators as they are and read them back as spaces.
    """
    content = str(yaml.safe_dump(config, sort_keys=False)).encode()
    files.write_atomic(run / CONFIG, _hash_line(content) + content)


def _hash_line(content: bytes) -> bytes:
    return _HASH_LINE.format(hashlib.sha256(content).hexdigest()).encode()


def completed_checkpoint(run: Path, config: Config) -> str | None:
    """Returns which checkpoint a run has completed, in words, as the records outside of its checkpoints say.

    None if it was ended before its first. Earlier versions did not note it; their trainer saved the start of a run
    before it wrote any record.
    """
    if COMPLETED in config:
        step = config[COMPLETED]
        return None if step is None else Translatable("the checkpoint of step {step}", step=step)
    written = any((run / name).exists() and (run / name).stat().st_size for name in RECORDS)
    return Translatable("a checkpoint") if written else None


def same_run(config: Config | None, wanted: Config) -> bool:
    """Whether stage and identity agree."""
    return config is not None and all(config[key] == wanted[key] for key in ("stage", "identity"))


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two nested dicts of plain values, in words.

    >>> differences({"lr": 0.1, "data": {"sha256": "a"}}, {"lr": 0.2, "data": {"sha256": "a"}})
    ['lr was 0.1, is 0.2']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        nested = (differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key)) for key in keys)
        return [text for texts in nested for text in texts]
    if old == new:
        return []
    return [Translatable("{name} was {old}, is {new}", name=name, old=json.dumps(old), new=json.dumps(new))]


def list_runs(root: Path, stage: str) -> list[tuple[int, Path, Config | None]]:
    """Number, path and configuration of all that is named STAGE (number 1) or STAGE-n in ``root``, in this order.

    The configuration is None for what is not a run folder but has taken the name, and where
    :func:`what_is_wrong` says why it cannot be read.
    """
    pattern = re.compile(re.escape(stage) + r"(?:-([1-9]\d{0,8}))?")
    matches = [(pattern.fullmatch(path.name), path) for path in root.iterdir()]
    return sorted(
        ((int(match[1] or 1), path, read_config(path)) for match, path in matches if match), key=lambda run: run[0]
    )
