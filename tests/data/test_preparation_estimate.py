"""What preparing takes is said before it begins, and what cannot fit is refused."""

import json
import random
from pathlib import Path

import pytest

from mm_rec.data import preparation_estimate
from mm_rec.data.preparation_estimate import estimate_preparation
from mm_rec.data.prepare import prepare
from mm_rec.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(500)]
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    for number in range(5):
        rows = (json.dumps({"text": " ".join(rng.choices(words, k=100))}) for _ in range(200))
        (folder / f"{number}.jsonl").write_text("\n".join(rows))
    return folder.parent


def test_the_estimate_is_about_right(data: Path) -> None:
    files = {"text": sorted((data / "text").iterdir())}
    found = estimate_preparation(files, max_samples=None, filters=True)
    assert 900 <= found.documents <= 1100
    assert 550_000 <= found.n_bytes <= 650_000
    assert found.disk >= sum(path.stat().st_size for path in prepare(data, 512).path.rglob("*.bin"))
    fewer = estimate_preparation(files, max_samples=100, filters=False)
    assert fewer.documents == 100
    assert fewer.memory < found.memory


def test_it_is_said_before_anything_else(data: Path) -> None:
    said: list[str] = []
    prepare(data, 512, progress=said.append)
    assert said[0].startswith("preparing about 1,0")
    assert "of memory and" in said[0]
    again: list[str] = []
    prepare(data, 512, progress=again.append)
    assert not any(line.startswith("preparing") for line in again)


def test_what_cannot_fit_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preparation_estimate, "available_memory", lambda device: 10**8)
        with pytest.raises(UserError, match=r"about \d+\.\d MB of memory and 100\.0 MB are free; .* --max_samples \d+"):
            prepare(data, 512)
    monkeypatch.setattr("mm_rec.storage.files.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"no space left on device .*1\.0 kB free"):
        prepare(data, 512)
    assert not list((data / "prepared").glob("*/"))


def test_many_files_are_named_in_a_short_line(data: Path) -> None:
    for number in range(3000):
        (data / "text" / f"more{number}.jsonl").write_text(f'"{number} some words that are long enough for a text"\n')
    said: list[str] = []
    prepare(data, 512, progress=said.append)
    assert max(map(len, said)) < 400


def test_empty_rows_are_no_documents(data: Path) -> None:
    (data / "text" / "0.jsonl").write_text('""\n' * 300 + (data / "text" / "0.jsonl").read_text())
    files = {"text": sorted((data / "text").iterdir())}
    assert 900 <= estimate_preparation(files, max_samples=None, filters=True).documents <= 1100
    (data / "text" / "0.jsonl").write_text("not JSON\n")  # the sample ends before it has seen any text
    found = estimate_preparation(files, max_samples=None, filters=True)
    assert found.documents < 1100
    assert found.seconds < 60


def test_files_are_hashed_after_it_was_said(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_rec.data.prepare._LARGE_BYTES", 1000)
    said: list[str] = []
    prepare(data, 512, progress=said.append)
    assert [line.partition(" ")[0] for line in said[:2]] == ["preparing", "hashing"]
    again: list[str] = []
    prepare(data, 512, progress=again.append)
    assert again[0].startswith("hashing ")
