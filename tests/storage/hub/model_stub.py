"""A small hub of models on this machine, by the requests that `huggingface_hub` makes to read and to write them.

It adds to the hub of data sets in ``tests/data/hub_stub.py``: repositories of models with several revisions, who may
read and write, the storage of large files (LFS), and commits. Faults are those of that hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from hub_stub import Hub, _Handler

TOKEN = "granted"
LARGE_BYTES = 1000
"""From so many bytes on a file is stored as a large one."""


@dataclass
class Models:
    """A repository of models.

    Attributes:
        history: the files of each commit by path, oldest first; the last one is the main branch.
        tags: names of commits, by their place in the history.
        gated: only who has the token may read the files.
        private: who has no token is told that there is no such repository.
    """

    history: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    tags: dict[str, int] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit_of(self, revision: str) -> str | None:
        """The hash of the commit that a revision names."""
        hashes = [_sha1(repr((place, sorted(files.items())))) for place, files in enumerate(self.history)]
        if revision in hashes:
            return revision
        place = -1 if revision == "main" else self.tags.get(revision)
        return None if place is None else hashes[place]

    def files_of(self, revision: str) -> dict[str, bytes]:
        """The files of a revision that there is."""
        found = [files for place, files in enumerate(self.history) if self._hash(place) == self.commit_of(revision)]
        return found[0]

    def _hash(self, place: int) -> str:
        return _sha1(repr((place, sorted(self.history[place].items()))))


class ModelsHub(Hub):
    """The hub's content: models by owner/name, and the large files that were uploaded, by their SHA-256."""

    def __init__(self, models: dict[str, Models]) -> None:
        super().__init__({})
        self.models = models
        self.objects: dict[str, bytes] = {}
        self.lies: dict[str, bytes] = {}
        """Files by name that are sent in place of what the hub says they are."""


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8", "backslashreplace")).hexdigest()


class ModelsHandler(_Handler):
    hub: ModelsHub

    def do_PUT(self) -> None:  # noqa: N802
        self._answer()

    def _route(self, path: str) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/upload/([0-9a-f]{64})", path):
            self.hub.objects[found[1]] = self.body
            self._send(200, b"", {})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._large_files(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+?))?", path):
            self._api(found[1], found[2] or "revision", found[3] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            self._resolve(found[1], found[2], found[3])
        else:
            self._send(404, b"{}", {})

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _find(self, name: str) -> Models | None:
        found = self.hub.models.get(name)
        if found is None or (found.private and not self._is_known()):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _create(self, wanted: dict[str, str]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self._is_known():
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif wanted["organization"] == "somebody":
            self._send(403, b"{}", {"X-Error-Message": "You don't have the rights to create a model"})
        elif name in self.hub.models:
            self._json({"url": f"{self.hub.url}/{name}"}, 409)
        else:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.models[name] = Models(private=private)
            self._json({"url": f"{self.hub.url}/{name}"})

    def _api(self, name: str, verb: str, revision: str) -> None:
        repository = self._find(name)
        if repository is None:
            return
        if verb == "preupload":
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["size"] >= LARGE_BYTES else "regular",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            self._json({"files": modes})
            return
        if verb == "commit":
            self._commit(name, repository)
            return
        revision = revision.partition("/")[0]
        commit = repository.commit_of(revision)
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = repository.files_of(commit)
        if verb == "tree":
            self._json([{"type": "file", **_entry("path", path, content)} for path, content in files.items()])
            return
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [
            _entry("rfilename", path, content) if blobs else {"rfilename": path} for path, content in files.items()
        ]
        self._json(
            {
                "id": name,
                "sha": commit,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._find(name)
        if repository is None:
            return
        if repository.gated and not self._is_known():
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted."})
            return
        commit = repository.commit_of(revision)
        content = repository.files_of(commit).get(path) if commit else None
        if commit is None or content is None:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            self._send(404, b"{}", {"X-Error-Code": code})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_tag(content)}"', "Content-Type": "application/octet-stream"}
        self._send(200, self.hub.lies.get(path, content), headers)

    def _large_files(self, name: str) -> None:
        wanted = json.loads(self.body)["objects"]
        answers = []
        for one in wanted:
            there = one["oid"] in self.hub.objects
            actions = {"actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}}
            answers.append(
                {"oid": one["oid"], "size": one["size"], "authenticated": True, **({} if there else actions)}
            )
        self._json({"transfer": "basic", "objects": answers})

    def _commit(self, name: str, repository: Models) -> None:
        if not self._is_known():
            self._send(403, b"{}", {"X-Error-Message": "no right to write"})
            return
        files = dict(repository.history[-1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.history.append(files)
        commit = repository.commit_of("main")
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})


def _tag(content: bytes) -> str:
    """The tag of a file: the SHA-256 of a large one, the hash that git has of another."""
    if len(content) >= LARGE_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(key: str, path: str, content: bytes) -> dict[str, object]:
    large = {"lfs": {"sha256": _tag(content), "oid": _tag(content), "size": len(content), "pointerSize": 130}}
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {key: path, "oid": blob, "blobId": blob, "size": len(content)}
    return entry | (large if len(content) >= LARGE_BYTES else {})
