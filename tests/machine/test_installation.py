"""What is installed beside the package, as doctor tells it."""

from __future__ import annotations

import socket
import threading
import time
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import distribution

import pytest

from mm_rec.machine import installation


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_any_answer_of_the_hub_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        assert installation.reach(installation.hub_address()) is None
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        problem = installation.reach(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
    assert problem is not None
    assert time.monotonic() - start < 60  # and not for ever


@pytest.mark.parametrize("address", ["not an address", "http://127.0.0.1:1", "http://nowhere.invalid"])
def test_what_is_wrong_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    assert installation.reach(address)


def test_extras_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        metadata = Message()

    for name in ("hf", "eval", "json", "dev"):
        Installed.metadata["Provides-Extra"] = name
    needed = {
        "hf": ["no-such-package-of-ours>=5.0", "pytest>=8"],
        "eval": ["pytest[no-such]>=8", "nor-this"],
        "json": [],
    }
    monkeypatch.setattr(
        installation, "distribution", lambda name: Installed() if name == "mm-rec" else distribution(name)
    )
    monkeypatch.setattr(installation, "requirements_of", needed.__getitem__)
    expected = {"hf": ["no-such-package-of-ours>=5.0"], "eval": ["nor-this"], "json": []}
    assert installation.missing_of_extras() == expected


def test_a_missing_compiler_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    assert installation.compilers() == {"C++": None, "CUDA": None}
