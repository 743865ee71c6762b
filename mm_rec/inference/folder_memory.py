"""A folder of documents, read once into the state that a conversation begins from.

Nothing is trained. What the model remembers of the documents has the fixed size of its state. It is kept in a file
under ``~/.cache/mm_rec/memory``, named by the hash of model and documents, and so the documents are read once. The file
is that of a chat session in which nothing was said yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mm_rec.data.documents.account import table_of
from mm_rec.data.documents.folder import Found, find_documents
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions
from mm_rec.data.manifest import hash_files
from mm_rec.errors import UserError
from mm_rec.formats import VERSIONS
from mm_rec.inference import session_file
from mm_rec.inference.generate import BETWEEN_DOCUMENTS, read_prompt
from mm_rec.inference.loading import Loaded
from mm_rec.inference.sampling import Sampling
from mm_rec.machine.autotune import cache_file
from mm_rec.state import ModelState, flatten_state
from mm_rec.storage.files import StorageError, format_bytes, reporting_errors
from mm_rec.translation import Translatable

__all__ = ["FolderMemory", "read_folder"]

ROUTED_CHARACTERS = 8000
"""Of the first documents, by which the expert that reads them all is chosen."""
PROGRESS_SECONDS = 10.0


class FolderMemory(NamedTuple):
    """What a model remembers of a folder.

    Attributes:
        state: of one row, after all documents.
        domain: the expert that has read them, and has to go on; None for all, fused.
        file: where it is kept.
    """

    state: ModelState
    domain: str | None
    file: Path

    @property
    def n_tokens(self) -> int:
        """The number of tokens that were read."""
        return int(self.state.position[0])


def read_folder(
    path: Path, loaded: Loaded, domain: str | None = None, tell: Callable[[str], None] = lambda line: None
) -> FolderMemory:
    """Returns what the model remembers after the documents at ``path``: read now, or kept from an earlier time.

    Args:
        path: a document, or a folder of them.
        loaded: the model.
        domain: the expert that reads, ``all`` for all fused; None takes what training reached and, where nothing
            is fused, the expert that reads the first documents in the fewest bits per byte.
        tell: takes lines about what is done.

    Raises:
        UserError: if there are no documents, or no such expert.
    """
    started = time.monotonic()
    found = find_documents(path)
    if not found.paths:
        raise UserError("there are no documents in {path} that can be read", path=path)
    home = path if path.is_dir() else path.parent
    chosen = loaded.choose_domain(domain, _beginning(found) if domain is None and loaded.is_routed else "")
    settings = {
        "tokenizer": loaded.tokenizer.sha256,
        "precision": str(loaded.model.dtype).removeprefix("torch."),
        "model": session_file.fingerprint(loaded.model),
        "domain": chosen,
        "weights": loaded.weights,
        "documents": [VERSIONS["document readers"], hash_files(home, found.paths)],
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    settings["documents"] = name
    file = cache_file().parent / "memory" / f"{name}.safetensors"
    state = _kept(file, settings, loaded, tell)
    how = Translatable("was read before")
    if state is None:
        state = _read(path, found, loaded, chosen, tell)
        _keep(file, state, settings, tell)
        how = Translatable("is read")
    memory = FolderMemory(state, chosen, file)
    tell(
        Translatable(
            "{path} {how}: {count:,} tokens, remembered in {size} by {who}; it took {seconds:.1f} s",
            path=path,
            how=how,
            count=memory.n_tokens,
            size=format_bytes(sum(tensor.nbytes for tensor in flatten_state(state).values())),
            who=Translatable("all experts") if chosen is None else Translatable("the expert {name}", name=chosen),
            seconds=time.monotonic() - started,
        )
    )
    return memory


def _texts(found: Found, tell: Callable[[str], None] | None = None, title: str = "") -> Generator[str, None, None]:
    """The documents; after the last one ``tell`` is told what was left out."""
    with tempfile.TemporaryDirectory() as folder, Parser(Path(folder)) as parser:
        reader = Documents(found.paths, parser, ReadOptions())
        for document in reader.read():
            if document.text.strip():
                yield document.text
        if tell is not None:
            for line in table_of(title, found, reader):
                tell(line)


def _beginning(found: Found) -> str:
    """The beginning of the first documents."""
    text = ""
    with closing(_texts(found)) as texts:
        for one in texts:
            text += one + BETWEEN_DOCUMENTS
            if len(text) >= ROUTED_CHARACTERS:
                break
    return text[:ROUTED_CHARACTERS]


def _read(path: Path, found: Found, loaded: Loaded, domain: str | None, tell: Callable[[str], None]) -> ModelState:
    """The state after all documents, one after the other."""
    tokenizer, told = loaded.tokenizer, time.monotonic()
    state: ModelState | None = None
    for text in _texts(found, tell, str(path)):
        ids = (
            [tokenizer.bos_id, *tokenizer.encode(text)] if state is None else tokenizer.encode(BETWEEN_DOCUMENTS + text)
        )
        _, state = read_prompt(loaded.model, ids, domain, state, donate=True)
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            tell(Translatable("{count:,} tokens so far", count=int(state.position[0])))
    if state is None:
        raise UserError("there is no text in the documents in {path}", path=path)
    return state


def _keep(file: Path, state: ModelState, settings: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Write the memory to its file; where that cannot be, it is only said, and the next time reads again."""
    tensors = flatten_state(state) | {"generator": torch.Generator().get_state(), "turns": torch.tensor(0)}
    more = {"system": "", "sampling": dataclasses.asdict(Sampling())}
    try:
        with reporting_errors(file):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        session_file.write(file, tensors, settings | more)
    except StorageError as error:
        tell(Translatable("the memory is not kept for the next time: {problem}", problem=error))


def _kept(file: Path, settings: dict[str, Any], loaded: Loaded, tell: Callable[[str], None]) -> ModelState | None:
    """The state in a file of :func:`_keep`; None if there is none that can be used."""
    if not file.exists():
        return None
    try:
        tensors, found = session_file.read(file, session_file.most_bytes(loaded.model))
        if any(found.get(key) != value for key, value in settings.items()):
            raise session_file.not_a_session(file)
        return session_file.restore(file, tensors, loaded.model, settings["domain"]).state
    except UserError as error:
        tell(Translatable("{problem}; the documents are read again", problem=error))
        return None
