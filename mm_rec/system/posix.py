"""Linux and macOS: the twin of :mod:`mm_rec.system.windows`, with the same names and promises."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from mm_rec.system import linux

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

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a program to end."""

REMOVES_OPEN_FILES = True
"""Whether files can be removed and folders renamed while somebody has them open."""

_F_GETPATH = 50
"""Of fcntl on macOS."""


def exit_code(signum: int) -> int:
    """Returns the exit code of a process that ends by a signal."""
    return 128 + signum


# --- locks ----------------------------------------------------------------------------------------------------------


def open_folder(path: Path) -> int:
    """Returns a descriptor of a folder that can be locked; OSError where folders can't be opened."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def read_at(descriptor: int, n_bytes: int, place: int) -> bytes:
    """Returns up to ``n_bytes`` of an open file from ``place`` on, whoever reads it elsewhere at the same time."""
    return os.pread(descriptor, n_bytes, place)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock what is open until the descriptor is closed or the process ends; returns False if another has it locked.

    Args:
        descriptor: of a file or folder.
        shared: only look whether nobody owns it; those that look don't keep each other out.

    Raises:
        OSError: if the file system cannot lock.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """Lock what is open as soon as nobody else has it locked."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def close_lock(descriptor: int) -> None:
    """Close a descriptor that may be locked; the lock is given up."""
    os.close(descriptor)


def lock_holder(descriptor: int) -> int | None:
    """Returns the process that has locked what is open; None if the system does not tell."""
    return linux.flock_holder(descriptor)


def path_of(descriptor: int) -> Path | None:
    """Returns the name that an open file or folder has now; None where the system does not tell."""
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            return Path(os.fsdecode(fcntl.fcntl(descriptor, _F_GETPATH, bytes(1024)).rstrip(b"\0")))
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    return None


def claim(path: Path, *, required: bool = False) -> Callable[[], None] | None:
    """Claim a temporary file or folder for this process; meanwhile it may be renamed and removed.

    Returns what gives the claim up, which the end of the process does, too. None if another process has claimed or
    removed it. On a file system that cannot lock (some network ones) it is claimed without a lock, or, if that is
    ``required``, not at all.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        held = try_lock(descriptor) and path.exists()
    except OSError:
        held = not required
    if not held:
        os.close(descriptor)
        return None
    return functools.partial(os.close, descriptor)


# --- the disk -------------------------------------------------------------------------------------------------------


def sync_descriptor(descriptor: int) -> None:
    """Flush an open file or folder to the disk itself."""
    if sys.platform == "darwin":  # fsync leaves it in the memory of the disk there
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # whatever stands there, without waiting for a pipe
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Give a file a name, that of another file too, which is gone then: at every instant one of both is there."""
    os.replace(source, target)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name, which must be free."""
    os.rename(source, target)


def is_in_use(error: OSError) -> bool:
    """Whether the system refused because somebody has a file open."""
    return False


def name_problem(name: str) -> str | None:
    """Returns why this system can't have a file of that name, in words; None if it can."""
    return None


# --- limits and memory ----------------------------------------------------------------------------------------------


def open_files_limit() -> int | None:
    """Returns how many files this process may have open; None for no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit


def address_space_left() -> int | None:
    """Returns the bytes that the limit on addresses (``ulimit -v``) leaves to this process; None for no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    import psutil  # not at the top, so that --help is quick

    return limit - int(psutil.Process().memory_info().vms)


def limit_memory(n_bytes: int) -> None:
    """Let this process have no more than so many bytes of addresses from now on, where the system can see to that."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses a limit below what is mapped
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def cores() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Returns the most bytes that this process had resident; the system's own count may start at the parent's."""
    known = linux.most_resident()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if known is None else known


def anonymous_memory(size: int) -> mmap.mmap:
    """Returns memory of ``size`` bytes, in large pages if the system has them."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # macOS, and Linux without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def prepare_console() -> None:
    """Let the standard streams take any text: they are UTF-8 here, or what the user has chosen."""
