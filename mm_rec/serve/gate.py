"""Checks requests before they reach the application: key, host, size and speed."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_rec.serve.connections import Connections
from mm_rec.serve.errors import ApiError

__all__ = ["Gate", "Limits", "is_loopback"]

_log = logging.getLogger("mm_rec.serve")
_DRAIN_SECONDS = 2.0


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        max_body_bytes: bytes of a request's body at most.
        max_requests: requests with a body at the same time at most; others get 503 and are to be sent again.
        body_seconds: time in which a body has to arrive.
        send_seconds: time in which a client has to take what it is sent.
    """

    max_body_bytes: int = 2 << 20
    max_requests: int = 512
    body_seconds: float = 30.0
    send_seconds: float = 30.0


class Gate:
    """ASGI middleware that checks key, host, size and speed of every request, and passes the body on whole.

    Args:
        app: the application that serves what is not refused.
        limits: limits of requests.
        connections: those of the server; where they are full, only health checks are answered.
        api_key: the key that requests to /v1 and /api have to bring; None for none. Without one only names of this
            machine are accepted as host, so that no web page can reach the server under a name of its own (DNS
            rebinding).
    """

    def __init__(self, app: ASGIApp, limits: Limits, connections: Connections, api_key: str | None) -> None:
        self._app = app
        self._limits = limits
        self._connections = connections
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_origin(scope["path"], headers)
            if self._connections.full and scope["path"] != "/health":
                raise ApiError.busy("the server has no connection to spare; try again in a moment")
            with self._counted(scope["method"]):
                body = await self._read(headers, receive)
                await self._app(scope, _replay(body, receive), self._paced(send))
        except ApiError as error:
            await _refuse(error, scope, receive, send)
        except _StalledError:
            _log.warning("a client took nothing for %g s; its connection is closed", self._limits.send_seconds)

    def _check_origin(self, path: str, headers: Headers) -> None:
        if self._authorization is None:
            if not is_loopback(_host_name(headers.get("host", ""))):
                raise ApiError(403, "without an API key this server is reached as localhost or 127.0.0.1 only")
        elif path.startswith(("/v1", "/api")):
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._authorization):
                message = "wrong API key" if given else "no API key; send it as `Authorization: Bearer KEY`"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    @contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        if method in ("GET", "HEAD", "OPTIONS"):
            yield
            return
        if self._requests >= self._limits.max_requests:
            raise ApiError.busy("the server is full; try again in a moment")
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Returns the whole body."""
        limit = self._limits.max_body_bytes
        too_large = ApiError(413, f"a request may have {limit} bytes at most", code="request_too_large")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 18 or int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its request was complete")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the request took more than {self._limits.body_seconds:g} s to arrive") from None

    def _paced(self, send: Send) -> Send:
        async def paced(message: Message) -> None:
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    await send(message)
            except TimeoutError:
                raise _StalledError from None

        return paced


class _StalledError(Exception):
    """The client does not read."""


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address always means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    """Returns the name in a Host header: ``localhost`` of ``localhost:8000``, ``::1`` of ``[::1]:8000``."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns ``receive`` for a request whose body has been read: the body, then what is left, the disconnection."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return parts.pop() if parts else await receive()

    return replayed


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Replies before the body is read, then reads on for a while, since a client that still sends misses a reply."""
    response = error.response(scope["path"])
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
