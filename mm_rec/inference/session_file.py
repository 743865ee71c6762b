"""The file of a chat session: tensors and settings in one safetensors file that is read only if it is whole.

The file carries the SHA-256 of itself, computed with zeros in the digest's place, so that a change of any bit shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS, check_version
from mm_rec.model import MMRecModel
from mm_rec.regular_file import read_regular
from mm_rec.state import ModelState, flatten_state, unflatten_state
from mm_rec.storage.files import DamageError, format_bytes, write_atomic
from mm_rec.storage.lock import Lock, owner_of

__all__ = [
    "Conversation", "UnreadableError", "fingerprint", "most_bytes", "not_a_session", "own", "read", "restore", "write",
]  # fmt: skip

_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_DIGEST = "0" * 64
_MORE_BYTES = 1 << 20
"""What a session may hold beside the state: settings, a system message, the names of its tensors."""
_MAX_COUNT = 1 << 48
"""Far above the tokens and turns of any session."""


class UnreadableError(UserError):
    """The system does not give the file at this moment; nothing is said about what is in it."""


class Conversation(NamedTuple):
    """What the tensors of a session say: the model's state of one row, the random generator, the answers so far."""

    state: ModelState
    generator: torch.Generator
    turns: int


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
        raise UserError(
            "{parent} is in use by {owner}, so are its sessions; end it first, or use another file",
            parent=path.parent,
            owner=owner,
        )
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


def most_bytes(model: MMRecModel) -> int:
    """Returns more bytes than any session of ``model`` has, of whatever precision."""
    with torch.inference_mode():
        state = sum(tensor.nbytes for tensor in flatten_state(model.initial_state(1)).values())
    return 2 * state + _MORE_BYTES


def read(path: Path, most: int = 1 << 30) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and settings of a session file.

    Args:
        path: the file.
        most: bytes of a file that is read into memory; see :func:`most_bytes`.

    Raises:
        UnreadableError: if it cannot be read.
        FormatError: if it was written in another version of the format.
        DamageError: if it is not, bit for bit, what :func:`write` wrote.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise DamageError(
                "{path} has {size}, more than any session of this model; use another copy or start a new one",
                path=path,
                size=format_bytes(size),
            )
        content = read_regular(path)
    except OSError as error:
        raise UnreadableError(
            "cannot read the session {path}: {reason}", path=path, reason=error.strerror or error
        ) from error
    found = _DIGEST.search(content)
    if found is None or hashlib.sha256(_with_digest(content, _NO_DIGEST)).hexdigest().encode() != found[1]:
        raise DamageError(
            "{path} is not a chat session, or it is damaged; use another copy or start a new one", path=path
        )
    try:  # whoever can compute the digest may have written anything
        header_bytes = int.from_bytes(content[:8], "little")
        settings = dict(json.loads(json.loads(content[8 : 8 + header_bytes])["__metadata__"]["settings"]))
        version = settings.pop(KEY, None)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise not_a_session(path) from error
    check_version("session", version, path)
    try:
        return load(content), settings
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise not_a_session(path) from error


def _is_possible(name: str, tensor: Tensor) -> bool:
    if name.endswith(".kept_score"):
        return bool((tensor <= 0).all())
    return bool(tensor.isfinite().all())


def restore(path: Path, tensors: dict[str, Tensor], model: MMRecModel, domain: str | None) -> Conversation:
    """Returns the conversation that the ``tensors`` of the session file ``path`` hold, on the model's device.

    The file may be forged: names, shapes and types have to be those of a state of one row, and its numbers finite, but
    for the score of an empty slot.

    Raises:
        DamageError: if they are not.
    """
    rest = dict(tensors)
    generator, turns = torch.Generator(), rest.pop("turns", None)
    try:
        generator.set_state(rest.pop("generator"))
        if rest["position"].shape != (1,):  # of many rows the comparison itself would take all memory
            raise ValueError("not one row")
        expected = flatten_state(model.initial_state(1, domain))
        wrong = [name for name, tensor in expected.items() if rest[name].dtype != tensor.dtype]
        wrong += [name for name, tensor in rest.items() if not _is_possible(name, tensor)]
        if wrong or rest.keys() != expected.keys():
            raise ValueError("not a state of this model")
        device = model.embedding.weight.device
        state = unflatten_state({name: tensor.to(device) for name, tensor in rest.items()}, model.config)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise not_a_session(path) from error
    counts = (state.position[0], turns)
    if not all(
        isinstance(count, Tensor) and count.shape == () and count.dtype == torch.int64 and 0 <= count < _MAX_COUNT
        for count in counts
    ):
        raise not_a_session(path)
    assert turns is not None
    return Conversation(state, generator, int(turns))


def not_a_session(path: Path) -> DamageError:
    """Returns the error of a file whose digest is right and whose content is not."""
    return DamageError(
        "{path} is whole, but no chat session of this model; start a new one under another name", path=path
    )


def _with_digest(content: bytes, digest: str) -> bytes:
    """Returns ``content``, which has a digest, with another digest in its place."""
    place = _DIGEST.search(content)
    assert place is not None
    return content[: place.start(1)] + digest.encode() + content[place.end(1) :]
