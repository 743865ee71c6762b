"""Opens files to be read or added to: regular ones alone, so that a program never waits for a pipe or a device."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

__all__ = ["NEVER_WAIT", "NotRegularError", "append_regular", "open_regular", "read_regular"]

NEVER_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)  # Windows has neither
"""Flags with which a file is opened at once, whatever it is."""


class NotRegularError(OSError):
    """What should be a file is a pipe, a device or anything else that is no regular file."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "not a regular file", str(path))


def open_regular(path: Path) -> io.FileIO:
    """Opens the file ``path`` for reading, without a buffer.

    Raises:
        NotRegularError: if ``path`` is a pipe, a device or anything else but a regular file.
        OSError: if it can't be opened.
    """
    return _open(path, "r")


def append_regular(path: Path) -> io.BufferedWriter:
    """Opens the file ``path`` for adding to its end; makes it if it is missing.

    Raises:
        NotRegularError: if ``path`` is a pipe, a device or anything else but a regular file.
        OSError: if it can't be opened.
    """
    return io.BufferedWriter(_open(path, "a"))


def read_regular(path: Path) -> bytes:
    """Returns what is in the file ``path``; raises OSError as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.readall()


def _open(path: Path, mode: str) -> io.FileIO:
    try:
        file = io.FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | NEVER_WAIT, 0o666))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, or a socket
            raise NotRegularError(path) from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotRegularError(path)
    return file
