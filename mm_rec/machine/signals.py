"""SIGTERM and Ctrl-C: finish what must not be torn, then leave with the conventional exit code."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from mm_rec import system

__all__ = ["Interrupted", "SignalGuard"]

DEADLINE_SECONDS = 9.0


class Interrupted(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, not an ``Exception``."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = system.exit_code(signum)


class SignalGuard:
    """Turns the first of :data:`mm_rec.system.SIGNALS` into :class:`Interrupted`, at once or when the work says so.

    Inside :meth:`deferred` a signal only sets :attr:`requested`; leaving the context, or a call of
    :meth:`check` anywhere, raises. The second signal, or nine seconds, end the process on the spot: all
    files are written atomically, so that what was saved before stays valid. Outside the main thread
    Python takes no signals and the guard does nothing.

    Args:
        ends_process: whether the second signal, or nine seconds, end the process. In a process that is not ours, as a
            notebook's, it is False: the second signal raises KeyboardInterrupt at once, and nothing else happens.
        last: the program ends after this guard; once a signal came, those that come on the way out are ignored.
    """

    def __init__(self, *, last: bool = False, ends_process: bool = True) -> None:
        self.requested: int | None = None
        self._ends_process = ends_process
        self._last = last
        self._deferred = False
        self._previous: dict[int, Any] = {}
        self._previous_wakeup = -1
        self._wakeup: socket.socket | None = None

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for signum in system.SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
            if not self._ends_process:
                return self
            signals, self._wakeup = socket.socketpair()  # which, other than a pipe, can be waited for on Windows
            self._wakeup.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_watch, args=(signals,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            self._wakeup.close()
        leaving = self._last and isinstance(error, Interrupted)
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_IGN if leaving else handler)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A stretch of work that is not torn; it ends in :class:`Interrupted` if a signal came meanwhile."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signum
            if not self._deferred:
                raise Interrupted(signum)
        elif not self._ends_process:
            raise KeyboardInterrupt


def _watch(signals: socket.socket) -> None:
    """End the process at the second signal, or nine seconds after the first.

    The interpreter sends each signal's number as it comes, while handlers in Python wait until the main thread is back
    from native code, which may be long. The other end is closed when the guard ends.
    """
    first = 0
    with signals:
        while True:
            if first and not select.select([signals], [], [], DEADLINE_SECONDS)[0]:
                os._exit(system.exit_code(first))
            received = signals.recv(1)
            if not received:
                return
            if received[0] in system.SIGNALS:
                if first:
                    os._exit(system.exit_code(received[0]))
                first = received[0]
