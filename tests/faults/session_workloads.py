"""Row 16: names of sessions that try to get out of their folder, and sessions that are killed in a save."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import talking
from serving_workloads import HOST, client_of
from supervisor import CHANGING, Supervisor, can_trace
from workload import Complete, Impossible, Trial, workload

FRAGMENTS = (
    "..", "/", "\\", "\0", "%2e%2e%2f", "%00", ".", "a", "Z", "con", "nul", "~", "$HOME", "*", "link", "folder", "pipe",
    "ü", "\u0061\u0308", "\u202e", "\uff0e\uff0e", "\u2215", "\n", " ", "-", "_", ".safetensors", ".lock", ".tmp-",
    "x" * 64, "y" * 255, "session",
)  # fmt: skip


@workload(16, "session names with traversal, NUL, Unicode, upper case, links and special files", unit="names",
          quick=100, soak=5000, idle=["a good name: made, found, deleted"])  # fmt: skip
def hostile_session_names(folder: Path) -> Iterator[Trial]:
    outside = folder / "outside"
    outside.mkdir()
    secret = outside / "secret.safetensors"
    secret.write_bytes(b"not yours")
    with client_of(folder, max_sessions=10_000) as (client, _):
        sessions = folder / "sessions"
        (sessions / "link.safetensors").symlink_to(secret)
        (sessions / "folder.safetensors").mkdir()
        (sessions / "dangling.safetensors").symlink_to(outside / "new.safetensors")
        known = {path.name for path in sessions.iterdir()}

        def trial(seed: int) -> str:
            rng = random.Random(seed)
            name = "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 4)))
            if rng.random() < 0.1:
                name = rng.choice(["link", "folder", "dangling"])
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "session": name}
            replies = [client.post("/v1/chat/completions", json=body, headers=HOST)]
            url = f"/v1/sessions/{quote(name, safe='')}"
            replies += [client.get(url, headers=HOST), client.delete(url, headers=HOST)]
            statuses = [reply.status_code for reply in replies]
            assert all(status < 500 for status in statuses), (name, statuses)
            assert [path.name for path in outside.iterdir()] == ["secret.safetensors"], name
            assert secret.read_bytes() == b"not yours", name
            assert {path.name for path in sessions.iterdir()} == known, name  # what was made was deleted again
            assert not [path for path in folder.iterdir() if path.name not in ("outside", "sessions")], name
            if statuses[0] == 200:
                assert statuses[1:] == [200, 200], (name, statuses)
                return "a good name: made, found, deleted"
            return f"refused with {statuses[0]}"

        yield trial


@workload(16, "kill -9 at every system call of a chat turn that saves its session", unit="system calls",
          quick=4, soak=1000)  # fmt: skip
def session_killed_at_every_call(folder: Path) -> Iterator[Trial]:
    if reason := can_trace():
        raise Impossible(reason)
    supervisor = Supervisor(folder)
    path = folder / "session.safetensors"
    first = supervisor.run("talking.turn", path=str(path), text=talking.TEXTS[0])
    assert first.status == 0, first.log
    before = path.read_bytes()
    traced = supervisor.run("talking.turn", inject=CHANGING, path=str(path), text=talking.TEXTS[1])
    assert traced.status == 0, traced.log
    after, answer = path.read_bytes(), traced.log
    assert before != after
    calls = traced.calls()
    random.Random(0).shuffle(calls)

    def trial(seed: int) -> str:
        if seed >= len(calls):
            raise Complete
        name, k = calls[seed]
        shutil.rmtree(folder / "killed", ignore_errors=True)
        (folder / "killed").mkdir()
        killed = folder / "killed" / path.name
        killed.write_bytes(before)
        inject = f"{name}:signal=SIGKILL:when={k}"
        child = supervisor.run("talking.turn", inject=inject, path=str(killed), text=talking.TEXTS[1])
        assert child.status == -9, (inject, child.log)
        if killed.read_bytes() == after:
            return "the turn was saved whole"
        assert killed.read_bytes() == before, inject
        again = supervisor.run("talking.turn", path=str(killed), text=talking.TEXTS[1])
        assert again.status == 0, again.log
        assert again.log == answer, inject
        assert killed.read_bytes() == after, inject
        return "the turn was not saved; said again it came out bitwise the same"

    yield trial
