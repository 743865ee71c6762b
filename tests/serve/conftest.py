"""A tiny random model behind the application, and behind a real socket."""

import contextlib
import inspect
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from mm_rec.config import ModelConfig
from mm_rec.inference.session_file import fingerprint
from mm_rec.model import MMRecModel
from mm_rec.serve.app import create_app
from mm_rec.serve.connections import Connections
from mm_rec.serve.engine import Engine
from mm_rec.serve.server import Server
from mm_rec.serve.service import Service
from mm_rec.serve.sessions import SessionStore
from mm_rec.text.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer

CONFIG = ModelConfig(vocab_size=512, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([inspect.getsource(random), "ışık çiğ öğüt şeker " * 20, " ".join(CONTROL_TOKENS) * 20], 512)


@pytest.fixture(scope="session")
def model() -> MMRecModel:
    torch.set_num_threads(1)
    model = MMRecModel(CONFIG, seed=3).eval()
    with torch.no_grad():  # far from uniform, so that wrong logits give another text
        model.embedding.weight.mul_(15)
    return model


# What the fixtures give.
MakeService = Callable[..., Service]


@pytest.fixture
def make_service(model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[MakeService]:
    """A service; keywords go to the engine, the store or the service, whichever knows them."""
    stores = []

    def make(
        *,
        max_streams: int = 8,
        max_queue: int = 16,
        max_sessions: int = 50,
        folder: str = "sessions",
        choose: Callable[[Sequence[int]], str] | None = None,
        **limits: float,
    ) -> Service:
        domain = None if choose is None else "text"
        engine = Engine(model, tokenizer, domain, choose=choose, max_streams=max_streams, max_queue=max_queue)
        identity = fingerprint(model)
        store = SessionStore(
            *(tmp_path / folder, model, tokenizer, domain),
            fingerprint=identity, max_sessions=max_sessions, any_domain=choose is not None,
        )  # fmt: skip
        stores.append(store)
        return Service(name="tiny", engine=engine, sessions=store, fingerprint=identity, **limits)  # type: ignore[arg-type]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def service(make_service: MakeService) -> Service:
    return make_service()


@pytest.fixture
def connect() -> Callable[..., TestClient]:
    """A client of an application in this process."""

    def connect(service: Service, **keywords: object) -> TestClient:
        app = create_app(service, **keywords)  # type: ignore[arg-type]
        return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)

    return connect


@pytest.fixture
def client(service: Service, connect: Callable[..., TestClient]) -> Iterator[TestClient]:
    with connect(service) as client:
        yield client


@pytest.fixture
def serve() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """The application behind a real socket; gives its address."""

    @contextlib.contextmanager
    def serve(service: Service, max_connections: int = 1000, **keywords: object) -> Iterator[str]:
        connections = Connections(max_connections)
        app = create_app(service, connections=connections, **keywords)  # type: ignore[arg-type]
        server = Server(app, service.engine, connections, quiet=True, drain_seconds=0.2)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # a client that doesn't read is soon noticed
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            listener.close()

    return serve


@pytest.fixture
def address(service: Service, serve: Callable[..., contextlib.AbstractContextManager[str]]) -> Iterator[str]:
    with serve(service) as address:
        yield address


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait_until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.002)

    return wait_until
