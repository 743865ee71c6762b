"""uvicorn's HTTP protocol with a time limit for the head of a request."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

__all__ = ["HeadTimeoutProtocol"]


class HeadTimeoutProtocol(H11Protocol):
    """Closes a connection on which no request begins for ``head_seconds``, even if bytes of its head arrive slowly.

    The body and the reply have time limits in :class:`mm_rec.serve.gate.Gate`.
    """

    head_seconds = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time limit of the first request."""
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        """Starts the time limit of the next request."""
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        self.loop.call_later(self.head_seconds, self._give_up, self.cycle)

    def _give_up(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()
