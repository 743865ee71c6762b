"""Finds the files of a folder: those that can be read, and why each of the others is not."""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from mm_rec.data.documents.kinds import PROGRAM, Kind, kind_of, readable_endings, why_unread
from mm_rec.errors import EXTRA_OF, UserError
from mm_rec.translation import Translatable

__all__ = ["Found", "LeftOut", "find_documents", "walk"]


class LeftOut(NamedTuple):
    """A file that is not used, the kind that it is counted by, and the reason; ``n_documents`` of it are meant."""

    path: Path
    kind: str
    why: str
    n_documents: int = 1


class Found(NamedTuple):
    """The files that can be read, with their kinds, and those that cannot."""

    files: list[tuple[Path, Kind]]
    left_out: list[LeftOut]

    @property
    def paths(self) -> list[Path]:
        """The files that can be read."""
        return [path for path, _ in self.files]


def find_documents(path: Path, *, programs_only: bool = False, skip: Collection[Path] = ()) -> Found:
    """Finds what can be read at ``path``: itself, or what is in the folder and its subfolders, in the order of names.

    Links are followed; a folder that is reached twice is read once.

    Args:
        path: a file or a folder.
        programs_only: of text as it stands take programs alone, as for code.
        skip: files and folders that do not belong to the documents.

    Raises:
        UserError: if there is nothing at ``path``, or if it is no file or folder.
    """
    if not path.exists():
        raise UserError("there is no file or folder {path}", path=path)
    if path.is_dir():
        found = Found([], [])
        for one, why in walk(path, skip):
            _sort_in(one, why, programs_only, found)
        return found
    if not path.is_file():
        raise UserError("{path} is a pipe or a device; write what comes out of it to a file", path=path)
    found = Found([], [])
    _sort_in(path, None, programs_only, found)
    if not found.files and kind_of(path) is None:
        raise UserError(
            "{path} is none of the kinds of files that can be read: {endings}",
            path=path,
            endings=readable_endings(),
        )
    return found


def walk(root: Path, skip: Collection[Path] = ()) -> Iterator[tuple[Path, str | None]]:
    """Yields every file below ``root`` in the order of names, and why it cannot be read, None if it can.

    Each folder is visited once, however many links lead to it, so that links in a circle come to an end.
    """
    seen: set[tuple[int, int]] = set()
    skipped = {one.resolve() for one in skip}
    skipped_names = {one.name for one in skipped}

    def is_wanted(path: Path) -> bool:
        return path.name not in skipped_names or path.resolve() not in skipped

    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        place = Path(folder)
        folders[:] = sorted(name for name in folders if is_wanted(place / name))
        is_hidden = any(part.startswith(".") for part in place.relative_to(root).parts)
        for name in sorted(names):
            path = place / name
            if is_wanted(path):
                yield path, _problem(path, is_hidden or name.startswith("."))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _problem(path: Path, is_hidden: bool) -> str | None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return Translatable("a link to nothing" if path.is_symlink() else "cannot be opened")
    if not stat.S_ISREG(mode):
        return Translatable("a pipe or a device")
    if is_hidden:
        return Translatable("hidden, as its name begins with a dot")
    return None if os.access(path, os.R_OK) else Translatable("may not be read by this user")


def _sort_in(path: Path, why: str | None, programs_only: bool, found: Found) -> None:
    """Add a file to those that can be read or to those that cannot."""
    kind = kind_of(path)
    name = kind.name if kind is not None else path.suffix.lower()
    if why is None and kind is None:
        why = why_unread(path)
    elif why is None and kind is not None:
        if programs_only and kind.how != "rows" and kind is not PROGRAM:
            why = Translatable("no program")
        elif kind.package is not None and not _is_installed(kind.package):
            why = Translatable("needs the extra {extra}", extra=EXTRA_OF[kind.package])
    if why is None and kind is not None:
        found.files.append((path, kind))
    else:
        found.left_out.append(LeftOut(path, name, why or ""))
