"""The sizes that a Parquet footer tells: as Arrow reads them from sound files, and never the end of the process."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_rec.data.files import BadRows, read_texts
from mm_rec.data.parquet_footer import ColumnChunk, read_row_groups
from mm_rec.errors import UserError

ROWS = [
    {"text": f"text {index % 7}", "turns": [{"role": "user", "content": "a" * index}], "id": index, "score": index / 3}
    for index in range(200)
]
ENCODINGS = {
    "PLAIN": 0, "PLAIN_DICTIONARY": 2, "RLE": 3, "DELTA_BINARY_PACKED": 5, "DELTA_BYTE_ARRAY": 7, "RLE_DICTIONARY": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False, "compression": "none"},
        {"version": "1.0", "compression": "gzip", "write_statistics": False},
        {"data_page_version": "2.0", "row_group_size": 30, "write_page_index": True},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "id": "DELTA_BINARY_PACKED"}},
    ],
)
def test_sizes_are_those_that_arrow_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", **options)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as content:
        found = read_row_groups(content)
    assert len(found) == metadata.num_row_groups
    for index, group in enumerate(found):
        described = metadata.row_group(index)
        assert group.rows == described.num_rows
        chunks = [described.column(place) for place in range(described.num_columns)]
        assert group.chunks == tuple(
            ColumnChunk(
                tuple(one.path_in_schema.split(".")),
                frozenset(ENCODINGS[name] for name in one.encodings),
                one.total_uncompressed_size,
                one.dictionary_page_offset or one.data_page_offset,
            )
            for one in chunks
        )


def test_no_damage_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.parquet", [f"text {index}" for index in range(40)]
    pq.write_table(pa.table({"text": texts}), path)
    sound = path.read_bytes()
    length = int.from_bytes(sound[-8:-4], "little")
    read, messages = 0, []
    for place in range(len(sound) - 8 - length, len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read += len(list(read_texts(path, BadRows())))
        except UserError as error:
            messages.append(str(error))
    assert read > 0
    assert all(one.startswith(f"{path}:") and "\n" not in one for one in messages)
