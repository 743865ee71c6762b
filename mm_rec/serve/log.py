"""The log of a server: a line for each request and fault, without query strings, bounded in lines and in all."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

__all__ = ["log_config"]

MAX_LINE = 4000
MAX_PATH = 200
BURST_BYTES = 200_000
BYTES_PER_SECOND = 2000.0
"""Of what is written in the long run; what is more is counted and left out."""


class BoundedHandler(logging.Handler):
    """Writes to standard error, no more than BURST_BYTES at once and BYTES_PER_SECOND in the long run."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._left = float(BURST_BYTES)
        self._last = time.monotonic()
        self._omitted = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, or counts it as left out. What standard error doesn't take is lost without a word."""
        now = time.monotonic()
        self._left = min(self._left + BYTES_PER_SECOND * (now - self._last), BURST_BYTES)
        self._last = now
        try:
            text = self.format(record)
            if len(text) > MAX_LINE:
                text = f"{text[:MAX_LINE]}..."
            if self._omitted:
                text = f"({self._omitted} lines left out here)\n{text}"
            size = len(text.encode(errors="replace")) + 1
            if size > self._left:
                self._omitted += 1
                return
            self._left -= size
            self._omitted = 0
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # closed or full: there is nobody to tell
            pass


class _RequestFilter(logging.Filter):
    """Takes the query string out of a request's line, and leaves out health checks that went well."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.args, tuple) or len(record.args) != 5:
            return True
        client, method, target, version, status = record.args
        path = str(target).partition("?")[0]
        record.args = (client, method, path[:MAX_PATH], version, status)
        return not (path == "/health" and status == 200)


def log_config() -> dict[str, Any]:
    """Returns the configuration of logging for ``uvicorn.Config``."""
    names = ("uvicorn", "uvicorn.access", "asyncio", "mm_rec.serve")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request": {"()": _RequestFilter}},
        "handlers": {"bounded": {"()": BoundedHandler}},
        "loggers": {
            name: {
                "handlers": ["bounded"],
                "level": "INFO",
                "propagate": False,
                "filters": ["request"] if name == "uvicorn.access" else [],
            }
            for name in names
        },
    }
