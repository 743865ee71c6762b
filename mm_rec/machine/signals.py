"""SIGTERM and Ctrl-C: finish what must not be torn, then leave with the conventional exit code."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "SignalGuard"]

DEADLINE_SECONDS = 9.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, not an ``Exception``."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class SignalGuard:
    """Turns the first SIGTERM or SIGINT into :class:`Interrupted`, at once or when the work says so.

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
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
            if not self._ends_process:
                return self
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=_watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._pipe[1])
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


def _watch(pipe: int) -> None:
    """End the process at the second signal, or nine seconds after the first.

    The interpreter writes each signal's number into the pipe as it comes, while handlers in Python wait until
    the main thread is back from native code, which may be long. The pipe is closed when the guard ends.
    """
    first = 0
    with os.fdopen(pipe, "rb", buffering=0) as signals:
        while True:
            if first and not select.select([signals], [], [], DEADLINE_SECONDS)[0]:
                os._exit(128 + first)
            received = signals.read(1)
            if not received:
                return
            if received[0] in SIGNALS:
                if first:
                    os._exit(128 + received[0])
                first = received[0]
