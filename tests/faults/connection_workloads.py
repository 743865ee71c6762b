"""Row 23: more connections than there are descriptors, idle, slow, in tiny pieces; streams at the server's end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from serving_workloads import CONFIG, PATHS, check_reply, socket_of, tokenizer, wait_until_free
from storming import REQUEST, storm
from workload import Trial, workload

from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint

SMALL = {"clients": 300, "seconds": 2.0}
LARGE = {"clients": 2000, "seconds": 30.0}
DESCRIPTORS = 1024
LOG_BYTES = 1_000_000
HEALTH_SECONDS = 1.0
MEMORY_BYTES = 400_000_000
"""By which a storm may make the server grow."""


def ask(port: int) -> None:
    """A request of somebody who means well, repeated as its client would: it is answered in the end."""
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", PATHS[0], REQUEST, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            headers = {name.lower(): value for name, value in reply.getheaders()}
            check_reply(reply.status, headers, reply.read().decode(), "after a storm")
        if reply.status == 200:
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


@workload(23, "300 clients at a server of 60 connections for two seconds: idle, slow, in one-byte chunks, no HTTP",
          unit="storms", quick=2, soak=10)  # fmt: skip
def small_storms(folder: Path) -> Iterator[Trial]:
    with socket_of(folder, max_connections=60) as (port, service):

        def trial(seed: int) -> dict[str, int]:
            result = asyncio.run(storm(port, os.getpid(), seed=seed, **SMALL))  # type: ignore[arg-type]
            assert max(result.health_seconds) < HEALTH_SECONDS, max(result.health_seconds)
            wait_until_free(service, 20)
            ask(port)
            return result.opened

        yield trial


@contextlib.contextmanager
def server_process(folder: Path, *flags: str) -> Iterator[tuple[int, subprocess.Popen[str], Path]]:
    """``mm-rec serve`` with few descriptors: its port, its process, its log."""
    path, log = folder / "step_000001", folder / "log"
    if not path.exists():
        weights = MMRecModel(CONFIG, seed=3).state_dict()
        checkpoint.save(
            path, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={"step": 1}, tokenizer=tokenizer()
        )
    command = [sys.executable, "-m", "mm_rec.cli", "serve", "--model", str(path), "--port", "0", "--name", "tiny"]
    command += ["--session_dir", str(folder / "talks"), "--precision", "fp32", "--threads", "1", *flags]
    with log.open("w") as file:
        server = subprocess.Popen(
            ["sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh", *command],
            stdout=subprocess.PIPE, stderr=file, text=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    try:
        assert server.stdout is not None
        place = next(filter(None, (re.search(r":(\d+)/", line) for line in server.stdout)), None)
        assert place is not None, log.read_text()
        yield int(place[1]), server, log
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@workload(23, f"2,000 clients at a server with {DESCRIPTORS} descriptors for half a minute: idle, slow, in one-byte "
          "chunks, no HTTP", unit="storms", quick=0, soak=10)  # fmt: skip
def storms(folder: Path) -> Iterator[Trial]:
    with server_process(folder) as (port, server, log):
        ask(port)

        def trial(seed: int) -> dict[str, int]:
            size, memory = log.stat().st_size, psutil.Process(server.pid).memory_info().rss
            result = asyncio.run(storm(port, server.pid, seed=seed, **LARGE))  # type: ignore[arg-type]
            slowest = max(result.health_seconds)
            assert slowest < HEALTH_SECONDS, slowest
            ask(port)
            assert log.stat().st_size - size < LOG_BYTES, log.stat().st_size
            assert "secret" not in log.read_text()
            assert "Traceback" not in log.read_text()
            grown = psutil.Process(server.pid).memory_info().rss - memory
            assert grown < MEMORY_BYTES, grown
            return {**result.opened, "health checks within 1 s": len(result.health_seconds)}

        yield trial


TALK = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": True}
ENDLESS: dict[str, dict[str, object]] = {
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 10**6, "temperature": 0, "stream": True},
    "/v1/chat/completions": {**TALK, "max_tokens": 10**6, "temperature": 0},
    "/v1/responses": {"model": "tiny", "input": "a", "max_output_tokens": 10**6, "temperature": 0, "stream": True},
    "/api/chat": {**TALK, "options": {"temperature": 0}},
    "/api/generate": {"model": "tiny", "prompt": "a", "raw": True, "options": {"temperature": 0}},
}
ENDS = ("response.completed", "response.incomplete")


def read_stream(port: int, path: str, body: dict[str, object], pieces: list[str], begun: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            piece = line.decode().removeprefix("data: ").strip()
            if piece.startswith(("{", "[")):
                pieces.append(piece)
                begun.set()


def ended_by_an_error(path: str, pieces: list[str]) -> bool:
    """Whether a stream was told that the server stops; asserts that it came to an end of its protocol."""
    if path in ("/v1/completions", "/v1/chat/completions"):
        assert pieces.pop() == "[DONE]"
    last = json.loads(pieces[-1])
    if "error" in last or last.get("type") == "response.failed":
        return True
    choices = last.get("choices", [{}])
    assert last.get("done") or last.get("type") in ENDS or choices[0].get("finish_reason"), last
    return False


@workload(23, "SIGTERM to a server with running streams of every protocol", unit="servers", quick=1, soak=10,
          idle=["streams that ended before"])  # fmt: skip
def stopped_servers(folder: Path) -> Iterator[Trial]:
    torch.set_num_threads(1)

    def trial(seed: int) -> dict[str, int]:
        rng = random.Random(seed)
        paths = rng.sample(list(ENDLESS), rng.randint(1, 4))
        streams: list[list[str]] = [[] for _ in paths]
        with server_process(folder, "--max_tokens", "1000000") as (port, server, log):
            begun = [threading.Event() for _ in streams]
            threads = [
                threading.Thread(target=read_stream, args=(port, path, ENDLESS[path], *one))
                for path, *one in zip(paths, streams, begun, strict=True)
            ]
            for thread in threads:
                thread.start()
            assert all(one.wait(60) for one in begun)
            time.sleep(rng.random() / 2)
            server.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
            assert server.wait(30) == 128 + signal.SIGTERM
            assert "Traceback" not in log.read_text(), log.read_text()
        told = {path: ended_by_an_error(path, pieces) for path, pieces in zip(paths, streams, strict=True)}
        outcomes = {f"{path}: streams that ended with an error": 1 for path, one in told.items() if one}
        return {**outcomes, "streams that ended before": len(told) - len(outcomes)}

    yield trial
