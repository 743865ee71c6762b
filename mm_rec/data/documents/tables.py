"""Tables: CSV and spreadsheets, as documents of chosen columns or as one document."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mm_rec.data.documents.encoding import decode
from mm_rec.data.documents.kinds import LeftOutError
from mm_rec.data.files import TEXT_FIELDS
from mm_rec.storage.files import some_names
from mm_rec.translation import Translatable

__all__ = ["read_csv", "read_spreadsheet", "table_texts"]

LONGEST_CELL = 64_000_000
_DELIMITERS = (",", ";", "\t", "|")


def read_csv(content: bytes, encoding: str | None, columns: Sequence[str], name: str) -> Iterator[str]:
    """Yields the documents of a CSV or TSV file, whose delimiter is found out by its first line."""
    text = decode(content, encoding)
    first = text.partition("\n")[0]
    delimiter = "\t" if name.lower().endswith((".tsv", ".tab")) else max(_DELIMITERS, key=first.count)
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        yield from table_texts(rows, columns)
    except csv.Error as error:
        raise LeftOutError("not the table that its kind is: {error}", error=error) from None


def read_spreadsheet(path: Path, columns: Sequence[str]) -> Iterator[str]:
    """Yields the documents of a spreadsheet: of chosen columns a row each, else each sheet that holds something."""
    from python_calamine import CalamineError, CalamineWorkbook

    try:
        book = CalamineWorkbook.from_path(path)
        sheets = [
            [[str(cell) for cell in row] for row in book.get_sheet_by_name(one).to_python()] for one in book.sheet_names
        ]
    except CalamineError as error:
        encrypted = "password" in str(error).lower() or "encrypt" in str(error).lower()
        raise LeftOutError("encrypted" if encrypted else "damaged: not the spreadsheet that its kind is") from None
    filled = [rows for rows in sheets if rows]
    if columns and not any(set(columns) & set(rows[0]) for rows in filled):
        raise LeftOutError(_no_column(columns, [name for rows in filled for name in rows[0]]))
    for rows in filled:
        if not columns or set(columns) & set(rows[0]):
            yield from table_texts(iter(rows), columns)


def table_texts(rows: Iterable[Sequence[str]], columns: Sequence[str]) -> Iterator[str]:
    r"""Yields the texts of a table whose first row names its columns.

    With ``columns`` each row is a document: its cells in those columns, an empty line between them. Without, a column
    ``text``, ``content`` or ``code`` is taken if there is one; else the table is one document, a line a row.

    >>> list(table_texts([["id", "text"], ["1", "One."], ["2", "Two."]], []))
    ['One.', 'Two.']
    >>> list(table_texts([["name", "born"], ["Ada", "1815"]], []))
    ['name\tborn\nAda\t1815']
    """
    lines = iter(rows)
    header = [name.strip().lstrip("\ufeff") for name in next(lines, [])]
    missing = [name for name in columns if name not in header]
    if missing:
        raise LeftOutError(_no_column(missing, header))
    chosen = list(columns) or [name for name in TEXT_FIELDS if name in header][:1]
    places = [header.index(name) for name in chosen]
    if places:
        for row in lines:
            cells = [row[place].strip() for place in places if place < len(row)]
            yield "\n\n".join(filter(None, cells))
        return
    whole = ["\t".join(cell.strip() for cell in row).rstrip() for row in ([header, *lines] if header else [])]
    yield "\n".join(whole)


def _no_column(wanted: Sequence[str], there: Sequence[str]) -> str:
    return (
        Translatable("no column {wanted}; there are {there}", wanted=some_names(wanted), there=some_names(list(there)))
        if there
        else Translatable("no table in it")
    )
