"""Reads packed files in bounded memory, and refuses those that unpack to absurd sizes.

A kilobyte of Parquet, gzip, zstd or xz can stand for gigabytes. Texts rarely pack to less than a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mm_rec.data.parquet_footer import DELTA_BYTE_ARRAY, ColumnChunk, read_row_groups
from mm_rec.storage.files import format_bytes
from mm_rec.translation import Translatable

if TYPE_CHECKING:
    import pyarrow as pa  # imported where Parquet is read, so that other files can be read without it

__all__ = ["UnpackingError", "UnpackingLimit", "parquet_columns", "parquet_rows"]

FREE_BYTES = 256_000_000
MOST_TIMES = 200
"""What a file may unpack to: FREE_BYTES, and so many times its size on top."""

ROW_BYTES = 100
"""What a row counts at least, so that rows of nothing have an end."""

BATCH_BYTES = 64_000_000
MOST_ROWS = 1000
_DICTIONARY_PAGE = 2


class UnpackingError(ValueError):
    """A file unpacks to more than a text ever does."""


class UnpackingLimit:
    """Counts what comes out of a packed file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._left = self._limit = FREE_BYTES + MOST_TIMES * path.stat().st_size

    def take(self, n_bytes: int) -> None:
        """Counts so many bytes more; raises UnpackingError if they are too many."""
        self._left -= max(n_bytes, ROW_BYTES)
        if self._left < 0:
            raise UnpackingError(
                Translatable(
                    "the file unpacks to more than {limit}, {times} times its size and {free}; if that is right, "
                    "unpack it to .jsonl first",
                    limit=format_bytes(self._limit),
                    times=MOST_TIMES,
                    free=format_bytes(FREE_BYTES),
                )
            )


def parquet_columns(path: Path) -> list[str]:
    """The names of the columns of a Parquet file."""
    import pyarrow.parquet as pq

    return list(pq.read_schema(path).names)


def parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, one at a time.

    A value that the file holds once may stand in many rows. So of plain columns no more rows are read at once than
    BATCH_BYTES hold if each has the largest such value, and columns of lists and objects are read as indices.

    Args:
        path: the file.
        columns: those to read; None for all.

    Raises:
        UnpackingError: if the rows are more than a text ever is.
    """
    import pyarrow.parquet as pq

    limit, metadata = UnpackingLimit(path), pq.read_metadata(path)
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    nested = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and "." in leaf.path]
    with pq.ParquetFile(path, metadata=metadata, read_dictionary=nested) as file, path.open("rb") as content:
        for index, group in enumerate(read_row_groups(content)):
            wanted = [one for one in group.chunks if columns is None or one.path[0] in columns]
            size = sum(one.uncompressed_bytes for one in wanted)
            UnpackingLimit(path).take(size)
            widest = sum(_repeatable_bytes(one, content) for one in wanted if len(one.path) == 1)
            rows = BATCH_BYTES // (widest + size // max(group.rows, 1) + 1)
            rows = max(1, min(MOST_ROWS, rows))
            for batch in file.iter_batches(batch_size=rows, row_groups=[index], columns=columns):
                yield from _unpacked(batch, limit)


def _unpacked(batch: pa.RecordBatch, limit: UnpackingLimit) -> Iterator[dict[str, Any]]:
    """The rows of a batch, halved as long as it is large, since its values are larger than their indices."""
    import pyarrow as pa

    size = sum(_expanded_bytes(array) for array in batch.columns)
    if size > BATCH_BYTES and batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _unpacked(batch.slice(0, half), limit)
        yield from _unpacked(batch.slice(half), limit)
        return
    if size > FREE_BYTES:
        raise UnpackingError(Translatable("a row has {size}", size=format_bytes(size)))
    limit.take(size + ROW_BYTES * batch.num_rows)
    if any(pa.types.is_nested(field.type) for field in batch.schema):
        arrays = batch.columns
        for index in range(batch.num_rows):
            yield {name: array[index].as_py() for name, array in zip(batch.schema.names, arrays, strict=True)}
    else:
        yield from batch.to_pylist()


def _expanded_bytes(array: Any) -> int:
    """The bytes of a column's values, where those of a dictionary count as often as they stand there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.DictionaryArray):
        lengths = pc.binary_length(array.dictionary).take(array.indices.drop_null())
        return int(pc.sum(lengths.cast("int64")).as_py() or 0)
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        return _expanded_bytes(array.flatten())
    if isinstance(array, pa.StructArray):
        return sum(_expanded_bytes(one) for one in array.flatten())
    return int(array.nbytes)


def _repeatable_bytes(chunk: ColumnChunk, content: IO[bytes]) -> int:
    """The most bytes of a value that a chunk of a column holds once and may repeat in each row."""
    if DELTA_BYTE_ARRAY in chunk.encodings:
        return chunk.uncompressed_bytes
    content.seek(chunk.first_page)
    header = content.read(16)
    # The page's header in Thrift's compact form: field 1, its kind, then field 2, the bytes of the page.
    if header[:1] != b"\x15" or header[2:3] != b"\x15":
        return chunk.uncompressed_bytes
    if header[1] >> 1 != _DICTIONARY_PAGE:
        return 0
    value = 0
    for place, byte in enumerate(header[3:8]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return value >> 1  # zigzag: sizes are not negative
