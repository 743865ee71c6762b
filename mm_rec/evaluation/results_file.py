"""``results.json``, the numbers that ``mm-rec eval`` writes beside its page, for who reads them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_rec.errors import UserError
from mm_rec.regular_file import read_regular

__all__ = ["RESULTS", "WEIGHTS_SHA256", "find_results"]

RESULTS = "results.json"
WEIGHTS_SHA256 = "SHA-256"
"""The name, among the facts about a model, of the hash that tells which checkpoint was measured."""


def find_results(folder: Path, sha256: str, *, required: bool) -> Mapping[str, Any] | None:
    """Returns what ``mm-rec eval --output folder`` measured of the checkpoint whose hash is ``sha256``.

    Args:
        folder: that of the report.
        sha256: as of :class:`mm_rec.inference.loading.Loaded`.
        required: whether it is an error if there is nothing of this checkpoint, for which None is returned otherwise.

    Raises:
        UserError: if it is required and missing, or of another checkpoint, or is not what the command writes.
    """
    path = folder / RESULTS
    try:
        found = json.loads(read_regular(path))
        is_of_it = found["model"].get(WEIGHTS_SHA256) == sha256
    except FileNotFoundError:
        if required:
            raise UserError(
                "there is no {path}; measure the model with `mm-rec eval --output {folder}`", path=path, folder=folder
            ) from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if required:
            raise UserError(
                "{path} cannot be used ({error}); measure the model with `mm-rec eval` again", path=path, error=error
            ) from error
        return None
    if not is_of_it and required:
        raise UserError(
            "{path} is of another checkpoint; measure this one with `mm-rec eval --output {folder}`",
            path=path,
            folder=folder,
        )
    return dict(found) if is_of_it else None
