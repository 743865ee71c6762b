"""A small hub on this machine: the requests that `huggingface_hub` and `datasets` make, and faults on demand.

It serves data set repositories from memory, each with one revision. A program for trying commands by hand:

    python tests/data/hub_stub.py FOLDER --port 18091        # FOLDER/OWNER/NAME/... are the repositories
    HF_ENDPOINT=http://127.0.0.1:18091 mm-rec data
"""

import argparse
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """Files by path. With ``gated`` only the holder of the token ``granted`` may read it."""

    files: dict[str, bytes]
    gated: bool = False

    @property
    def revision(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


@dataclass
class Fault:
    """What to do to the next ``times`` requests whose path holds ``match``.

    Attributes:
        match: part of the path.
        times: how many requests.
        skip: how many matching requests to let pass first.
        status: answer with this status instead.
        headers: of that answer.
        cut_after: break the connection after so many bytes of the body.
        flip: change one bit of the byte at this place of the file.
        stall: answer only when the hub is shut down.
    """

    match: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    flip: int | None = None
    stall: bool = False


@dataclass
class Request:
    """A request that was answered: method, path, status and the bytes of the body that were sent."""

    method: str
    path: str
    status: int
    sent: int


class Hub:
    """The server's content and its diary."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.url = ""
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def bytes_sent(self, match: str) -> int:
        """Bytes of bodies sent for paths that hold ``match``."""
        return sum(request.sent for request in self.requests if match in request.path)

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.match in path and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


H = TypeVar("H", bound=Hub)


@contextmanager
def serve(repositories: dict[str, Repository], port: int = 0) -> Iterator[Hub]:
    """A hub of data sets at ``hub.url`` for as long as the context lasts."""
    with serving(Hub(repositories), _Handler, port) as hub:
        yield hub


@contextmanager
def serving(hub: H, handler: type[BaseHTTPRequestHandler], port: int = 0) -> Iterator[H]:
    """``hub`` at ``hub.url``, its requests answered by ``handler``, for as long as the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.fault = self.hub.take_fault(path)
        if self.fault is not None and self.fault.stall:
            self.hub.closing.wait()
        if self.fault is not None and self.fault.status is not None:
            self._send(self.fault.status, b"fault", {"Content-Type": "text/plain", **self.fault.headers})
            return
        self._route(path)

    def _route(self, path: str) -> None:
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        resolve = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        found = api or resolve
        name = found.group(1) if found else ""
        repository = self.hub.repositories.get(name)
        if found is None or repository is None:
            self._send(404 if found is None else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if repository.gated and self.headers.get("Authorization") != "Bearer granted" and not self._is_info(api):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted."})
            return
        if api:
            self._send_api(name, repository, api.group(2), api.group(4) or "")
        else:
            assert resolve is not None
            self._send_file(repository, resolve.group(3))

    @staticmethod
    def _is_info(api: re.Match[str] | None) -> bool:
        return api is not None and api.group(2) in (None, "revision")

    def _send_api(self, name: str, repository: Repository, verb: str | None, path: str) -> None:
        if verb == "tree":
            entries = _entries(repository, path, recursive="recursive" in parse_qs(urlsplit(self.path).query))
        elif verb == "paths-info":
            content_type = self.headers.get("Content-Type", "")
            wanted = json.loads(self.body) if "json" in content_type else parse_qs(self.body.decode())
            entries = [
                entry for entry in _entries(repository, "", recursive=True) if entry["path"] in wanted.get("paths", [])
            ]
        else:
            info = {
                "id": name,
                "sha": repository.revision,
                "private": False,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": file} for file in sorted(repository.files)],
            }
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": repository.revision,
        }
        if self.fault is not None and self.fault.flip is not None:
            changed = bytearray(content)
            changed[self.fault.flip] ^= 1
            content = bytes(changed)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._send(200, content, headers)
            return
        start = int(span.group(1))
        end = min(int(span.group(2) or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        cut = self.fault.cut_after if self.fault is not None else None
        if cut is not None and cut < len(body):
            body = body[:cut]
            self.close_connection = True
        self.hub.requests.append(Request(self.command, self.path, status, len(body)))
        with suppress(ConnectionError):  # the client may be gone
            self.wfile.write(body)


def _entries(repository: Repository, folder: str, *, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for path, content in sorted(repository.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            parent = prefix + "/".join(parts[:depth])
            entries[parent] = {
                "type": "directory",
                "path": parent,
                "oid": hashlib.sha1(parent.encode()).hexdigest(),
                "size": 0,
            }
        if recursive or len(parts) == 1:
            entries[path] = {
                "type": "file",
                "path": path,
                "oid": hashlib.sha1(content).hexdigest(),
                "size": len(content),
            }
    return list(entries.values())


def read_folder(folder: Path) -> dict[str, Repository]:
    """The repositories in FOLDER/OWNER/NAME."""
    return {
        f"{root.parent.name}/{root.name}": Repository(
            {
                file.relative_to(root).as_posix(): file.read_bytes()
                for file in sorted(root.rglob("*"))
                if file.is_file() and ".git" not in file.relative_to(root).parts
            }
        )
        for root in sorted(folder.glob("*/*"))
        if root.is_dir()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=18091)
    arguments = parser.parse_args()
    with serve(read_folder(arguments.folder), arguments.port) as hub:
        print(f"{', '.join(hub.repositories)} at {hub.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
