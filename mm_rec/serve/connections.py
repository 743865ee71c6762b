"""How many connections a server holds, and which one it gives up for a new one."""

from __future__ import annotations

from typing import Protocol

from mm_rec import system
from mm_rec.errors import UserError

__all__ = ["FEWEST", "RESERVED", "Connection", "Connections", "most_connections"]

RESERVED = 16
"""Connections beyond the cap, on which health checks alone are answered."""

FEWEST = 60
"""A server of fewer connections would close some whose request has arrived and is not read yet."""

_OTHER_DESCRIPTORS = 64
"""Files and libraries of the process."""


class Connection(Protocol):
    """What :class:`Connections` asks of a connection."""

    def abort(self) -> None:
        """Closes the connection at once."""


class Connections:
    """The open connections of a server.

    A connection *waits* while no request on it is complete, so that it depends on its client alone how long that takes.
    If there are too many, the one that has waited longest is closed. If none waits, a few more are accepted, on which
    only health checks are answered.

    Args:
        most: connections to hold.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # the one that has waited longest comes first

    @property
    def accepted_at_once(self) -> int:
        """Connections to accept in one turn of the event loop.

        Each is counted two turns later and may be read a turn after that. So few are accepted meanwhile that none is
        closed whose request has arrived, and that a third of :func:`most_connections` is enough for them.
        """
        return max(1, self._most // 12)

    @property
    def full(self) -> bool:
        """Whether requests in progress take all connections but the reserved ones."""
        return len(self._open) - len(self._waiting) > self._most

    def opened(self, connection: Connection) -> None:
        """Takes a new connection, which waits; closes another one, or this one, if there are too many."""
        self._open.add(connection)
        self._waiting[connection] = None
        if len(self._open) <= self._most:
            return
        longest = next(iter(self._waiting))
        if longest is not connection or len(self._open) > self._most + RESERVED:
            self.closed(longest)
            longest.abort()

    def waits(self, connection: Connection) -> None:
        """Notes that a connection waits for its client, from now on unless it did before."""
        if connection in self._open:
            self._waiting.setdefault(connection, None)

    def works(self, connection: Connection) -> None:
        """Notes that a request is complete and being answered."""
        self._waiting.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        """Forgets a connection."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def close_waiting(self) -> None:
        """Closes all connections that wait."""
        for connection in list(self._waiting):
            self.closed(connection)
            connection.abort()


def most_connections(wanted: int) -> int:
    """Returns how many connections a server can hold: ``wanted``, or what the limit on open files leaves.

    Raises:
        UserError: if that limit is too low for any.
    """
    limit = system.open_files_limit()
    if limit is None:
        return wanted
    left = 3 * (limit - RESERVED - _OTHER_DESCRIPTORS) // 4
    if left >= wanted:
        return wanted
    if left < FEWEST:
        raise UserError(
            "a process may have {limit} files open here, too few for a server; raise the limit with `ulimit -n 1024`",
            limit=limit,
        )
    return left
