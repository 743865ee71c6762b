"""Keeps conversations between requests, each in one file of constant size.

A request either comes to its end, and the memory after it replaces the one before, or leaves no trace.
The files are those of ``mm-rec chat``, which can continue them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mm_rec import system
from mm_rec.errors import UserError
from mm_rec.formats import FormatError
from mm_rec.inference import session_file
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.serve.errors import ApiError
from mm_rec.state import ModelState, flatten_state
from mm_rec.storage import files
from mm_rec.storage.lock import Lock
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["Memory", "SessionStore"]

_log = logging.getLogger("mm_rec.serve")

# Lower-case ASCII alone: no two names are one file on any file system, and none leads out of the folder.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Memory:
    """The saved memory of a conversation: the state of one row and the number of answers so far."""

    state: ModelState
    turns: int

    @property
    def tokens(self) -> int:
        """The number of tokens of the conversation, of both sides."""
        return int(self.state.position[0])


class SessionStore:
    """The sessions in a folder, which belongs to one server at a time.

    Args:
        folder: made if missing, readable for its owner alone.
        model, tokenizer, domain: what a session must have been made with.
        fingerprint: the model's, from ``session_file.fingerprint``.
        max_sessions: files to keep at most.
        any_domain: go on with sessions of every expert, each by its own.

    Raises:
        UserError: if another server has the folder.
        StorageError: if it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        model: MMRecModel,
        tokenizer: Tokenizer,
        domain: str | None,
        *,
        fingerprint: str,
        max_sessions: int = 1000,
        any_domain: bool = False,
    ) -> None:
        with files.reporting_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder.resolve()
        self._lock = Lock(self._folder / ".lock")
        files.remove_leftovers(self._folder)
        self._model = model
        self._domain = domain
        self._any_domain = any_domain
        self._most_bytes = session_file.most_bytes(model)
        self._max_sessions = max_sessions
        self._identity = {
            "tokenizer": tokenizer.sha256,
            "precision": str(model.dtype).removeprefix("torch."),
            "model": fingerprint,
            "domain": domain,
        }
        self._busy: set[str] = set()

    def close(self) -> None:
        """Releases the folder for other servers."""
        self._lock.release()

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Reserves a session for the length of a request.

        Raises:
            ApiError: 400 if it is not a name, 409 if another request or program has it, 503 if the disk is full.
        """
        problem = "a session is named by 1 to 64 of a-z, 0-9, - and _, a letter or digit first"
        if _NAME.fullmatch(name):
            problem = system.name_problem(f"{name}{_SUFFIX}") or ""
        if problem:
            raise ApiError(400, problem, param="session", code="invalid_session")
        if name in self._busy:
            raise ApiError(409, f"another request is using session {name}", param="session", code="session_busy")
        try:
            lock = session_file.own(self._folder / f"{name}{_SUFFIX}", in_own_folder=True)
        except files.StorageError as error:
            _log.error("session %s: %s", name, error)
            raise ApiError.busy("the session cannot be used now; the server's log says why") from error
        except UserError as error:
            _log.warning("%s", error)
            message = f"another program is using session {name}"
            raise ApiError(409, message, param="session", code="session_busy") from error
        self._busy.add(name)
        try:
            yield
        finally:
            self._busy.discard(name)
            lock.release()

    def load(self, name: str) -> Memory | None:
        """Returns the memory of a session; None if there is no session of that name.

        Raises:
            ApiError: 409 if the file cannot be used, 503 if the system does not give it at this moment.
        """
        path = self._path(name)
        if path is None:
            return None
        try:
            tensors, settings = session_file.read(path, self._most_bytes)
            domain = settings.get("domain", self._domain)
            possible = [*self._model.config.experts, None] if self._any_domain else [self._domain]
            wanted = self._identity | {"domain": domain if domain in possible else self._domain}
            other = [key for key, value in wanted.items() if settings.get(key, value) != value]
            if other:
                raise _unusable(f"session {name} was made with another {other[0]}")
            conversation = session_file.restore(path, tensors, self._model, domain)
        except session_file.UnreadableError as error:
            _log.error("session %s: %s", name, error)
            raise ApiError.busy("the session could not be read; the server's log says why") from error
        except FormatError as error:
            _log.warning("session %s: %s", name, error)
            raise _unusable(f"session {name} was written by another version of MM-Rec") from error
        except UserError as error:
            _log.warning("session %s: %s", name, error)
            raise _unusable(f"the file of session {name} is damaged") from error
        return Memory(conversation.state, conversation.turns)

    def save(self, name: str, memory: Memory) -> None:
        """Replaces the memory of a session.

        Raises:
            ApiError: 429 if there are too many sessions, 503 if the disk does not take it.
        """
        if self._path(name) is None and self._count() >= self._max_sessions:
            raise ApiError(
                429,
                f"there are {self._max_sessions} sessions already, as many as this server keeps; go on with one",
                code="session_limit_reached",
            )
        tensors = flatten_state(memory.state)
        tensors |= {"generator": torch.Generator().get_state(), "turns": torch.tensor(memory.turns)}
        settings = {"system": "", "sampling": dataclasses.asdict(Sampling())}
        experts = list(memory.state.experts)
        if len(experts) < len(self._model.config.experts):
            settings["domain"] = experts[0]
        try:
            session_file.write(self._folder / f"{name}{_SUFFIX}", tensors, self._identity | settings)
        except files.StorageError as error:
            _log.error("session %s: %s", name, error)
            raise ApiError.busy("the session could not be saved; the server's log says why") from error

    def size(self, name: str) -> int:
        """Returns the size of a session's file in bytes."""
        path = self._path(name)
        return 0 if path is None else path.lstat().st_size

    def remove(self, name: str) -> bool:
        """Deletes a session; returns False if there is none of that name."""
        path = self._path(name)
        if path is None:
            return False
        path.unlink()
        system.sync(self._folder)
        return True

    def _path(self, name: str) -> Path | None:
        """Returns the file of a session, None if there is none.

        Raises:
            ApiError: 409 if something else stands in its place, such as a link to a file elsewhere.
        """
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise _unusable(f"session {name} is not a file of its own")
        return path

    def _count(self) -> int:
        return sum(entry.name.endswith(_SUFFIX) for entry in os.scandir(self._folder))


def _unusable(reason: str) -> ApiError:
    return ApiError(409, f"{reason}; start a new one under another name", param="session", code="session_unusable")
