"""Reading by a manifest: what is returned is what was hashed, and stays so."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mm_rec.storage import files
from mm_rec.storage.files import DamageError
from mm_rec.storage.reading import read_file, read_tensors

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "number": torch.tensor(7),
    "nothing": torch.empty(0, 5, dtype=torch.int16),
    "flags": torch.tensor([True, False, True]),
    "narrow": torch.arange(5).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "long": torch.arange(3_000_000.0).half(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with files.atomic_folder(tmp_path / "folder") as made:
        save_file(TENSORS, made / "some.safetensors", metadata={"format": "pt"})
        (made / "text").write_text("hello")
    return tmp_path / "folder"


def test_tensors_are_read_as_they_were_written(folder: Path) -> None:
    found = read_tensors(folder / "some.safetensors", files.read_manifest(folder)["some.safetensors"])
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 0), lambda path: path.write_bytes(b"\xff" * 9000)])
def test_what_was_read_does_not_change_with_the_file(folder: Path, change: Callable[[Path], object]) -> None:
    path = folder / "some.safetensors"
    found = read_tensors(path, files.read_manifest(folder)[path.name])
    change(path)
    assert torch.equal(found["long"], TENSORS["long"])
    with pytest.raises(DamageError, match=r"some\.safetensors is damaged"):
        read_tensors(path, {"bytes": path.stat().st_size, "sha256": "0" * 64})


def test_a_file_is_read_by_its_entry(folder: Path) -> None:
    entry = files.read_manifest(folder)["text"]
    assert read_file(folder / "text", entry) == b"hello"
    (folder / "text").write_text("hellO")
    with pytest.raises(DamageError, match="text is damaged"):
        read_file(folder / "text", entry)
    (folder / "text").unlink()
    with pytest.raises(DamageError, match="text cannot be read: No such file"):
        read_file(folder / "text", entry)


def header(**entries: object) -> bytes:
    content = json.dumps(entries).encode()
    return len(content).to_bytes(8, "little") + content


def tensor(kind: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 100,
        header()[:9],
        (2).to_bytes(8, "little") + b"[]",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        header(a=tensor()) + bytes(7),
        header(a=tensor()) + bytes(9),
        header(a=tensor(kind="F31")) + bytes(8),
        header(a=tensor(shape=(-2,))) + bytes(8),
        header(a=tensor(shape=(2.0,))) + bytes(8),
        header(a=tensor(shape=(0, 10**30), offsets=(0, 0))),
        header(a=tensor(shape=(10**12,), offsets=(0, 4 * 10**12))) + bytes(8),
        header(a=tensor(), b=tensor()) + bytes(8),
        header(a=tensor(offsets=(8, 16))) + bytes(16),
        header(a={"dtype": "F32"}) + bytes(8),
        header(a=None),
    ],
)
def test_what_is_no_file_of_tensors_is_refused_before_anything_is_made_of_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(ValueError, match=r"header|tensor|codec"):
        read_tensors(path, entry)
