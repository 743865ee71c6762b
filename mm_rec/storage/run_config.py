"""What a run is: its stage, identity and settings, as ``config.yaml`` keeps them."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
import yaml

import mm_rec
from mm_rec.errors import UserError
from mm_rec.storage import files
from mm_rec.storage.yaml_file import read_yaml

__all__ = ["Config", "differences", "list_runs", "plain", "read_config", "same_run", "versions", "write_config"]

CONFIG = "config.yaml"

Config = dict[str, Any]


def plain(values: Config) -> Config:
    """``values`` as they come back from a file: tuples as lists. A TypeError if JSON cannot hold them."""
    result: Config = json.loads(json.dumps(values))
    return result


def versions() -> dict[str, str]:
    """Versions of what decides the result of a run."""
    return {"mm_rec": mm_rec.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}


def read_config(run: Path) -> Config | None:
    """The configuration of a run folder; None if ``run`` is not one."""
    try:
        config = read_yaml(run / CONFIG)
    except UserError:
        return None
    return config if isinstance(config, dict) and {"stage", "identity"} <= config.keys() else None


def write_config(run: Path, config: Config) -> None:
    """Replace the configuration of a run folder.

    Other than ASCII is escaped: PyYAML would write some line separators as they are and read them back as spaces.
    """
    files.write_atomic(run / CONFIG, str(yaml.safe_dump(config, sort_keys=False)).encode())


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
    return [] if old == new else [f"{name} was {json.dumps(old)}, is {json.dumps(new)}"]


def list_runs(root: Path, stage: str) -> list[tuple[int, Path, Config | None]]:
    """Number, path and configuration of all that is named STAGE (number 1) or STAGE-n in ``root``, in this order.

    The configuration is None for what is not a run folder but has taken the name.
    """
    pattern = re.compile(re.escape(stage) + r"(?:-([1-9]\d{0,8}))?")
    matches = [(pattern.fullmatch(path.name), path) for path in root.iterdir()]
    return sorted(
        ((int(match[1] or 1), path, read_config(path)) for match, path in matches if match), key=lambda run: run[0]
    )
