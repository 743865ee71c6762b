"""Reads files that a manifest names, so that what is returned is the very bytes whose hash was compared.

A file is read once, from its start to its end, into memory of this process. Nothing stays mapped: whatever happens to
the file afterwards, what was read stays what it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mm_rec.regular_file import open_regular
from mm_rec.storage.files import DamageError, Entry

__all__ = ["read_file", "read_tensors"]

_CHUNK = 1 << 22
"""Bytes that are hashed while they are still in the processor's cache."""
_LARGEST_HEADER = 100_000_000
_LARGEST_SIZE = 1 << 40
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_file(path: Path, entry: Entry) -> bytes:
    """Returns the content of ``path``, which ``entry`` of a manifest describes.

    Raises:
        DamageError: if it cannot be read or is not what the manifest says.
    """
    with _Reader(path, entry) as reader:
        content = bytearray(reader.left)
        reader.fill(memoryview(content))
        reader.finish()
    return bytes(content)


def read_tensors(path: Path, entry: Entry) -> dict[str, Tensor]:
    """Returns the tensors of the safetensors file ``path``, which ``entry`` of a manifest describes.

    Each has memory of its own, so that those that are not needed any more are freed one by one.

    Raises:
        DamageError: if it cannot be read or is not what the manifest says.
        ValueError: if it is what the manifest says, and no safetensors file.
    """
    with _Reader(path, entry) as reader:
        try:
            tensors = _tensors(reader)
        except ValueError:
            reader.finish()  # damage is the likelier reason
            raise
        reader.finish()
    return tensors


class _Reader:
    """Reads a file once from its start to its end and hashes what it hands on."""

    def __init__(self, path: Path, entry: Entry) -> None:
        self._path = path
        self._entry = entry
        self._digest = hashlib.sha256()
        try:
            self._file = open_regular(path)
            self.left = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        if self.left != entry["bytes"]:
            self._file.close()
            raise self._damaged()

    def fill(self, target: memoryview) -> None:
        """Fill ``target`` with the bytes that come next, of which there have to be as many."""
        done = 0
        while done < len(target):
            try:
                count = self._file.readinto(target[done : done + _CHUNK])
            except OSError as error:
                raise self._unreadable(error) from error
            if not count:  # cut while it was read
                raise self._damaged()
            self._digest.update(target[done : done + count])
            done += count
        self.left -= done

    def finish(self) -> None:
        """Read what is left and compare the whole with the manifest."""
        rest = memoryview(bytearray(min(self.left, _CHUNK)))
        while self.left:
            self.fill(rest[: self.left])
        if self._digest.hexdigest() != self._entry["sha256"]:
            raise self._damaged()

    def _damaged(self) -> DamageError:
        return DamageError("{path} is damaged: it is not what the manifest says", path=self._path)

    def _unreadable(self, error: OSError) -> DamageError:
        return DamageError("{path} cannot be read: {reason}", path=self._path, reason=error.strerror)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _tensors(reader: _Reader) -> dict[str, Tensor]:
    """The tensors of a safetensors file: a header in JSON, then the values of one tensor after the other."""
    header = _header(reader)
    tensors = {}
    for name, (kind, shape, n_bytes) in header.items():
        tensor = torch.empty(shape, dtype=kind)
        if n_bytes:
            reader.fill(tensor.view(-1).view(torch.uint8).numpy().data)
        tensors[name] = tensor
    if reader.left:
        raise ValueError("it is longer than its header says")
    return tensors


def _header(reader: _Reader) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """Type, shape and bytes of each tensor, in the order in which they lie, compared with the size of the file."""
    if reader.left < 8:
        raise ValueError("it has no header")
    length = bytearray(8)
    reader.fill(memoryview(length))
    n_bytes = int.from_bytes(length, "little")
    if n_bytes > min(reader.left, _LARGEST_HEADER):
        raise ValueError("its header does not fit into it")
    content = bytearray(n_bytes)
    reader.fill(memoryview(content))
    try:
        entries: dict[str, Any] = json.loads(content)
        entries.pop("__metadata__", None)
        ordered = sorted(entries.items(), key=lambda entry: (entry[1]["data_offsets"], entry[0]))
        found, place = {}, 0
        for name, entry in ordered:
            found[name] = _layout(entry, place)
            place += found[name][2]
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is not that of tensors ({type(error).__name__})") from error
    if place != reader.left:
        raise ValueError(f"its tensors take {place} bytes, and there are {reader.left}")
    return found


def _layout(entry: Mapping[str, Any], place: int) -> tuple[torch.dtype, list[int], int]:
    """Type, shape and bytes of the tensor whose values start at ``place``."""
    kind, shape = _TYPES[entry["dtype"]], entry["shape"]
    if not all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in shape):
        raise ValueError(f"a tensor has the shape {str(shape)[:80]}")
    n_bytes = math.prod(shape) * kind.itemsize
    if entry["data_offsets"] != [place, place + n_bytes]:
        raise ValueError("its tensors do not lie one after the other")
    return kind, shape, n_bytes
