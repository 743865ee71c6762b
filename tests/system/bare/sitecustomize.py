"""A Python whose `mm_rec` sees a system like Windows, as far as Linux can play one; everybody else sees Linux.

With this folder on PYTHONPATH and MM_REC_TEST_SYSTEM=bare, every interpreter that starts takes away from the modules
of mm_rec, and from nobody else: the modules of POSIX, its functions and constants in ``os``, ``signal``, ``select``
and ``mmap``, folders that can be opened, files that can be flushed while open for reading alone, and files that can be
renamed or removed while this process has them open. Instead there is ``msvcrt``, whose locks behave as Microsoft and
Python document them. Processes start by ``spawn``, and standard streams have a code page.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import mmap
import multiprocessing
import os
import resource
import select
import signal
import stat
import sys
import types
from collections.abc import Callable
from typing import Any

GONE = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline"}
SIGBREAK = signal.SIGTTIN
"""Its number on Windows, 21, is this signal here."""

GONE_FROM_OS = {
    *(name for name in dir(os) if name.startswith(("O_DIR", "O_NOF", "O_CLO", "O_SYNC", "posix_", "sched_", "wait"))),
    *("fork", "forkpty", "getloadavg", "pread", "pwrite", "preadv", "pwritev", "getuid", "geteuid", "getgid", "killpg"),
    *("set_blocking", "get_blocking", "statvfs", "fstatvfs", "uname", "mkfifo", "mknod", "chown", "fchmod", "fchown"),
    *("register_at_fork", "openpty", "nice", "sync", "fdatasync", "sendfile", "getpgid", "setsid", "chroot", "sysconf"),
}  # fmt: skip
SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}


class Like(types.ModuleType):
    """A module that looks names up in another one, but for those that are ``gone`` or ``changed``."""

    def __init__(self, module: types.ModuleType, gone: set[str], changed: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _gone=gone, _changed=changed)

    def __getattr__(self, name: str) -> Any:
        if name in self._gone:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this system")
        return self._changed[name] if name in self._changed else getattr(self._module, name)


def denied(path: object) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


def os_open(path: Any, flags: int, mode: int = 0o777) -> int:
    if os.path.isdir(path):
        raise denied(path)
    return os.open(path, flags, mode)


def os_fsync(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    os.fsync(descriptor)


def refuse_open_files(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that renames or removes, and refuses what this process has open if `mm_rec` calls it."""

    def change(*paths: Any, **keywords: Any) -> Any:
        if from_package():
            for path in paths:
                if isinstance(path, str | os.PathLike) and is_open(os.path.realpath(path)):
                    raise denied(path)
        return real(*paths, **keywords)

    return change


def from_package(depth: int = 8) -> bool:
    frame = sys._getframe(2)
    while frame is not None and depth:
        if frame.f_globals.get("__name__", "").startswith("mm_rec."):
            return True
        frame, depth = frame.f_back, depth - 1
    return False


def is_open(path: str) -> bool:
    for number in os.listdir("/proc/self/fd"):
        try:
            found = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if found == path or found.startswith(f"{path}/"):
            return True
    return False


def set_signal(signum: int, handler: Any) -> Any:
    if signum not in {getattr(signal, name) for name in SIGNALS} | {SIGBREAK}:
        raise ValueError("invalid signal value")
    return signal.signal(signum, handler)


def select_sockets(*waited: Any) -> Any:
    for one in (one for some in waited[:3] for one in some):
        if not stat.S_ISSOCK(os.fstat(one if isinstance(one, int) else one.fileno()).st_mode):
            raise OSError(10038, "an operation was attempted on something that is not a socket")
    return select.select(*waited)


def map_memory(fileno: int, length: int, tagname: str | None = None, access: int = 0, offset: int = 0) -> mmap.mmap:
    return mmap.mmap(fileno, length, access=access, offset=offset)


msvcrt: Any = types.ModuleType("msvcrt")
msvcrt.LK_UNLCK, msvcrt.LK_LOCK, msvcrt.LK_NBLCK, msvcrt.LK_RLCK, msvcrt.LK_NBRLCK = range(5)
_locked: set[tuple[int, int]] = set()


def locking(descriptor: int, mode: int, n_bytes: int) -> None:
    """``_locking`` of Microsoft's C library for one byte: owned by an open file; no waiting, which nothing here needs.

    The place is the file's position, of 32 bits. It is an error of whoever calls to lock what others have to read.
    """
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    assert n_bytes == 1, "only one byte is locked"
    assert os.fstat(descriptor).st_size <= place < 2**31 - 1, "locks are mandatory: the content could not be read"
    this = (descriptor, os.fstat(descriptor).st_ino)
    if mode == msvcrt.LK_UNLCK:
        if this not in _locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _locked.discard(this)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return
    assert mode == msvcrt.LK_NBLCK, "the others wait ten seconds"
    if this in _locked:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    _locked.add(this)


msvcrt.locking = locking


def like_psutil(psutil: Any) -> Like:
    """``psutil`` whose processes know their peak, as on Windows."""

    class Process(psutil.Process):  # type: ignore[misc, name-defined]
        def memory_info(self) -> Any:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return types.SimpleNamespace(**super().memory_info()._asdict(), peak_wset=peak)

    return Like(psutil, set(), {"Process": Process})


def install() -> None:
    """Changes this interpreter."""
    wanted = {*SIGNALS, "SIGBREAK"}
    no_signals = {name for name in dir(signal) if name.startswith("SIG") and not name.startswith("SIG_")} - wanted
    likes = {
        "os": Like(os, GONE_FROM_OS, {"open": os_open, "fsync": os_fsync}),
        "signal": Like(
            signal,
            no_signals | {"pthread_kill", "pthread_sigmask", "setitimer", "alarm", "sigwait", "siginterrupt"},
            {"SIGBREAK": SIGBREAK, "signal": set_signal},
        ),
        "select": Like(select, {"poll", "epoll"}, {"select": select_sockets}),
        "mmap": Like(mmap, {name for name in dir(mmap) if name[:4] in ("MAP_", "MADV", "PROT")}, {"mmap": map_memory}),
        "msvcrt": msvcrt,
    }  # fmt: skip
    real = builtins.__import__

    def import_module(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        spec = (globals or {}).get("__spec__")
        caller = spec.name if spec is not None else (globals or {}).get("__name__", "")
        if caller.startswith("mm_rec.") and not caller.startswith("mm_rec.cpp"):
            if name in GONE:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name == "psutil" and name not in likes:
                likes[name] = like_psutil(real(name))
            if name in likes:
                return likes[name]
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = import_module
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, refuse_open_files(getattr(os, name)))
    multiprocessing.set_start_method("spawn", force=True)
    if not os.environ.get("PYTHONIOENCODING") and not sys.flags.utf8_mode:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
                stream.reconfigure(encoding="cp1254")


if os.environ.get("MM_REC_TEST_SYSTEM") == "bare":
    install()
