"""The application behind a socket: uvicorn with limits on connections and log, and an end that streams can read."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from mm_rec.serve.connections import Connections
from mm_rec.serve.engine import Engine
from mm_rec.serve.log import log_config
from mm_rec.serve.protocol import BoundedProtocol

__all__ = ["Server"]

DRAIN_SECONDS = 5.0
"""For running requests to end after a signal; what is left is then told that the server stops."""

_LAST_WORDS_SECONDS = 3
_LISTEN_BACKLOG = 4096


class Server(uvicorn.Server):
    """Serves an application until a signal comes.

    Args:
        app: the application.
        engine: the engine that answers its requests, stopped before the connections are closed.
        connections: that the application was made with.
        quiet: without a log, as for tests.
        drain_seconds: for running requests to end after a signal.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        connections: Connections,
        *,
        quiet: bool = False,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        protocol: Any = functools.partial(BoundedProtocol, held=connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                loop="asyncio",  # how many connections are accepted at once is asyncio's
                backlog=connections.accepted_at_once,
                log_config=None if quiet else log_config(),
                log_level="critical" if quiet else None,
                timeout_graceful_shutdown=int(drain_seconds) + _LAST_WORDS_SECONDS,
                server_header=False,
            )
        )
        self._engine = engine
        self._connections = connections
        self._drain_seconds = drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen; as many connections as come in a moment may wait to be accepted."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_LISTEN_BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends: no new connections, some seconds for running requests, then an error for those that are left."""
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ending

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        self._connections.close_waiting()
        await asyncio.to_thread(self._engine.stop)
