"""Packed files that stand for far more than they are."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_rec.data import unpacking
from mm_rec.data.files import BadRows, read_rows, read_texts
from mm_rec.errors import UserError


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "FREE_BYTES", 3_000_000)
    monkeypatch.setattr(unpacking, "BATCH_BYTES", 300_000)


def write(path: Path, texts: list[str], **options: object) -> Path:
    pq.write_table(pa.table({"text": texts, "other": list(range(len(texts)))}), path, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}],
    ids=["dictionary", "delta"],
)
def test_one_value_in_many_rows_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    path = write(tmp_path / "a.parquet", ["x" * 100_000] * 2000, **options)
    with pytest.raises(UserError, match=r"a\.parquet:\d+: the file unpacks to more than"):
        list(read_texts(path, BadRows()))
    bad = BadRows(5)
    assert 20 < len(list(read_texts(path, bad))) < 200
    assert len(bad.found) == 1


def test_nested_values_count_as_often_as_they_stand(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "y" * 100_000}, {"role": "assistant", "content": None}]
    pq.write_table(pa.table({"messages": [message] * 500}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the file unpacks to more than"):
        list(read_rows(tmp_path / "a.parquet", BadRows()))
    pq.write_table(pa.table({"messages": [message * 100]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"a row has 10\.0 MB"):
        list(read_rows(tmp_path / "b.parquet", BadRows()))


@pytest.mark.parametrize("group", [7, 1000])
def test_rows_come_out_as_they_are(tmp_path: Path, group: int) -> None:
    rows = [
        {
            "text": f"{number % 7}" * (number % 13),
            "n": number,
            "messages": [{"role": "user", "content": f"{number % 3}"}] * 2,
        }
        for number in range(1500)
    ]
    rows[3]["text"] = rows[4]["messages"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=group)
    assert [row.value for row in read_rows(tmp_path / "a.parquet", BadRows())] == rows


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_packed_lines_have_an_end(tmp_path: Path, suffix: str, pack: object) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    line = json.dumps("z" * 1_000_000) + "\n"
    path.write_bytes(pack((line * 20).encode()))  # type: ignore[operator]
    with pytest.raises(UserError, match="the file unpacks to more than"):
        list(read_texts(path, BadRows()))
