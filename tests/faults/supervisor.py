"""Runs work in child processes and makes things go wrong: kills, failing system calls, full disks.

One process has everything imported, and a :class:`Supervisor` forks a child of it for each piece of work, so that a
trial costs milliseconds. The children stop before they begin: until :meth:`Child.go` the supervisor can
attach ``strace``, which injects a signal or an error at the k-th call of a kind.

Every random choice of a trial comes from its seed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WRITING = "write,pwrite64,writev,fsync,fdatasync,ftruncate,openat,mkdir,rename,renameat,renameat2"
"""System calls by which files come into being; at each of them a disk can be full or broken."""
CHANGING = f"{WRITING},unlink,unlinkat,rmdir,chmod,fchmodat,link,linkat,flock,close"
"""All system calls between which a kill may find a different state of the disk."""
TIMEOUT = 600.0


class Supervisor:
    """Forks children that call ``module.function(**arguments)`` of a module beside this file.

    A child exits with the number that the function returns, else with 0; with 2 after a UserError (its message is in
    :attr:`Child.log`), with 1 after any other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._server = _fork_server()

    def ask(self, **request: Any) -> Any:
        """Send one request to the fork server and return its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, work: str, **arguments: Any) -> Child:
        """A child that will do ``work`` ("module.function") once it is told to :meth:`Child.go`."""
        self._count += 1
        log = self.folder / f"child{self._count}.log"
        return Child(self, self.ask(fork=work, arguments=arguments, log=str(log)), log)

    def run(self, work: str, inject: str | None = None, **arguments: Any) -> Child:
        """Do ``work`` to its end, traced or with a fault injected as by :meth:`Child.inject`."""
        child = self.start(work, **arguments)
        if inject is not None:
            child.inject(inject)
        child.go()
        child.wait()
        return child


@functools.cache
def _fork_server() -> subprocess.Popen[str]:
    """The process that all supervisors fork from; it ends when its input does."""
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


class Child:
    """One forked process.

    Attributes:
        status: exit code, or minus the signal that ended it; None while it runs.
        log: what it printed.
        ended: :func:`clocks` at its end.
    """

    def __init__(self, supervisor: Supervisor, pid: int, log: Path) -> None:
        self.pid, self.status = pid, None
        self._supervisor, self._log = supervisor, log
        self.ended: tuple[float, float] = 0.0, 0.0
        self._tracer: subprocess.Popen[str] | None = None
        self._trace = log.with_suffix(".strace")

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def inject(self, what: str) -> None:
        """Attach strace with ``--inject=WHAT``, for example ``fsync:error=EIO:when=3`` (see strace(1)).

        The number counts the calls of that name alone. Without a fault (``write,fsync``) the calls are only traced.
        """
        calls, _, fault = what.partition(":")
        options = ["-f", "-y", "-o", str(self._trace), "-e", f"trace={calls}", "-p", str(self.pid)]
        if fault:
            options += ["-e", f"inject={what}"]
        self._tracer = subprocess.Popen(["strace", *options], stderr=subprocess.PIPE, text=True)
        assert self._tracer.stderr is not None
        line = self._tracer.stderr.readline()
        assert "attached" in line, line

    def go(self) -> None:
        """Let the child begin."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the child as no program can prevent."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the end; returns :attr:`status`. A child that takes too long is killed and fails the test."""
        self.status, self.ended = self._supervisor.ask(wait=self.pid, timeout=timeout)
        if self._tracer is not None:
            self._tracer.communicate(timeout=TIMEOUT)
        assert self.status is not None, f"process {self.pid} did not end within {timeout} s"
        return int(self.status)

    def faults(self) -> list[str]:
        """The traced calls that were made to fail, as strace writes them."""
        lines = self._trace.read_text(errors="replace").splitlines()
        return [line for line in lines if "(INJECTED)" in line]

    def calls(self) -> list[tuple[str, int]]:
        """The traced calls of the first thread in order: name, and the how manieth of that name from 1."""
        trace = self._trace.read_text(errors="replace")
        names = re.findall(rf"^{self.pid} +(\w+)\(", trace, re.MULTILINE)
        return [(name, names[: index + 1].count(name)) for index, name in enumerate(names)]


def can_trace() -> str | None:
    """Why faults cannot be injected into system calls here; None if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"strace may not trace here: {probe.stderr.strip()}"


@contextlib.contextmanager
def small_disk(mount_point: Path, n_bytes: int) -> Iterator[str | None]:
    """Mount a file system of ``n_bytes`` in memory; yields why that is not possible here, None if it was."""
    mount_point.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "none", str(mount_point)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        yield None if mounted.returncode == 0 else mounted.stderr.strip()
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(mount_point)], check=True)


def clocks(pid: int | str = "self") -> tuple[float, float]:
    """The monotonic clock, and for how many seconds a process was ready to run and had no processor."""
    return time.monotonic(), int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


# --- the fork server ------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer the requests of a Supervisor on standard input until it closes."""
    answer, sys.stdout = sys.stdout, sys.stderr
    sys.path.insert(0, str(HERE))
    for line in sys.stdin:
        request = json.loads(line)
        if "fork" in request:
            module, _, function = request["fork"].rpartition(".")
            work = getattr(importlib.import_module(module), function)
            result = _fork(work, request["arguments"], request["log"])
        else:
            result = _wait(request["wait"], request["timeout"])
        print(json.dumps(result), file=answer, flush=True)


def _fork(work: Any, arguments: dict[str, Any], log: str) -> int:
    pid = os.fork()
    if pid:
        os.waitpid(pid, os.WUNTRACED)  # until it has stopped itself
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        pr_set_ptracer, any_process = 0x59616D61, ctypes.c_ulong(-1)
        ctypes.CDLL(None).prctl(pr_set_ptracer, any_process, 0, 0, 0)  # strace is not an ancestor
        os.kill(os.getpid(), signal.SIGSTOP)
        status = _call(work, arguments)
    finally:
        os._exit(status)


def _call(work: Any, arguments: dict[str, Any]) -> int:
    from mm_rec.errors import UserError

    try:
        code = work(**arguments)
        return code if isinstance(code, int) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1


def _wait(pid: int, timeout: float) -> tuple[int | None, tuple[float, float]]:
    """The exit code of a child, None if it took too long, and its clocks at its end."""
    deadline, in_time = time.monotonic() + timeout, True
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if in_time and time.monotonic() > deadline:
            in_time = False
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    ended = clocks(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if in_time else None, ended


if __name__ == "__main__":
    serve()
