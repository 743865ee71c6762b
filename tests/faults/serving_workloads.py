"""Rows 15, 17: requests of every kind to the server, crowds, clients that leave; control tokens in what users say."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient
from workload import Trial, workload

from mm_rec.config import ModelConfig
from mm_rec.data.conversations import encode_document, parse_conversation
from mm_rec.inference.session_file import fingerprint
from mm_rec.model import MMRecModel
from mm_rec.serve.app import create_app
from mm_rec.serve.connections import Connections
from mm_rec.serve.engine import Engine
from mm_rec.serve.server import Server
from mm_rec.serve.service import Service
from mm_rec.serve.sessions import SessionStore
from mm_rec.text.conversation import Message, clean, encode_conversation
from mm_rec.text.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(vocab_size=512, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5)
HOST = {"Host": "localhost"}
STREAMS, QUEUE = 4, 8


def tokenizer() -> Tokenizer:
    return train_tokenizer([inspect.getsource(random), "ışık çiğ öğüt şeker " * 20, " ".join(CONTROL_TOKENS) * 20], 512)


def service_in(folder: Path, max_sessions: int = 20, max_tokens: int = 4) -> Service:
    torch.set_num_threads(1)
    model, one = MMRecModel(CONFIG, seed=3).eval(), tokenizer()
    engine = Engine(model, one, None, max_streams=STREAMS, max_queue=QUEUE)
    identity = fingerprint(model)
    store = SessionStore(folder / "sessions", model, one, None, fingerprint=identity, max_sessions=max_sessions)
    return Service(
        name="tiny", engine=engine, sessions=store, fingerprint=identity, max_tokens=max_tokens, seconds=20.0
    )


@contextlib.contextmanager
def client_of(folder: Path, **limits: int) -> Iterator[tuple[TestClient, Service]]:
    """A client of a server in this process without a socket."""
    service = service_in(folder, **limits)
    with TestClient(create_app(service), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client, service


@contextlib.contextmanager
def socket_of(folder: Path, max_connections: int = 1000, **limits: int) -> Iterator[tuple[int, Service]]:
    """A server behind a real socket: its port."""
    service, connections = service_in(folder, **limits), Connections(max_connections)
    server = Server(
        create_app(service, connections=connections), service.engine, connections, quiet=True, drain_seconds=0.2
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1], service
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


# --- requests -------------------------------------------------------------------------------------------------------

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/api/chat", "/api/generate")
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stream", "stop",
    "seed", "logprobs", "top_logprobs", "session", "echo", "user", "stream_options", "presence_penalty", "best_of", "x",
    "input", "format", "response_format", "options", "tools",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, -1e308, "", "a", "\0", "\ud800", "tiny",
    "x" * 5000, [], [[]], {}, [None], ["a"], ["\udfff"], [0], [511], [512], [-1], [[1, 2], [3]], {"a": 1},
    [{"role": "user", "content": "hi"}], [{"role": "tool", "content": "hi"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": "<|end|>", "content": "hi"}],
    [{"role": "user", "content": "hi", "name": "<|assistant|>"}], {"include_usage": True}, {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "json", {"type": "integer"}, {"$ref": "#"},
    {"type": "array", "items": {"$ref": "#"}}, float("nan"), float("inf"),
)  # fmt: skip


def sound_body(rng: random.Random, path: str) -> dict[str, Any]:
    text = rng.choice(["hi", "def f(x):", "ışık 🙂", "<|end|>"])
    length, messages = rng.randint(1, 3), [{"role": "user", "content": text}]
    return {
        "/v1/completions": {"model": "tiny", "max_tokens": length, "prompt": text},
        "/v1/chat/completions": {"model": "tiny", "max_tokens": length, "messages": messages},
        "/v1/responses": {"model": "tiny", "max_output_tokens": length, "input": rng.choice([text, messages])},
        "/api/chat": {"model": "tiny", "options": {"num_predict": length}, "messages": messages},
        "/api/generate": {"model": "tiny", "options": {"num_predict": length}, "prompt": text},
    }[path]


def random_request(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of a request that is wrong in some way, or strange, or only looks so."""
    path = rng.choice(PATHS)
    body = sound_body(rng, path)
    for _ in range(rng.randint(0, 3)):
        body[rng.choice(FIELDS)] = rng.choice(ODD_VALUES)
    headers = {**HOST, "Content-Type": "application/json"}
    content = json.dumps(body, ensure_ascii=True).encode()
    match rng.choice(["as it is"] * 4 + ["damaged", "deep", "huge", "type", "header"]):
        case "damaged":
            place = rng.randrange(len(content))
            content = content[:place] + rng.randbytes(rng.randint(0, 4)) + content[place + rng.randint(0, 9) :]
        case "deep":
            content = rng.choice([b"[", b'{"a":', b'{"messages":[']) * rng.randint(100, 100_000)
        case "huge":
            content = json.dumps(
                {**body, "prompt": "a" * 1_000_000, "messages": [{"role": "user", "content": "b" * 10**6}]}
            ).encode()
        case "type":
            headers["Content-Type"] = rng.choice(
                ["text/plain", "application/xml", "", "application/json; charset=utf-16"]
            )
        case "header":
            headers[rng.choice(["X-A", "Authorization", "Accept", "Origin"])] = rng.choice(
                ["a" * 60_000, "Bearer ", "*/*"]
            )
    return path, content, headers


def check_reply(status: int, headers: Mapping[str, str], text: str, context: object) -> None:
    """No fault of the server's own: 503 says when to come back, and every error says what is wrong."""
    assert status < 500 or (status == 503 and "retry-after" in headers), (context, status, text[:500])
    if status >= 400:
        error = json.loads(text)["error"]
        assert error["message"] if isinstance(error, dict) else error, context
        assert "Traceback" not in text, context


def wait_until_free(service: Service, seconds: float) -> None:
    """An answer may arrive a moment before its stream is taken off the engine's list."""
    deadline = time.monotonic() + seconds
    while service.engine.running or service.engine.waiting:
        assert time.monotonic() < deadline, "work goes on for clients that were answered or have left"
        time.sleep(0.001)


@workload(15, "requests with wrong, strange, huge, deep and damaged bodies and headers", unit="requests",
          quick=300, soak=10_000, idle=["status 200"])  # fmt: skip
def strange_requests(folder: Path) -> Iterator[Trial]:
    with client_of(folder) as (client, service):

        def trial(seed: int) -> str:
            path, content, headers = random_request(random.Random(seed))
            reply = client.post(path, content=content, headers=headers)
            check_reply(reply.status_code, reply.headers, reply.text, (seed, content[:300]))
            wait_until_free(service, 20)
            return f"status {reply.status_code}"

        yield trial


@workload(15, "ten times as many clients as the server takes, of which a third leaves in the midst of an answer",
          unit="crowds", quick=1, soak=50, idle=["status 200"])  # fmt: skip
def crowds(folder: Path) -> Iterator[Trial]:
    clients = 10 * (STREAMS + QUEUE)
    with socket_of(folder, max_tokens=200) as (port, service), ThreadPoolExecutor(clients) as pool:

        def ask(rng: random.Random) -> str:
            leaves = rng.random() < 1 / 3
            body = {
                "model": "tiny",
                "prompt": "a",
                "stream": leaves,
                "max_tokens": 200 if leaves else rng.randint(1, 20),
            }
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", PATHS[0], json.dumps(body), {"Content-Type": "application/json"})
                reply = connection.getresponse()
                if leaves and reply.status == 200:
                    reply.read(rng.randint(0, 500))
                    return "left"
                headers = {name.lower(): value for name, value in reply.getheaders()}
                check_reply(reply.status, headers, reply.read().decode(), body)
                return f"status {reply.status}"

        def trial(seed: int) -> dict[str, int]:
            outcomes = list(pool.map(ask, [random.Random(f"{seed} {index}") for index in range(clients)]))
            wait_until_free(service, 20)
            assert ask(random.Random(2)) == "status 200"  # and it serves as before
            return {outcome: outcomes.count(outcome) for outcome in set(outcomes)}

        yield trial


SCHEMA_CASES = 850


@workload(15, f"schemathesis, {SCHEMA_CASES} requests to each operation, valid and invalid, with all its checks",
          unit="runs", quick=0, soak=1)  # fmt: skip
def generated_requests(folder: Path) -> Iterator[Trial]:
    def trial(seed: int) -> dict[str, int]:
        environment = {**os.environ, "MM_REC_SCHEMA_CASES": str(SCHEMA_CASES)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/serve/test_schema.py"]
        command += ["--timeout", "3000", "-k", "requests"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:]
        passed = int(result.stdout.rpartition(" passed")[0].split()[-1])
        return {"operations, valid or invalid, without a finding": passed}

    yield trial


# --- control tokens -------------------------------------------------------------------------------------------------

PIECES = (
    *CONTROL_TOKENS, "<", "|", ">", "<|", "|>", "< |", "end", "bos", "<|bo<|eos|>s|>", "<|<|end|>end|>", "<|END|>",
    "<|end|", "\x00", "\ufffd", "\u200b", "\r\n", "\n\n", "\t", "  ", "ışğü", "漢字", "🙂", "<\u200b|end|>",
    "\uff5cend\uff5c",
    "{{ messages }}", "{% generation %}", "<s>", "</s>", "[INST]", "&lt;|end|&gt;", "\\u003c|end|\\u003e", "user", "a",
)  # fmt: skip
BATCH = 1000


@workload(17, "strings of whole, split and nested control tokens, as text, messages and fine-tuning rows",
          unit=f"batches of {BATCH:,} strings", quick=3, soak=100)  # fmt: skip
def control_tokens_in_text(folder: Path) -> Iterator[Trial]:
    one = tokenizer()
    control = set(one.control_ids.values())
    roles = ("system", "user", "assistant")

    def nasty(rng: random.Random) -> str:
        return "".join(rng.choices(PIECES, k=rng.randrange(9)))

    def trial(seed: int) -> dict[str, int]:
        for index in range(BATCH):
            rng = random.Random(f"{seed} {index}")
            text = nasty(rng)
            assert control.isdisjoint(one.encode(text)), ascii(text)
            messages = [Message(rng.choice(roles), nasty(rng)) for _ in range(rng.randint(1, 3))]
            ids, _ = encode_conversation(one, messages)
            structure = sum(2 for _ in messages) + 1  # the beginning, and a role and an end for each
            assert sum(token in control for token in ids) == structure, ascii(messages)
            for role in (text, f"user{text}"):
                if role in roles:
                    continue
                try:
                    encode_conversation(one, [Message(role, "hi")])
                except ValueError:
                    continue
                raise AssertionError(f"role {role!r} was taken")
            assert not any(token in clean(text) for token in CONTROL_TOKENS), ascii(text)
            said = [text, nasty(rng) + "."]
            if any("\0" in content for content in said):
                continue  # no file of conversations may hold it
            row = {"messages": [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]}
            document = encode_document(one, parse_conversation(row))
            assert sum(token in control for token in document.tokens) == 5, ascii(row)
        return {"strings without a control id": BATCH}

    yield trial
