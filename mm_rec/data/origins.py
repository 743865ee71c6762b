"""From which downloads the files of prepared data come, kept beside the data: source, revision and licence of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_rec.data.manifest import read_manifest
from mm_rec.errors import UserError

__all__ = ["ORIGINS", "Origin", "origins_of", "write_origins"]

ORIGINS = "sources.json"

Origin = Mapping[str, str | int | None]
"""What is kept of a download: ``source``, ``hub_id`` (None: not from a hub), ``revision``, ``licence``, ``samples``."""


def origins_of(home: Path, hashes: Mapping[str, str]) -> list[Origin]:
    """Returns where files come from, for those that a download manifest names; others are the user's own.

    Args:
        home: a data folder, or the folder of one kind in a data folder.
        hashes: the SHA-256 of each file, by its path relative to ``home``.
    """
    entries = dict(_entries(home))
    entries |= {
        name.removeprefix(f"{home.name}/"): entry
        for name, entry in _entries(home.parent).items()
        if name.startswith(f"{home.name}/")
    }
    found = (entries[name] for name, sha256 in hashes.items() if entries.get(name, {}).get("sha256") == sha256)
    return [_origin(entry) for entry in found if entry.get("source") != "own"]


def write_origins(folder: Path, origins: Mapping[str, Sequence[Origin]]) -> None:
    """Write the origins of each domain into ``folder``, if any is known."""
    known = {name: list(one) for name, one in origins.items() if one}
    if known:
        (folder / ORIGINS).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8", newline="\n")


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_manifest(folder)
    except UserError:  # what lies above a folder of one's own may be a manifest of something else
        return {}


def _origin(entry: Mapping[str, Any]) -> Origin:
    return {
        "source": entry.get("source"),
        "hub_id": (entry.get("origin") or {}).get("hub_id"),
        "revision": entry.get("revision"),
        "licence": entry.get("licence"),
        "samples": entry.get("samples"),
    }
