"""Clients that hold connections and never come to a request, or take their time over it; and a health check."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HEAD = b"POST /v1/completions?secret=1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
REQUEST = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2}).encode()
KINDS = ("idle", "slow head", "slow body", "one-byte chunks", "refused at once", "whole requests", "no HTTP")
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 50_000
COME_WITHIN_SECONDS, COME_BACK_SECONDS = 5.0, 6.0


@dataclass
class Storm:
    """What a storm came to: connections opened by kind, and how long each health check took."""

    opened: Counter[str] = field(default_factory=Counter)
    health_seconds: list[float] = field(default_factory=list)


async def storm(port: int, server: int, clients: int, seconds: float, seed: int) -> Storm:
    """``clients`` for ``seconds``; a client whose connection is closed opens the next. Asks for health.

    ``server`` is the number of the server's process.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it tells of each connection that is closed
    result, rng, end = Storm(), random.Random(seed), time.monotonic() + seconds
    tasks = [asyncio.create_task(_client(port, random.Random(rng.random()), end, result)) for _ in range(clients)]
    command = [
        sys.executable,
        __file__,
        str(port),
        str(seconds),
        str(server),
    ]  # does not wait for the clients of this process
    checker = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await checker.communicate()
    assert checker.returncode == 0, "a health check was not answered"
    result.health_seconds += json.loads(output)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return result


def health_seconds(port: int, server: int) -> float:
    """Seconds until a new connection has brought a whole answer to a health check; raises without one.

    The time in which the server's threads, which take turns, or this process were ready to run and had no processor is
    not counted, so that the load of the machine does not move the number.
    """
    start, before, reply = time.monotonic(), _waited(server) + _waited(os.getpid()), b""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(HEALTH)
        while piece := connection.recv(65_536):
            reply += piece
    assert reply.startswith(b"HTTP/1.1 200"), reply[:200]
    assert b'"status":"ok"' in reply, reply[:500]
    waited = _waited(server) + _waited(os.getpid()) - before
    return max(time.monotonic() - start - waited, 0.0)


def _waited(process: int) -> float:
    """Seconds that the threads of a process were ready to run and had no processor."""
    found = 0.0
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):
            found += int((thread / "schedstat").read_text().split()[1]) / 1e9
    return found


async def _client(port: int, rng: random.Random, end: float, result: Storm) -> None:
    await asyncio.sleep(COME_WITHIN_SECONDS * rng.random())
    while time.monotonic() < end:
        kind = rng.choice(KINDS)
        writer = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            result.opened[kind] += 1
            await _misbehave(kind, reader, writer, rng)
        if writer is not None:
            await _close(writer)
        await asyncio.sleep(COME_BACK_SECONDS * rng.random())


async def _misbehave(kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    match kind:
        case "idle":
            await reader.read()
        case "slow head":
            for byte in HEAD:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.3)
        case "slow body":
            writer.write(HEAD + b"Content-Length: 100000\r\n\r\n")
            while not reader.at_eof():
                writer.write(b" ")
                await asyncio.sleep(0.5)
        case "one-byte chunks":
            writer.write(CHUNKS)
            await writer.drain()
            await reader.read()
        case "refused at once":
            writer.write(HEAD + b"Content-Length: 999999999999\r\n\r\n")
            await reader.read()
        case "whole requests":
            writer.write(HEAD + f"Content-Length: {len(REQUEST)}\r\n\r\n".encode() + REQUEST)
            await reader.readuntil(b"}")
        case "no HTTP":
            writer.write(rng.randbytes(rng.randint(1, 2000)))
            await reader.read()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def main() -> int:
    """Ask for health for some seconds; prints how long each answer took."""
    end, found = time.monotonic() + float(sys.argv[2]), []
    while time.monotonic() < end:
        found.append(health_seconds(int(sys.argv[1]), int(sys.argv[3])))
        time.sleep(0.1)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
