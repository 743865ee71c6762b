"""Windows: the twin of :mod:`mm_rec.system.posix`, with the same names and promises.

Three things are different here. Locks are mandatory: what is locked can't be read, so a byte far beyond any content is
locked. A file that somebody has open can be neither renamed nor removed, nor can its folder: so a temporary is claimed
by a lock file of its own, and what is in use for a moment (virus scanners read every new file) is tried again. And a
folder can't be opened: so none is locked or flushed. NTFS keeps names in a journal, and the owner of a folder has its
lock file open, which thereby keeps its place.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import mmap
import msvcrt
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm_rec.translation import Translatable

__all__ = [
    "REMOVES_OPEN_FILES",
    "SIGNALS",
    "address_space_left",
    "anonymous_memory",
    "claim",
    "close_lock",
    "cores",
    "exit_code",
    "is_in_use",
    "limit_memory",
    "lock_holder",
    "name_problem",
    "open_files_limit",
    "open_folder",
    "path_of",
    "peak_memory",
    "prepare_console",
    "read_at",
    "rename",
    "replace",
    "sync",
    "sync_descriptor",
    "try_lock",
    "wait_for_lock",
]

_runtime: Any = msvcrt
_signals: Any = signal
_reading = threading.Lock()

SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, _signals.SIGBREAK)
"""Signals that ask a program to end. Ctrl-Break, closing the window and logging off are SIGBREAK."""

REMOVES_OPEN_FILES = False
"""Whether files can be removed and folders renamed while somebody has them open."""

_LOCK_BYTE = 2**31 - 2
"""The byte that is locked: the last whose place fits into the C library's 32 bits, beyond any lock file's content."""

_LOOK_SECONDS = 0.1
"""How long it takes those who only look, at most, to give a lock up: there are no shared locks."""

_RETRY_SECONDS = 2.0
"""How long a file that is in use is tried again; a virus scanner needs less."""

_PAUSE_SECONDS = 0.01

_REFUSED_SIGNS = frozenset('<>:"/\\|?*') | {chr(code) for code in range(32)}
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{kind}{number}" for kind in ("COM", "LPT") for number in "123456789¹²³"
}


def exit_code(signum: int) -> int:
    """Returns the exit code of a process that ends by a signal; SIGBREAK counts as what it asks for, SIGTERM."""
    return 128 + (signal.SIGTERM if signum == _signals.SIGBREAK else signum)


# --- locks ----------------------------------------------------------------------------------------------------------


def open_folder(path: Path) -> int:
    """Returns a descriptor of a folder that can be locked; OSError where folders can't be opened."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(path))


def read_at(descriptor: int, n_bytes: int, place: int) -> bytes:
    """Returns up to ``n_bytes`` of an open file from ``place`` on, whoever reads it elsewhere at the same time.

    Other processes have a place of their own in the file here, since none is made as a copy of another.
    """
    with _reading:
        os.lseek(descriptor, place, os.SEEK_SET)
        return os.read(descriptor, n_bytes)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock what is open until the descriptor is closed or the process ends; returns False if another has it locked.

    Args:
        descriptor: of a file.
        shared: only look whether nobody owns it; those that look don't keep each other out.

    Raises:
        OSError: if the file system cannot lock.
    """
    deadline = time.monotonic() + (_LOOK_SECONDS if shared else 0.0)
    while True:
        os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
        try:
            _runtime.locking(descriptor, _runtime.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                raise
        else:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_SECONDS)


def wait_for_lock(descriptor: int) -> None:
    """Lock what is open as soon as nobody else has it locked."""
    while not try_lock(descriptor):
        time.sleep(_PAUSE_SECONDS)


def close_lock(descriptor: int) -> None:
    """Close a descriptor that may be locked; the lock is given up, which closing alone does only some time later."""
    with contextlib.suppress(OSError):
        os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
        _runtime.locking(descriptor, _runtime.LK_UNLCK, 1)
    os.close(descriptor)


def lock_holder(descriptor: int) -> int | None:
    """Returns the process that has locked what is open; None if the system does not tell."""
    return None


def path_of(descriptor: int) -> Path | None:
    """Returns the name that an open file or folder has now; None where the system does not tell."""
    return None


_CLAIM_SUFFIX = ".lock"


def claim(path: Path, *, required: bool = False) -> Callable[[], None] | None:
    """Claim a temporary file or folder for this process; meanwhile it may be renamed and removed.

    Returns what gives the claim up, which the end of the process does, too. None if another process has claimed or
    removed it. On a file system that cannot lock (some network ones) it is claimed without a lock, or, if that is
    ``required``, not at all.
    """
    own = path if path.name.endswith(_CLAIM_SUFFIX) else path.with_name(path.name + _CLAIM_SUFFIX)
    try:
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT)
    except (FileNotFoundError, PermissionError):  # the latter while another process removes it
        return None
    try:
        locked = try_lock(descriptor)
    except OSError:
        locked = not required
    if not locked:
        os.close(descriptor)
        return None
    if path.exists():
        return functools.partial(_give_up, descriptor, own)
    _give_up(descriptor, own)
    return None


def _give_up(descriptor: int, own: Path) -> None:
    """Ends a claim by its lock file."""
    close_lock(descriptor)
    with contextlib.suppress(OSError):  # another process that looks at it removes it
        own.unlink()


# --- the disk -------------------------------------------------------------------------------------------------------


def sync_descriptor(descriptor: int) -> None:
    """Flush an open file or folder to the disk itself."""
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR)  # a file that is open for reading alone can't be flushed
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Give a file a name, that of another file too, which is gone then: at every instant one of both is there."""
    _retry(lambda: os.replace(source, target))


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name, which must be free."""
    _retry(lambda: os.rename(source, target))


def _retry(change: Callable[[], None]) -> None:
    """Makes a change of names; tries again for a while if something is in use."""
    deadline = time.monotonic() + _RETRY_SECONDS
    while True:
        try:
            return change()
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def is_in_use(error: OSError) -> bool:
    """Whether the system refused because somebody has a file open."""
    return isinstance(error, PermissionError)


def name_problem(name: str) -> str | None:
    """Returns why this system can't have a file of that name, in words; None if it can.

    >>> name_problem("nul.safetensors"), name_problem("talk.safetensors")
    ('Windows keeps the name nul for a device', None)
    """
    stem = name.split(".")[0].rstrip(" ")
    if stem.upper() in _DEVICES:
        return Translatable("Windows keeps the name {stem} for a device", stem=stem)
    if refused := sorted(_REFUSED_SIGNS.intersection(name)):
        return Translatable("Windows has no file names with {refused!r}", refused=refused[0])
    if name.endswith((" ", ".")):
        return Translatable("Windows has no file names with a space or a full stop at the end")
    return None


# --- limits and memory ----------------------------------------------------------------------------------------------


def open_files_limit() -> int | None:
    """Returns how many files this process may have open; None for no limit."""
    return None


def address_space_left() -> int | None:
    """Returns the bytes that the limit on addresses (``ulimit -v``) leaves to this process; None for no limit."""
    return None


def limit_memory(n_bytes: int) -> None:
    """Do nothing: Windows sets no such limit from inside a process, so its parent has to watch it."""


def cores() -> int:
    """Returns the number of processors that this process may use."""
    import psutil  # not at the top, so that --help is quick

    return len(psutil.Process().cpu_affinity())


def peak_memory() -> int:
    """Returns the most bytes that this process had resident; the system's own count may start at the parent's."""
    import psutil

    used: Any = psutil.Process().memory_info()
    return int(used.peak_wset)


def anonymous_memory(size: int) -> mmap.mmap:
    """Returns memory of ``size`` bytes, in large pages if the system has them."""
    return mmap.mmap(-1, size)


def prepare_console() -> None:
    """Let the standard streams take any text: UTF-8 in place of a code page, unless the user has chosen another."""
    if os.environ.get("PYTHONIOENCODING"):
        return
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(encoding="utf-8")
