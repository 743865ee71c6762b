"""Token stores: the documents of one domain and split as one flat array on disk, read through a memory map.

A store is a folder:

    tokens.bin      token ids of all documents end to end, uint16 or uint32, little-endian
    loss_mask.bin   uint8 per token, only in fine-tuning data: 1 where the token counts as a target
    offsets.npy     int64 (documents + 1): where each document starts; the last entry is the number of tokens
    n_bytes.npy     int64 (documents): UTF-8 bytes of the text that each document was made of
    index.json      counts, token type, size and SHA-256 of each file above
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS, check_version

__all__ = ["Document", "TokenStore", "file_sha256", "write_store"]


class Document(NamedTuple):
    """One document as tokens.

    Attributes:
        tokens: ids, BOS first.
        n_bytes: UTF-8 bytes of its text, the denominator of bits per byte.
        loss_mask: for each token whether it counts as a target; None counts all but BOS.
    """

    tokens: Sequence[int]
    n_bytes: int
    loss_mask: Sequence[int] | None = None


@dataclass(frozen=True)
class TokenStore:
    """An open store. The arrays are read-only; ``tokens`` and ``loss_mask`` are memory-mapped.

    Attributes:
        path: the folder.
        tokens: (N,) uint16 or uint32.
        offsets: (documents + 1,) int64.
        n_bytes: (documents,) int64.
        loss_mask: (N,) uint8, or None.
        sha256: of the index, which holds those of all files.
    """

    path: Path
    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    loss_mask: NDArray[np.uint8] | None
    sha256: str

    @property
    def n_documents(self) -> int:
        """How many documents the store holds."""
        return len(self.n_bytes)

    @property
    def n_tokens(self) -> int:
        """How many tokens the store holds, one BOS a document included."""
        return len(self.tokens)

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document, BOS first."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def mask(self, index: int) -> NDArray[np.uint8] | None:
        """The loss mask of one document; None if all tokens count."""
        return None if self.loss_mask is None else self.loss_mask[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> TokenStore:
        """Open the store in folder ``path``.

        Sizes are checked always, SHA-256 of the contents with ``verify``. Raises UserError if anything is missing
        or differs.
        """
        path = Path(path)
        index_bytes = _read(path / "index.json", path)
        try:
            index = json.loads(index_bytes)
            check_version("token store", index[KEY], path)
            for name, entry in index["files"].items():
                if (path / name).stat().st_size != entry["bytes"]:
                    raise _broken(path, f"{name} does not have the {entry['bytes']} bytes that its index states")
                if verify and file_sha256(path / name) != entry["sha256"]:
                    raise _broken(path, f"{name} does not match its SHA-256")
            if index["dtype"] not in ("uint16", "uint32"):
                raise _broken(path, f"its tokens are of type {index['dtype']}")
            offsets = np.load(path / "offsets.npy", allow_pickle=False)
            n_bytes = np.load(path / "n_bytes.npy", allow_pickle=False)
            tokens = np.memmap(path / "tokens.bin", dtype=np.dtype(index["dtype"]).newbyteorder("<"), mode="r")
            mask = np.memmap(path / "loss_mask.bin", np.uint8, "r") if "loss_mask.bin" in index["files"] else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _broken(path, f"{type(error).__name__}: {error}") from None
        if len(offsets) != len(n_bytes) + 1 or offsets[-1] != len(tokens):
            raise _broken(path, "its offsets do not fit its tokens")
        return cls(path, tokens, offsets, n_bytes, mask, hashlib.sha256(index_bytes).hexdigest())


def write_store(path: Path, documents: Iterable[Document], *, vocab_size: int) -> TokenStore:
    """Write ``documents`` in their order as a store into the folder ``path``, which must not exist or be empty.

    Holds one document in memory at a time. The caller makes it atomic by writing into a folder that it then renames.

    Args:
        path: the folder.
        documents: at least one.
        vocab_size: ids are below it; up to 65,536 a token takes two bytes, else four.

    Raises:
        ValueError: if there is no document, or one that is empty, has an id outside the vocabulary or a mask of
            another length; or if some documents have a mask and others none.
    """
    path.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 65_536 else "<u4")
    offsets: list[int] = [0]
    n_bytes: list[int] = []
    masked: bool | None = None
    with (path / "tokens.bin").open("wb") as token_file, (path / "loss_mask.bin").open("wb") as mask_file:
        for document in documents:
            ids = np.asarray(document.tokens, dtype=np.int64)
            if not len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"document {len(n_bytes)} is empty or has an id outside of 0 to {vocab_size - 1}")
            if masked not in (None, document.loss_mask is not None):
                raise ValueError("either all documents have a loss mask or none")
            masked = document.loss_mask is not None
            if document.loss_mask is not None:
                mask = np.asarray(document.loss_mask, dtype=np.uint8)
                if len(mask) != len(ids):
                    raise ValueError(f"document {len(n_bytes)} has {len(ids)} tokens and a mask of {len(mask)}")
                mask_file.write(mask.tobytes())
            token_file.write(ids.astype(dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
            n_bytes.append(document.n_bytes)
    if not n_bytes:
        raise ValueError("a store needs at least one document")
    if not masked:
        (path / "loss_mask.bin").unlink()
    np.save(path / "offsets.npy", np.array(offsets, dtype=np.int64), allow_pickle=False)
    np.save(path / "n_bytes.npy", np.array(n_bytes, dtype=np.int64), allow_pickle=False)
    index = {
        KEY: VERSIONS["token store"],
        "dtype": dtype.name,
        "tokens": offsets[-1],
        "documents": len(n_bytes),
        "bytes": sum(n_bytes),
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(path.iterdir())
            if file.name != "index.json"
        },
    }
    (path / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return TokenStore.open(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, store: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _broken(store, f"{path.name}: {error.strerror or error}") from None


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"the token store {path} cannot be used: {why}; delete it, the next run makes it anew")
