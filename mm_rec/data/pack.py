"""Token stores: the documents of one domain and split as one flat array on disk, checked at every read.

A store is a folder:

    tokens.bin      token ids of all documents end to end, uint16 or uint32, little-endian
    loss_mask.bin   uint8 per token, only in fine-tuning data: 1 where the token counts as a target
    offsets.npy     int64 (documents + 1): where each document starts; the last entry is the number of tokens
    n_bytes.npy     int64 (documents): UTF-8 bytes of the text that each document was made of
    index.json      counts, token type, size and SHA-256 of each file above
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_rec.data.blocks import BlockArray
from mm_rec.formats import KEY, VERSIONS, check_version
from mm_rec.regular_file import open_regular, read_regular
from mm_rec.storage.files import DamageError
from mm_rec.translation import Translatable

__all__ = ["STORE_FILES", "Document", "TokenStore", "file_sha256", "write_store"]

STORE_FILES = ("tokens.bin", "loss_mask.bin", "offsets.npy", "n_bytes.npy")
"""Names of the files that the index of a store describes."""


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
    """An open store. ``offsets`` and ``n_bytes`` are in memory, ``tokens`` and ``loss_mask`` are read in blocks.

    Attributes:
        path: the folder.
        tokens: (N,) uint16 or uint32; see :class:`mm_rec.data.blocks.BlockArray`.
        offsets: (documents + 1,) int64.
        n_bytes: (documents,) int64.
        loss_mask: (N,) uint8, or None.
        sha256: of the index, which holds those of all files.
    """

    path: Path
    tokens: BlockArray
    offsets: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    loss_mask: BlockArray | None
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
    def open(cls, path: Path, *, vocab_size: int | None = None, prepared: Path | None = None) -> TokenStore:
        """Open the store in folder ``path`` and compare all of it with the sizes and SHA-256 in its index.

        Args:
            path: the folder.
            vocab_size: what all token ids have to be below; None if that is not known.
            prepared: the folder that the store is a part of, which is made anew as a whole; None for the store alone.

        Raises:
            DamageError: naming the file that is missing or differs.
            FormatError: if the store is of another version; it names what to delete.
        """
        path = Path(path)
        whole = path if prepared is None else prepared
        index_bytes = _read(path / "index.json", path)
        try:
            index = json.loads(index_bytes)
            check_version("token store", index[KEY], whole)
            entries = index["files"]
            if index["dtype"] not in ("uint16", "uint32"):
                raise _broken(
                    path, Translatable("index.json states tokens of type {dtype}", dtype=str(index["dtype"])[:80])
                )
            offsets, n_bytes = (_read_numbers(path / name, entries[name]) for name in ("offsets.npy", "n_bytes.npy"))
            dtype = np.dtype(index["dtype"]).newbyteorder("<")
            tokens = _open_blocks(path / "tokens.bin", dtype, entries["tokens.bin"], whole)
            mask = entries.get("loss_mask.bin")
            mask = mask and _open_blocks(path / "loss_mask.bin", np.dtype(np.uint8), mask, whole)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _broken(
                path, Translatable("index.json: {kind}: {error}", kind=type(error).__name__, error=error)
            ) from None
        fits = len(offsets) == len(n_bytes) + 1 and offsets[0] == 0 and offsets[-1] == len(tokens)
        if not fits or np.diff(offsets).min(initial=1) < 1 or (mask is not None and len(mask) != len(tokens)):
            raise _broken(path, Translatable("its offsets do not fit its tokens"))
        if vocab_size is not None and tokens.largest >= vocab_size:
            raise _broken(
                path,
                Translatable(
                    "it has the token id {largest}, and the vocabulary has {vocab_size}",
                    largest=tokens.largest,
                    vocab_size=vocab_size,
                ),
            )
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
    (path / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n")
    return TokenStore.open(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_blocks(path: Path, dtype: np.dtype[Any], entry: Mapping[str, Any], whole: Path) -> BlockArray:
    return BlockArray(path, dtype, entry["bytes"], entry["sha256"], whole)


def _read_numbers(path: Path, entry: Mapping[str, Any]) -> NDArray[np.int64]:
    """The numbers in a file of NumPy that the index describes."""
    content = _read(path, path.parent)
    if len(content) != entry["bytes"]:
        raise _broken(
            path.parent,
            Translatable(
                "{name} does not have the {size} bytes that its index states", name=path.name, size=entry["bytes"]
            ),
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise _broken(path.parent, Translatable("{name} does not match its SHA-256", name=path.name))
    numbers: NDArray[np.int64] = np.load(io.BytesIO(content), allow_pickle=False)
    if numbers.ndim != 1 or numbers.dtype != np.int64:
        raise _broken(path.parent, Translatable("{name} does not hold a row of int64", name=path.name))
    return numbers


def _read(path: Path, store: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise _broken(store, f"{path.name}: {error.strerror or error}") from None


def _broken(path: Path, why: str) -> DamageError:
    return DamageError("the token store {path} cannot be used: {why}", path=path, why=why)
