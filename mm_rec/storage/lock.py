"""A lock file that one process owns for as long as it lives, and that says who."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from mm_rec.errors import UserError
from mm_rec.storage import files

__all__ = ["Lock", "owner_of"]


class Lock:
    """Exclusive ownership of what ``path`` stands for, held from construction to :meth:`release`.

    The system drops the lock when the process ends, however it ends, so a dead owner never blocks. The file
    stays; its content is only for messages.

    Args:
        path: the lock file, made if missing.
        wait: wait for another owner instead of raising.

    Attributes:
        dead_owner: who ended without releasing the lock, in words; None if nobody did.

    Raises:
        UserError: if another process owns it, or the file system cannot lock.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self.path = path
        with files.reporting_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._acquire(wait)
            self.dead_owner = _describe(self._read())
            owner = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            with files.reporting_errors(path):
                self._write(json.dumps(owner).encode())
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Give the lock up; more than once does no harm."""
        if self._descriptor >= 0:
            self._write(b"")
            os.close(self._descriptor)
            self._descriptor = -1

    def _acquire(self, wait: bool) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = _describe(self._read()) or "another process"
            raise UserError(
                f"{self.path.parent} is in use by {owner}; wait until it ends, or use another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise UserError(f"the disk of {self.path} cannot lock files; use a folder on a local disk") from error

    def _read(self) -> bytes:
        return os.pread(self._descriptor, 4096, 0)

    def _write(self, content: bytes) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)


def owner_of(path: Path) -> str | None:
    """Who owns the lock file ``path`` at this moment, in words; None if nobody does."""
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _describe(file.read()) or "another process"
    except OSError:
        pass
    return None


def _describe(content: bytes) -> str | None:
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return None
