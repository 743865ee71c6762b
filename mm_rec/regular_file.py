"""Opens files to be read: regular ones alone, so that a program never waits for a pipe or a device."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

__all__ = ["open_regular", "read_regular"]

_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)  # Windows has neither


def open_regular(path: Path) -> io.FileIO:
    """Opens the file ``path`` for reading, without a buffer.

    Raises:
        OSError: if that is not possible, or ``path`` is a pipe, a device or anything else but a regular file.
    """
    file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | _FLAGS))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """Returns what is in the file ``path``; raises OSError as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.readall()
