"""Work for the supervisor: owning a run, a session, prepared data or downloads until a file appears."""

from __future__ import annotations

import time
from pathlib import Path

import talking
from saving import IDENTITY

from mm_rec.data.prepare import prepare
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.session_file import own
from mm_rec.model import MMRecModel
from mm_rec.storage.lock import Lock
from mm_rec.storage.resume import open_run

SECONDS = 60.0


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


def run(root: str, until: str) -> None:
    """Own a run and log a step at the end."""
    with open_run(Path(root), "stage1", IDENTITY) as folder:
        print(f"owner of {folder.path}", flush=True)
        wait_for(Path(until))
        folder.log_loss(1, 1.0)


def chat(root: str, until: str) -> None:
    """Say something in the session ``talk``, and once more at the end; save it after both."""
    path = Path(root) / "talk.safetensors"
    with own(path) as owned:
        session = ChatSession.load(path, MMRecModel(talking.CONFIG, seed=0), talking.TOKENIZER)
        for text in talking.TEXTS:
            list(session.reply(text))
            session.save(path, owned=owned)
            if text == talking.TEXTS[0]:
                print(f"owner of {path}", flush=True)
                wait_for(Path(until))


def folder(root: str, until: str) -> None:
    """Own a folder as a server owns its sessions and a download its data."""
    with Lock(Path(root) / ".lock"):
        print(f"owner of {root}", flush=True)
        wait_for(Path(until))


def preparation(root: str, until: str) -> None:
    """Own the prepared data of a data folder."""
    (Path(root) / "prepared").mkdir()
    with Lock(Path(root) / "prepared" / "lock"):
        print(f"owner of {root}", flush=True)
        wait_for(Path(until))


def prepare_too(root: str) -> None:
    """Prepare the data in a folder."""
    prepare(Path(root), 320, filters=False, progress=lambda line: print(line, flush=True))
