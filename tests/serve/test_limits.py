"""Too much, too slow, too many, gone away, or not allowed in: each ends in a clear reply and holds nothing."""

import contextlib
import gc
import http.client
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient

from mm_rec import system
from mm_rec.errors import UserError
from mm_rec.serve.connections import most_connections
from mm_rec.serve.gate import Limits, is_loopback
from mm_rec.serve.protocol import BoundedProtocol
from mm_rec.serve.service import Service

Connect = Callable[..., TestClient]
MakeService = Callable[..., Service]
Serve = Callable[..., contextlib.AbstractContextManager[str]]
WaitUntil = Callable[[Callable[[], bool]], None]

# Greedy: a draw would come upon an end token after some hundreds.
ENDLESS = {"model": "tiny", "prompt": "a", "max_tokens": 10**6, "stream": True, "temperature": 0}
SHORT = {"model": "tiny", "prompt": "a", "max_tokens": 2}


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        yield connection


def raw_request(body: dict[str, Any], length: int | None = None, path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length or len(content)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + content


def read_reply(connection: socket.socket) -> tuple[int, dict[str, Any], dict[str, str]]:
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    return reply.status, json.loads(reply.read()), dict(reply.headers)


def post(address: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
    with connected(address) as connection:
        connection.sendall(raw_request(body))
        return read_reply(connection)


def test_a_client_that_leaves_frees_its_slot(make_service: MakeService, serve: Serve, wait_until: WaitUntil) -> None:
    service = make_service(max_streams=2, max_tokens=10**6)
    with serve(service) as address:
        for body in (ENDLESS, {**ENDLESS, "stream": False}, {**ENDLESS, "n": 2}):
            with connected(address) as connection:
                connection.sendall(raw_request(body))
                wait_until(lambda: service.engine.running > 0)
            wait_until(lambda: service.engine.running == 0)
            assert post(address, SHORT)[0] == 200


def test_a_session_is_free_after_its_client_left(
    make_service: MakeService, serve: Serve, wait_until: WaitUntil
) -> None:
    service = make_service(max_tokens=10**6)
    message = {"role": "user", "content": "hi"}
    chat = {"model": "tiny", "messages": [message], "session": "s", "stream": True}
    with serve(service) as address:
        with connected(address) as connection:
            connection.sendall(raw_request(chat, path="/v1/chat/completions"))
            wait_until(lambda: service.engine.running == 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave by reset
        wait_until(lambda: service.engine.running == 0)
        wait_until(lambda: not service.sessions._busy)
        assert service.sessions.load("s") is None


def test_a_full_queue_says_when_to_come_back(make_service: MakeService, serve: Serve, wait_until: WaitUntil) -> None:
    service = make_service(max_streams=1, max_queue=1, max_tokens=10**6)
    with serve(service) as address, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(connected(address))
            connection.sendall(raw_request(ENDLESS))
            wait_until(lambda: service.engine.running == 1)
        wait_until(lambda: service.engine.waiting == 1)
        status, body, headers = post(address, SHORT)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "overloaded", "2")
        stack.close()
        wait_until(lambda: service.engine.running == 0)
        assert post(address, SHORT)[0] == 200


def test_a_request_has_its_time(make_service: MakeService, connect: Connect) -> None:
    with connect(make_service(max_tokens=10**6, seconds=0.4)) as client:
        start = time.monotonic()
        reply = client.post("/v1/completions", json={**ENDLESS, "stream": False})
        assert time.monotonic() - start < 15
        assert reply.json()["choices"][0]["finish_reason"] == "length"
        assert 0 < reply.json()["usage"]["completion_tokens"] < 10**6


def test_the_server_has_a_limit_of_tokens(make_service: MakeService, connect: Connect) -> None:
    with connect(make_service(max_tokens=5)) as client:
        reply = client.post("/v1/completions", json={**SHORT, "max_tokens": 100}).json()
        assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (5, "length")


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies_are_refused(service: Service, serve: Serve, declared: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 65_536

    with serve(service, limits=Limits(max_body_bytes=100_000)) as address:
        parts = urlsplit(address)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        headers = {"Content-Type": "application/json"} | ({"Content-Length": str(64 * 65_536)} if declared else {})
        connection.request("POST", "/v1/completions", chunks(), headers, encode_chunked=not declared)
        reply = connection.getresponse()
        assert reply.status == 413
        assert json.loads(reply.read())["error"]["code"] == "request_too_large"
        connection.close()
        assert post(address, SHORT)[0] == 200


def test_a_gigabyte_is_refused_unread(service: Service, serve: Serve) -> None:
    with serve(service) as address, connected(address) as connection:
        connection.sendall(raw_request(SHORT, length=1 << 30))
        assert read_reply(connection)[0] == 413


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "9" * 30])
def test_odd_lengths_are_refused(service: Service, serve: Serve, length: str) -> None:
    with serve(service) as address:
        with connected(address) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(12).startswith(b"HTTP/1.1 4")
        assert post(address, SHORT)[0] == 200


def test_huge_headers_are_refused(service: Service, serve: Serve) -> None:
    with serve(service) as address:
        with connected(address) as connection:
            with contextlib.suppress(ConnectionError):  # it closes before it has read them all
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"a" * 1_000_000)
            assert connection.recv(12).startswith(b"HTTP/1.1 4")
        assert post(address, SHORT)[0] == 200


def test_a_slow_body_is_given_up(service: Service, serve: Serve) -> None:
    with serve(service, limits=Limits(body_seconds=0.3)) as address, connected(address) as connection:
        connection.sendall(raw_request(SHORT, length=1000))
        status, body, _ = read_reply(connection)
        assert (status, body["error"]["type"]) == (408, "invalid_request_error")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_slow_head_is_given_up(
    service: Service, serve: Serve, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.4)
    with serve(service) as address, connected(address) as connection:
        connection.sendall(before)
        if before:
            assert read_reply(connection)[0] == 200
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 300:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 10
        with connected(address) as another:
            another.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_reply(another)[0] == 200


def test_a_client_that_does_not_read_is_given_up(
    make_service: MakeService, serve: Serve, wait_until: WaitUntil
) -> None:
    service = make_service(max_tokens=10**6)
    with serve(service, limits=Limits(send_seconds=0.3)) as address, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(address)
        connection.connect((parts.hostname, parts.port))
        connection.sendall(raw_request({**ENDLESS, "logprobs": 20, "temperature": 2}))
        wait_until(lambda: service.engine.running == 1)
        wait_until(lambda: service.engine.running == 0)
        assert post(address, SHORT)[0] == 200


def test_requests_at_a_time_are_bounded(service: Service, serve: Serve) -> None:
    with serve(service, limits=Limits(max_requests=3)) as address, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connected(address)).sendall(raw_request(SHORT, length=1000))
        deadline = time.monotonic() + 60
        while (reply := post(address, SHORT))[0] != 503:
            assert time.monotonic() < deadline
        assert reply[2]["retry-after"] == "2"
        with connected(address) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_reply(connection)[0] == 200


def test_a_key_opens_v1(make_service: MakeService, connect: Connect) -> None:
    with connect(make_service(), api_key="sésame") as client:
        key = {"Authorization": "Bearer sésame".encode()}
        for headers, message in (({}, "no API key"), ({"Authorization": "Bearer sesame"}, "wrong API key")):
            for reply in (
                client.get("/v1/models", headers=headers),
                client.get("/v1/sessions/a", headers=headers),
                client.post("/v1/completions", json=SHORT, headers=headers),
            ):
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
                assert reply.json()["error"]["message"].startswith(message)
                assert reply.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/completions", json=SHORT, headers=key).status_code == 200
        assert client.get("/api/tags").json() == {"error": "no API key; send it as `Authorization: Bearer KEY`"}
        assert client.get("/api/tags", headers=key).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        assert client.get("/health", headers={"Host": "example.org"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("LOCALHOST:1", True),
        ("evil.com", False), ("localhost.evil.com", False), ("127.0.0.1.evil.com", False), ("10.0.0.1", False),
        ("evil.com:127.0.0.1", False), ("", False), ("0.0.0.0", False),
    ],
)  # fmt: skip
def test_without_a_key_no_other_name_is_served(client: TestClient, host: str, allowed: bool) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == (200 if allowed else 403)


PAGE = "https://chat.example.org"
ASKING = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_no_page_elsewhere_may_use_the_server(client: TestClient) -> None:
    assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": PAGE}).headers
    assert client.options("/v1/chat/completions", headers=ASKING).status_code == 405


def test_pages_that_are_named_may_use_the_server(make_service: MakeService, connect: Connect) -> None:
    with connect(make_service(), api_key="secret", cors_origins=[PAGE]) as client:
        asked = client.options("/v1/chat/completions", headers=ASKING)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert asked.headers["access-control-allow-headers"] == "authorization"
        refused = client.post("/v1/completions", json=SHORT, headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        key = {"Origin": PAGE, "Authorization": "Bearer secret"}
        for body in (SHORT, ENDLESS | {"max_tokens": 3}):
            served = client.post("/v1/completions", json=body, headers=key)
            assert (served.status_code, served.headers["access-control-allow-origin"]) == (200, PAGE)
        other = {**ASKING, "Origin": "https://evil.example.org"}
        assert "access-control-allow-origin" not in client.options("/v1/chat/completions", headers=other).headers


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.9.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.org", "localhost.example.org", "")))


def test_stopping_ends_open_streams(make_service: MakeService, serve: Serve, wait_until: WaitUntil) -> None:
    service = make_service(max_tokens=10**6)
    received = bytearray()

    def read(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := connection.recv(65_536):
                received.extend(part)

    with contextlib.ExitStack() as stack:
        with serve(service) as address:
            connection = stack.enter_context(connected(address))
            connection.sendall(raw_request(ENDLESS))
            reader = threading.Thread(target=read, args=[connection])
            reader.start()
            wait_until(lambda: len(received) > 1000)
        reader.join(60)
        assert not reader.is_alive()
    assert service.engine._thread is None


def test_more_connections_than_the_cap(service: Service, serve: Serve, wait_until: WaitUntil) -> None:
    with serve(service, max_connections=12) as address, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(address)) for _ in range(60)]
        assert post(address, SHORT)[0] == 200
        idle[0].settimeout(60)
        assert idle[0].recv(1) == b""  # the one that has waited longest was closed
        stack.close()
        assert post(address, SHORT)[0] == 200


def test_busy_connections_leave_a_place_for_health(
    make_service: MakeService, serve: Serve, wait_until: WaitUntil
) -> None:
    service = make_service(max_streams=2, max_queue=20, max_tokens=10**6)
    with serve(service, max_connections=4) as address, contextlib.ExitStack() as stack:
        for count in range(1, 5):
            stack.enter_context(connected(address)).sendall(raw_request(ENDLESS))
            wait_until(lambda count=count: service.engine.running + service.engine.waiting == count)  # type: ignore[misc]
        status, body, headers = post(address, SHORT)
        assert (status, headers["retry-after"]) == (503, "2")
        assert "no connection to spare" in body["error"]["message"]
        with connected(address) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_reply(connection)[0] == 200
        stack.close()
        wait_until(lambda: service.engine.running + service.engine.waiting == 0)
        assert post(address, SHORT)[0] == 200


def chunked(body: bytes, size: int) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@pytest.mark.parametrize(("size", "status"), [(1, 400), (32, 400), (64, 200), (4096, 200)])
def test_tiny_chunks_are_refused(service: Service, serve: Serve, size: int, status: int) -> None:
    body = json.dumps(SHORT).encode() + b" " * 100_000
    with serve(service) as address, connected(address) as connection:
        with contextlib.suppress(ConnectionError):  # it closes before it has read them all
            connection.sendall(chunked(body, size))
        assert connection.recv(12) == b"HTTP/1.1 %d" % status


def test_a_short_body_may_come_byte_by_byte(service: Service, serve: Serve) -> None:
    with serve(service) as address, connected(address) as connection:
        connection.sendall(chunked(json.dumps(SHORT).encode(), 1))
        assert read_reply(connection)[0] == 200


def test_an_answered_request_is_let_go_at_once(service: Service, serve: Serve, wait_until: WaitUntil) -> None:
    kinds = ("Job", "JobHandle", "RequestResponseCycle", "Request", "Answer", "CompletionRequest", "ChatRequest")

    def held() -> dict[int, str]:
        found = ((id(one), type(one)) for one in gc.get_objects())
        return {
            number: f"{kind.__module__}.{kind.__name__}"
            for number, kind in found
            if kind.__name__ in kinds and kind.__module__.startswith(("mm_rec.", "uvicorn.", "starlette."))
        }

    def others_alone() -> bool:
        left = {name for number, name in held().items() if number not in of_others}
        assert time.monotonic() < end, f"still held: {left}"
        return not left

    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "session": "s"}
    with serve(service) as address, contextlib.ExitStack() as stack:
        gc.collect()
        of_others = held()  # what earlier tests still hold
        gc.disable()
        stack.callback(gc.enable)
        for stream in (False, True):
            for path, body in (("/v1/completions", SHORT), ("/v1/chat/completions", chat)):
                connection = stack.enter_context(connected(address))  # stays open
                connection.sendall(raw_request({**body, "stream": stream}, path=path))
                reply = http.client.HTTPResponse(connection)
                reply.begin()
                reply.read()
        # Whoever lists all objects holds them, also a tuple that another thread is still making of a generator, and
        # Python refuses to shorten a tuple that somebody holds. So the engine has to be idle before.
        wait_until(lambda: service.engine.running == 0)
        end = time.monotonic() + 50
        wait_until(others_alone)


@pytest.mark.parametrize("kind", ["idle", "slow body"])
def test_the_end_of_the_server_closes_what_asks_for_nothing(make_service: MakeService, serve: Serve, kind: str) -> None:
    with contextlib.ExitStack() as clients:
        with serve(make_service(max_tokens=10**6)) as address:
            connection = clients.enter_context(connected(address))
            if kind == "slow body":
                connection.sendall(raw_request(ENDLESS, length=1000))
        assert not rest(connection)


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65_536):
            received += piece
    return received


TALK = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": True}
OPTIONS = {"num_predict": 10**6, "temperature": 0}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", ENDLESS),
        ("/v1/chat/completions", {**TALK, "max_tokens": 10**6, "temperature": 0}),
        (
            "/v1/responses",
            {"model": "tiny", "input": "a", "max_output_tokens": 10**6, "stream": True, "temperature": 0},
        ),
        ("/api/chat", {**TALK, "options": OPTIONS}),
        ("/api/generate", {"model": "tiny", "prompt": "a", "raw": True, "options": OPTIONS}),
    ],
)
def test_the_end_of_the_server_ends_each_stream_with_an_error(
    make_service: MakeService, serve: Serve, path: str, body: dict[str, Any]
) -> None:
    with contextlib.ExitStack() as clients:
        with serve(make_service(max_tokens=10**6)) as address:
            connection = clients.enter_context(connected(address))
            connection.sendall(raw_request(body, path=path))
            assert connection.recv(12) == b"HTTP/1.1 200"
        events = re.findall(rb"^(?:data: )?({.*}|\[DONE\])\r?$", rest(connection), re.MULTILINE)
    if path.startswith("/v1/") and path != "/v1/responses":
        assert events.pop() == b"[DONE]"
    last = json.loads(events[-1])
    if path == "/v1/responses":
        assert last["type"] == "response.failed"
        assert last["sequence_number"] == len(events) - 1
        last = last["response"]
        assert last["status"] == "failed"
    assert "shutting down" in (last["error"] if path.startswith("/api/") else last["error"]["message"])


def test_the_cap_follows_the_limit_on_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, int | None] = {"files": 1024}
    monkeypatch.setattr(system, "open_files_limit", lambda: limits["files"])
    assert most_connections(1000) == 708
    assert most_connections(100) == 100
    limits["files"] = 100
    with pytest.raises(UserError, match="ulimit -n 1024"):
        most_connections(100)
    limits["files"] = None
    assert most_connections(1000) == 1000
