"""``manifest.json`` beside downloaded data: where each file is from and what it has to be, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm_rec.data.pack import file_sha256
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS, is_current
from mm_rec.regular_file import read_regular
from mm_rec.storage.files import write_atomic

__all__ = ["MANIFEST", "check_files", "hash_files", "read_manifest", "record_file", "require_unchanged"]

MANIFEST = "manifest.json"


def read_manifest(data_dir: Path) -> dict[str, dict[str, Any]]:
    """The entries by path relative to ``data_dir``; empty without a manifest.

    Raises UserError if it cannot be read as one.
    """
    path = data_dir / MANIFEST
    try:
        content = json.loads(read_regular(path))
        entries: dict[str, dict[str, Any]] = dict(content["files"])
        known = is_current("download manifest", content[KEY])
        if not known or not all(isinstance(entry["sha256"], str) for entry in entries.values()):
            raise ValueError("it is of another format")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            "{path} cannot be used ({why}); delete {data_dir} and download the data again",
            path=path,
            why=why,
            data_dir=data_dir,
        ) from None
    return entries


def record_file(data_dir: Path, name: str, entry: dict[str, Any]) -> None:
    """Add or replace the entry of the file ``name``, which has to hold its ``sha256``."""
    entries = {**read_manifest(data_dir), name: entry}
    content = {KEY: VERSIONS["download manifest"], "files": dict(sorted(entries.items()))}
    write_atomic(data_dir / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def hash_files(home: Path, files: list[Path]) -> dict[str, str]:
    """Returns the SHA-256 of each file by its path relative to the folder ``home``.

    Raises UserError for a file that cannot be read.
    """
    found = {}
    for file in files:
        try:
            found[file.relative_to(home).as_posix()] = file_sha256(file)
        except OSError as error:
            raise UserError("{file} cannot be read: {reason}", file=file, reason=error.strerror or error) from None
    return found


def check_files(data_dir: Path, files: list[Path]) -> dict[str, str]:
    """SHA-256 of each file by its path relative to ``data_dir``.

    Raises UserError for a file that is not what the manifest says. Files that it does not name are the user's own.
    """
    entries, found = read_manifest(data_dir), hash_files(data_dir, files)
    for name, sha256 in found.items():
        if name in entries and sha256 != entries[name]["sha256"]:
            raise UserError(
                "{path} is not what was downloaded (its SHA-256 differs from the one in "
                "{manifest}); delete it and download it again, or, if you changed it on purpose, "
                "give it another name",
                path=data_dir / name,
                manifest=data_dir / MANIFEST,
            )
    return found


def require_unchanged(home: Path, files: list[Path], before: dict[str, str]) -> None:
    """Raise UserError if a file is not what it was when :func:`hash_files` or :func:`check_files` returned ``before``.

    To be called after the files were read for what is kept under the name of their hashes.
    """
    now = hash_files(home, files)
    for name, sha256 in before.items():
        if now[name] != sha256:
            raise UserError("{path} was changed while it was read; run the same command again", path=home / name)
