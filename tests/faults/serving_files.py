"""Work for the supervisor: a server whose model's files are changed in place while it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from changing import CHANGES
from fastapi.testclient import TestClient
from workload import refusal

from mm_rec.errors import UserError
from mm_rec.inference.loading import load_model
from mm_rec.inference.session_file import fingerprint
from mm_rec.serve.app import Service, create_app
from mm_rec.serve.engine import Engine
from mm_rec.serve.sessions import SessionStore

BODY = {"model": "tiny", "prompt": "a small ", "max_tokens": 12, "temperature": 1.0, "seed": 5}
HEADERS = {"Host": "localhost"}


def serve(root: str, checkpoint: str, name: str, kind: str, precision: str, weights: str) -> None:
    """Serve ``checkpoint``, change its file ``name`` and assert that answers and weights stay what they were."""
    torch.set_num_threads(1)
    path = Path(checkpoint)
    loaded = load_model(path, device="cpu", precision=precision, weights=weights)
    model, tokenizer, identity = loaded.model, loaded.tokenizer, fingerprint(loaded.model)
    service = Service(
        name="tiny",
        engine=Engine(model, tokenizer, loaded.domain),
        sessions=SessionStore(Path(root) / "sessions", model, tokenizer, loaded.domain, fingerprint=identity),
        fingerprint=identity,
    )
    with TestClient(create_app(service), base_url="http://localhost") as client:
        before = [answer(client), talk(client, "first")]
        CHANGES[kind](path / name)
        assert [answer(client), talk(client, "second")] == before, "other answers after the change"
        assert fingerprint(model) == identity, "other weights under the old fingerprint"
    refusal(UserError, lambda: load_model(path, device="cpu"), (name, kind))
    print("the same answers and weights")


def answer(client: TestClient) -> Any:
    reply = client.post("/v1/completions", json=BODY, headers=HEADERS)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def talk(client: TestClient, session: str) -> Any:
    messages = [{"role": "user", "content": "and then?"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "seed": 5, "session": session}
    reply = client.post("/v1/chat/completions", json=body, headers=HEADERS)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]
