"""Reads from the footer of a Parquet file how large its column chunks are.

Arrow's Python object for a column chunk ends the whole process if the statistics of the chunk are damaged: the C++
constructor throws an exception that nothing catches. The footer is a struct in Thrift's compact protocol, of which the
few fields below are needed; their numbers are those of parquet.thrift in apache/parquet-format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["DELTA_BYTE_ARRAY", "ColumnChunk", "RowGroup", "read_row_groups"]

DELTA_BYTE_ARRAY = 7
"""The encoding in which a value may begin as the one before it does."""

_TAIL_BYTES = 8  # the length of the footer and the word PAR1
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)

_ROW_GROUPS = 4  # of FileMetaData
_COLUMNS, _NUM_ROWS = 1, 3  # of RowGroup
_META_DATA = 3  # of ColumnChunk
_ENCODINGS, _PATH, _UNCOMPRESSED_SIZE, _DATA_OFFSET, _DICTIONARY_OFFSET = 2, 3, 6, 9, 11  # of ColumnMetaData


@dataclass(frozen=True)
class ColumnChunk:
    """The values of one column in one row group.

    Attributes:
        path: the name of the column, with those of the columns around it.
        encodings: numbers of the encodings in it.
        uncompressed_bytes: what its pages unpack to.
        first_page: place of its first page in the file, in bytes.
    """

    path: tuple[str, ...]
    encodings: frozenset[int]
    uncompressed_bytes: int
    first_page: int


@dataclass(frozen=True)
class RowGroup:
    """Rows that lie together, column after column."""

    rows: int
    chunks: tuple[ColumnChunk, ...]


def read_row_groups(content: IO[bytes]) -> list[RowGroup]:
    """Returns the row groups of a Parquet file whose footer Arrow can read.

    Raises:
        OSError: if the footer lacks what every Parquet file has.
    """
    end = content.seek(-_TAIL_BYTES, os.SEEK_END)
    length = int.from_bytes(content.read(4), "little")
    content.seek(max(end - length, 0))
    try:
        footer = _Reader(content.read(length)).struct()
        return [_row_group(one) for one in footer[_ROW_GROUPS]]
    except (IndexError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise OSError("the footer is damaged") from error


def _row_group(fields: dict[int, Any]) -> RowGroup:
    return RowGroup(fields[_NUM_ROWS], tuple(_column_chunk(one[_META_DATA]) for one in fields[_COLUMNS]))


def _column_chunk(fields: dict[int, Any]) -> ColumnChunk:
    offsets = [fields[_DATA_OFFSET], fields.get(_DICTIONARY_OFFSET) or fields[_DATA_OFFSET]]
    return ColumnChunk(
        tuple(name.decode(errors="replace") for name in fields[_PATH]),
        frozenset(fields[_ENCODINGS]),
        max(fields[_UNCOMPRESSED_SIZE], 0),
        max(min(offsets), 0),
    )


class _Reader:
    """Values in Thrift's compact protocol, one after the other; an IndexError where the bytes end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def struct(self) -> dict[int, Any]:
        """Returns a struct as its values by field number."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE):  # a field that is a truth value has no byte of its own
            return kind == _TRUE
        if kind == _BYTE:
            return self._byte()
        if kind in _INTEGERS:
            return self._integer()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            return [self._element(head & 15) for _ in range(self._varint() if head >> 4 == 15 else head >> 4)]
        if kind == _MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            return [(self._element(kinds >> 4), self._element(kinds & 15)) for _ in range(size)]
        if kind == _STRUCT:
            return self.struct()
        raise TypeError(f"there is no type {kind}")

    def _element(self, kind: int) -> Any:
        return self._byte() == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _bytes(self, length: int) -> bytes:
        self._place += length
        if self._place > len(self._data):
            raise IndexError
        return self._data[self._place - length : self._place]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or shift > 63:
                return value

    def _integer(self) -> int:
        """Returns a signed integer, of which Thrift writes 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
