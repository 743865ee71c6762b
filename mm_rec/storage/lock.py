"""Ownership of files and folders: by one process for as long as it lives, with a lock file that says who it is.

The locks are those of :mod:`mm_rec.system`, which the system drops with the process.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from mm_rec import system
from mm_rec.errors import UserError
from mm_rec.regular_file import NEVER_WAIT, NotRegularError, read_regular
from mm_rec.storage import files
from mm_rec.translation import Translatable

__all__ = ["Lock", "owner_of"]

_CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)
"""What file systems answer that lock no files, or no folders."""
_PATIENCE = 0.2
"""Seconds for which an owner may be one that only looks (:func:`owner_of`) or has not yet written who it is."""


class Lock:
    """Exclusive ownership of a folder or file, held from construction to :meth:`release`.

    The system drops the lock when the process ends, however it ends, so a dead owner never blocks. The content of the
    lock file is only for messages. A folder is locked together with its lock file, where the file system can do that:
    so it keeps its one owner when somebody removes the lock file. (On Windows nobody can remove it meanwhile.)

    Args:
        path: the lock file, made if missing. It lies in the folder that is owned.
        of: the file that is owned, if it is not the folder. Its lock file is removed by :meth:`release`.
        wait: wait for another owner instead of raising.
        on_wait: is told who is waited for, in words.

    Attributes:
        dead_owner: who ended without releasing the lock, in words; None if nobody did.

    Raises:
        UserError: if another process owns it, or the file system cannot lock.
    """

    def __init__(
        self, path: Path, *, of: Path | None = None, wait: bool = False, on_wait: Callable[[str], None] | None = None
    ) -> None:
        self._path = path
        self._of = of
        self._wait = wait
        self._on_wait = on_wait
        self._folder = -1
        self._file = -1
        problem = system.name_problem((of or path).name)
        if problem is not None:
            raise UserError("cannot use {path}: {problem}; use another name", path=of or path, problem=problem)
        try:
            with files.reporting_errors(path):
                if of is None:
                    self._own_folder()
                self._own_file()
                self.dead_owner = _describe(self._read())
                owner = {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }
                self._write(json.dumps(owner).encode())
        except BaseException:
            self._close()
            raise

    def release(self) -> None:
        """Give the lock up; more than once does no harm."""
        if self._file >= 0:
            self._write(b"")
            remove = self._of is not None and self._is_file_at(self._path)
            if remove and system.REMOVES_OPEN_FILES:
                self._path.unlink()
            self._close()
            if remove and not system.REMOVES_OPEN_FILES:
                with contextlib.suppress(OSError):  # the next owner has it open and will remove it
                    self._path.unlink()

    @property
    def held(self) -> bool:
        """Whether the lock was not yet released."""
        return self._file >= 0

    def is_in(self, folder: Path) -> bool:
        """Whether ``folder`` is the folder that is owned, and not another one under its name."""
        if self._folder < 0:
            return self._is_file_at(folder / self._path.name)
        return _is_same(self._folder, folder)

    def find_folder(self) -> Path | None:
        """Returns where the folder that is owned is now; None if it was removed or that cannot be told."""
        found = system.path_of(self._folder if self._folder >= 0 else self._file)
        if found is not None and self._folder < 0:
            found = found.parent
        return found if found is not None and self.is_in(found) else None

    def require(self) -> None:
        """Raise UserError if the lock file was removed meanwhile, so that another process may own the file."""
        if not self._is_file_at(self._path):
            owner = owner_of(self._path, folder=False)
            lost = UserError(
                "{what} is not owned by this process any more, because its lock file {path} was removed",
                what=self._of or self._path.parent,
                path=self._path,
            )
            raise UserError("{lost}; it is in use by {owner}", lost=lost, owner=owner) if owner else lost

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _own_folder(self) -> None:
        try:
            self._folder = system.open_folder(self._path.parent)
            self._acquire(self._folder)
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
            if self._folder >= 0:
                os.close(self._folder)
            self._folder = -1

    def _own_file(self) -> None:
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | NEVER_WAIT, 0o666)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise NotRegularError(self._path)
            try:
                self._acquire(self._file)
            except OSError as error:
                if error.errno not in _CANNOT_LOCK:
                    raise
                raise UserError(
                    "the disk of {path} cannot lock files; use a folder on a local disk", path=self._path
                ) from error
            if self._is_file_at(self._path):
                return
            system.close_lock(self._file)  # its owner removed it while this process opened it

    def _acquire(self, descriptor: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not system.try_lock(descriptor):
            known = _describe(_content(self._path))
            if time.monotonic() < deadline and not known:
                time.sleep(0.01)
                continue
            owner = known or _holder(descriptor)
            if not self._wait:
                what = self._of or self._path.parent
                raise UserError(
                    "{what} is in use by {owner}; wait until it ends, or use another {kind}",
                    what=what,
                    owner=owner,
                    kind=_kind(self._of),
                )
            if self._on_wait is not None:
                self._on_wait(owner)
            system.wait_for_lock(descriptor)
            return

    def _is_file_at(self, path: Path) -> bool:
        return _is_same(self._file, path)

    def _close(self) -> None:
        for descriptor in (self._file, self._folder):
            if descriptor >= 0:
                system.close_lock(descriptor)
        self._file = self._folder = -1

    def _read(self) -> bytes:
        os.lseek(self._file, 0, os.SEEK_SET)
        return os.read(self._file, 4096)

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk does not keep anybody from owning a folder
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, content)


def owner_of(path: Path, *, folder: bool = True) -> str | None:
    """Returns who owns the lock file ``path``, or its ``folder``, at this moment, in words; None if nobody does."""
    for one in (path, path.parent) if folder else (path,):
        with contextlib.suppress(OSError):
            descriptor = os.open(one, os.O_RDONLY | NEVER_WAIT)
            try:
                if not system.try_lock(descriptor, shared=True):
                    return _describe(_content(path)) or _holder(descriptor)
            finally:
                system.close_lock(descriptor)
    return None


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether what is open is what has the name ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _content(path: Path) -> bytes:
    try:
        return read_regular(path)[:4096]
    except OSError:
        return b""


def _describe(content: bytes) -> str | None:
    try:
        owner = json.loads(content)
        return Translatable(
            "process {pid} on {host} since {since}", pid=owner["pid"], host=owner["host"], since=owner["since"]
        )
    except (ValueError, KeyError, TypeError):
        return None


def _holder(descriptor: int) -> str:
    """Who has locked what is open, by what the system knows, for an owner whose lock file was removed."""
    process = system.lock_holder(descriptor)
    if process is None:
        return Translatable("another process")
    return Translatable("process {process} on {host}", process=process, host=socket.gethostname())


def _kind(of: Path | None) -> str:
    return Translatable("folder") if of is None else Translatable("file")
