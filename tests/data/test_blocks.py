"""Arrays that are read in blocks: the numbers of the file as it was opened, or an error that names it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mm_rec.data import blocks
from mm_rec.data.blocks import BlockArray
from mm_rec.storage.files import DamageError

LENGTH = 50_001


def numbers(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, LENGTH).astype(dtype)


def opened(path: Path, dtype: str) -> BlockArray:
    content = path.read_bytes()
    return BlockArray(path, np.dtype(dtype), len(content), hashlib.sha256(content).hexdigest(), path.parent.parent)


@pytest.fixture(params=["<u2", "<u4", "u1"])
def array(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[BlockArray, np.ndarray]:
    expected = numbers(request.param)
    (tmp_path / "tokens.bin").write_bytes(expected.tobytes())
    return opened(tmp_path / "tokens.bin", request.param), expected


@pytest.mark.parametrize("cached", [1, 1000])
def test_what_is_read_is_what_was_written(
    array: tuple[BlockArray, np.ndarray], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_CACHED_BLOCKS", cached)
    found, expected = array
    assert (len(found), found.largest, found.sum()) == (LENGTH, expected.max(), expected.sum(dtype=int))
    chance = np.random.default_rng(1)
    for _ in range(50):
        start, stop = sorted(chance.integers(0, LENGTH + 1, 2))
        assert np.array_equal(found[start:stop], expected[start:stop])
        places = chance.integers(0, LENGTH, chance.integers(0, 2000))
        assert np.array_equal(found[places], expected[places])
        assert np.array_equal(found[np.sort(places)], expected[np.sort(places)])
    assert found[3:3].dtype == found[:].dtype == expected.dtype
    with pytest.raises(IndexError):
        found[::2]


def test_what_was_read_is_not_the_cache(array: tuple[BlockArray, np.ndarray]) -> None:
    found, expected = array
    found[0:10][:] = 7
    assert np.array_equal(found[0:10], expected[0:10])


def test_a_change_of_the_file_is_seen_in_the_block_that_it_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_CACHED_BLOCKS", 1)
    expected, path = numbers("<u2"), tmp_path / "tokens.bin"
    path.write_bytes(expected.tobytes())
    found = opened(path, "<u2")
    with path.open("r+b") as file:
        file.seek(2 * 40_000)
        file.write(b"\xff\xff")
    assert np.array_equal(found[:20_000], expected[:20_000])
    with pytest.raises(
        DamageError, match=rf"tokens\.bin was changed while .* delete {tmp_path.parent}, the next run makes"
    ):
        found[39_990:40_010]
    os.truncate(path, 100)
    with pytest.raises(DamageError, match="was changed"):
        found[:1]


def test_a_file_that_is_replaced_or_removed_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CACHED_BLOCKS", 1)
    expected, path = numbers("<u2"), tmp_path / "tokens.bin"
    path.write_bytes(expected.tobytes())
    found = opened(path, "<u2")
    (tmp_path / "other").write_bytes(bytes(2 * LENGTH))
    (tmp_path / "other").replace(path)
    assert np.array_equal(found[:], expected)
    path.unlink()
    assert np.array_equal(found[:], expected)


@pytest.mark.parametrize(("n_bytes", "message"), [(99_999, "does not have the 99999"), (LENGTH * 2, "SHA-256")])
def test_what_is_not_the_file_of_the_index_is_refused(tmp_path: Path, n_bytes: int, message: str) -> None:
    (tmp_path / "tokens.bin").write_bytes(numbers("<u2").tobytes())
    with pytest.raises(DamageError, match=message):
        BlockArray(tmp_path / "tokens.bin", np.dtype("<u2"), n_bytes, "0" * 64, tmp_path)
    with pytest.raises(DamageError, match="cannot be read: No such file"):
        BlockArray(tmp_path / "nothing.bin", np.dtype("<u2"), n_bytes, "0" * 64, tmp_path)


def read_all(found: BlockArray, expected: np.ndarray, seed: int) -> None:
    chance = np.random.default_rng(seed)
    for _ in range(400):
        start = int(chance.integers(0, LENGTH - 100))
        assert np.array_equal(found[start : start + 100], expected[start : start + 100])


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_several_read_at_the_same_time(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes made by a fork share the place in an open file, at which none of them may therefore read."""
    monkeypatch.setattr(blocks, "_CACHED_BLOCKS", 1)
    expected = numbers("<u4")
    (tmp_path / "tokens.bin").write_bytes(expected.tobytes())
    found = opened(tmp_path / "tokens.bin", "<u4")
    if kind == "threads":
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read_all, [found] * 4, [expected] * 4, range(4)))
        return
    if not hasattr(os, "fork") or os.environ.get("MM_REC_TEST_SYSTEM") == "bare":
        pytest.skip("this system makes no process as a copy of another")
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=read_all, args=(found, expected, seed)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * 4
