"""The log of a server is bounded and holds no secrets."""

import contextlib
import logging
import logging.config
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_rec.serve.log import BURST_BYTES, MAX_LINE, log_config


@pytest.fixture
def configured() -> Iterator[None]:
    config = log_config()
    loggers = [logging.getLogger(name) for name in config["loggers"]]
    before = [(one, one.handlers[:], one.level, one.propagate, one.filters[:]) for one in loggers]
    logging.config.dictConfig(config)
    yield
    for one, handlers, level, propagate, filters in before:
        one.handlers, one.level, one.propagate, one.filters = handlers, level, propagate, filters


def access(target: str, status: int = 200) -> None:
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:9", "GET", target, "1.1", status)


@pytest.mark.usefixtures("configured")
def test_requests_are_told_without_their_query(capsys: pytest.CaptureFixture[str]) -> None:
    access("/v1/models?key=secret")
    access("/health")
    access("/health", 503)
    access(f"/{'a' * 5000}?secret")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" - ")[2] for line in lines] == [
        '"GET /v1/models HTTP/1.1" 200',
        '"GET /health HTTP/1.1" 503',
        f'"GET /{"a" * 199} HTTP/1.1" 200',
    ]


@pytest.mark.usefixtures("configured")
def test_a_flood_is_counted_and_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [time.monotonic()]
    monkeypatch.setattr("mm_rec.serve.log.time.monotonic", lambda: clock[0])
    log = logging.getLogger("asyncio")
    for _ in range(20_000):
        log.error("socket.accept() out of system resource")
    log.error("x" * 10 * MAX_LINE)
    written = capsys.readouterr().err
    assert BURST_BYTES - MAX_LINE < len(written) <= BURST_BYTES
    clock[0] += 60
    log.error("later")
    left_out, line = capsys.readouterr().err.splitlines()
    assert left_out == f"({20_001 - written.count('resource')} lines left out here)"
    assert line.endswith("ERROR later")


@pytest.mark.usefixtures("configured")
def test_a_full_or_closed_output_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        for stream in (None, full):
            monkeypatch.setattr(sys, "stderr", stream)
            logging.getLogger("mm_rec.serve").error("lost")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
