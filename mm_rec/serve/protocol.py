"""uvicorn's HTTP protocol with limits: for the head of a request, for the pieces of a body and for all connections."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mm_rec.serve.connections import Connections

__all__ = ["BoundedProtocol"]

FREE_CHUNKS = 128
CHUNK_BYTES = 64
"""A body in more than FREE_CHUNKS chunks must have so many bytes in each on average: a chunk costs as much as these."""


class _ChunkLimit(h11.Connection):
    """Refuses a body in many tiny chunks, each of which costs some ten microseconds."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > FREE_CHUNKS + self._bytes // CHUNK_BYTES:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        elif isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        return event


class BoundedProtocol(H11Protocol):
    """One connection.

    It is closed if no request begins on it for ``head_seconds``, even if bytes of its head arrive slowly, or if the
    server has too many. The body and the reply have time limits in :class:`mm_rec.serve.gate.Gate`.
    """

    head_seconds = 30.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        held: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _ChunkLimit(h11.SERVER)
        self._held = held
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection and starts the time limit of the first request."""
        super().connection_made(transport)
        self._expect_request()
        self._held.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        super().connection_lost(exc)
        self._held.closed(self)
        self._stop_timer()

    def handle_events(self) -> None:
        """Handles what has arrived and notes whether it is a whole request."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
            if not self.cycle.more_body:
                self._held.works(self)

    def on_response_complete(self) -> None:
        """Lets go of the request that was answered, and starts the time limit of the next one."""
        self._held.waits(self)
        answered = self.cycle
        super().on_response_complete()  # may begin with a request that has arrived meanwhile
        if self.cycle is answered:
            self.cycle = self.scope = self.headers = None  # type: ignore[assignment]
            self._expect_request()

    def send_400_response(self, msg: str) -> None:
        """Says that what has arrived is no request, or, in the midst of a reply, closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.abort()

    def abort(self) -> None:
        """Closes the connection at once."""
        self.transport.abort()

    def _expect_request(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
