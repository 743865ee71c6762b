"""The file of a chat session: tensors and settings in one safetensors file that is read only if it is whole.

The file carries the SHA-256 of itself, computed with zeros in the digest's place, so that a change of any bit shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS, check_version
from mm_rec.model import MMRecModel
from mm_rec.storage.files import DamageError, write_atomic
from mm_rec.storage.lock import Lock, owner_of

__all__ = ["fingerprint", "own", "read", "write"]

_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_DIGEST = "0" * 64
_MAX_BYTES = 1 << 30
"""Far above the size of any session; a larger file is not read into memory."""


def fingerprint(model: MMRecModel) -> str:
    """Returns the SHA-256 of a model's shape and weights as they are in memory, precision included."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own(path: Path, *, in_own_folder: bool = False) -> Lock:
    """Own the session file ``path``, which need not exist yet, so that nobody else continues or replaces it.

    Args:
        path: the file.
        in_own_folder: its folder is owned by this process, as by a server.

    Raises:
        UserError: if another process owns it, or its folder.
    """
    path = path.resolve()
    if not in_own_folder and (owner := owner_of(path.parent / ".lock")):
        raise UserError(f"{path.parent} is in use by {owner}, so are its sessions; end it first, or use another file")
    return Lock(path.with_name(f".{path.name}.lock"), of=path)


def write(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Writes ``tensors`` and ``settings``, which JSON can hold, to ``path``: whole or not at all.

    Raises:
        StorageError: if the disk is full, broken or not writable.
    """
    blank = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"sha256": _NO_DIGEST, "settings": json.dumps({KEY: VERSIONS["session"], **settings}, sort_keys=True)},
    )
    write_atomic(path, _with_digest(blank, hashlib.sha256(blank).hexdigest()))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and settings of a session file.

    Raises:
        UserError: if it cannot be read.
        FormatError: if it was written in another version of the format.
        DamageError: if it is not, bit for bit, what :func:`write` wrote.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= _MAX_BYTES else b""
    except OSError as error:
        raise UserError(f"cannot read the session {path}: {error.strerror or error}") from error
    found = _DIGEST.search(content)
    if found is None or hashlib.sha256(_with_digest(content, _NO_DIGEST)).hexdigest().encode() != found[1]:
        raise DamageError(f"{path} is not a chat session, or it is damaged; use another copy or start a new one")
    header_bytes = int.from_bytes(content[:8], "little")
    settings: dict[str, Any] = json.loads(json.loads(content[8 : 8 + header_bytes])["__metadata__"]["settings"])
    check_version("session", settings.pop(KEY, None), path)
    return load(content), settings


def _with_digest(content: bytes, digest: str) -> bytes:
    """Returns ``content``, which has a digest, with another digest in its place."""
    place = _DIGEST.search(content)
    assert place is not None
    return content[: place.start(1)] + digest.encode() + content[place.end(1) :]
