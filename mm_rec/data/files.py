"""Reading files of rows: ``.jsonl`` (plain, gzip, zstd or xz) and ``.parquet``, whose rows are documents.

A JSONL row is a JSON string, or an object whose text is in the field ``text``, ``content`` or ``code``, or in chosen
ones. Whatever is wrong with a row or a file is an error that names file and line; with ``--skip_bad`` it is counted
instead, up to a cap. All other kinds of files are read by :mod:`mm_rec.data.documents`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from mm_rec.data.unpacking import UnpackingError, UnpackingLimit, parquet_columns, parquet_rows
from mm_rec.errors import UserError
from mm_rec.regular_file import open_regular
from mm_rec.text.message import first_filled
from mm_rec.translation import Translatable

__all__ = [
    "COMPRESSED",
    "MAX_ROW_BYTES",
    "SUFFIXES",
    "TEXT_FIELDS",
    "BadRows",
    "Row",
    "find_files",
    "read_rows",
    "read_texts",
]

COMPRESSED = (".jsonl.gz", ".jsonl.zst", ".jsonl.xz")
SUFFIXES = (".jsonl", *COMPRESSED, ".parquet")
TEXT_FIELDS = ("text", "content", "code")

MAX_ROW_BYTES = 64_000_000
"""A longer line is no document but a file without line breaks; it is not read into memory."""


@dataclass
class BadRows:
    """What to do with a row that cannot be used: raise UserError, or count it if there were fewer than ``cap``."""

    cap: int = 0
    found: list[str] = field(default_factory=list)

    def report(self, path: Path, line: int, problem: str) -> None:
        """Take note of a bad row; raises UserError if that is one too many."""
        self.found.append(Translatable("{path}:{line}: {problem}", path=path, line=line, problem=problem))
        if self.cap == 0:
            raise UserError("{row}; mend or delete it, or leave out bad rows with --skip_bad", row=self.found[-1])
        if len(self.found) > self.cap:
            raise UserError(
                "{row}; that is more than {cap} bad rows (--skip_bad), so nothing is used",
                row=self.found[-1],
                cap=self.cap,
            )


class Row(NamedTuple):
    """A value of a data file and where it stands."""

    path: Path
    line: int
    value: Any


def find_files(path: Path) -> list[Path]:
    """The files of rows at ``path``: itself, or those in the folder and its subfolders, in the order of their names.

    Raises UserError if there is nothing at ``path`` or if it is a file of another kind.
    """
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and _suffix(file) is not None]
        return sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(path).parts))
    if not path.exists():
        raise UserError("there is no file or folder {path}", path=path)
    if not path.is_file():
        raise UserError("{path} is a pipe or a device; write what comes out of it to a file", path=path)
    if _suffix(path) is None:
        raise UserError(
            "{path} is none of the kinds of files that can be read: {endings}", path=path, endings=", ".join(SUFFIXES)
        )
    return [path]


def read_texts(path: Path, bad: BadRows, columns: Sequence[str] = ()) -> Iterator[str]:
    """The documents of one file of rows, as strings that have a UTF-8 form and no NUL.

    With ``columns`` a document is what stands in these, an empty line between them.
    """
    for row in read_rows(path, bad, columns or TEXT_FIELDS):
        text = row.value
        if isinstance(text, dict):
            text = _text_of(text, columns)
            problem = Translatable(
                "the object has no string in a field {names}", names=", ".join(columns or TEXT_FIELDS)
            )
        else:
            problem = Translatable("a string or an object is needed, not {kind}", kind=_kind(text))
        if not isinstance(text, str):
            bad.report(path, row.line, problem)
        elif "\0" in text:
            bad.report(path, row.line, Translatable("the text has a NUL character"))
        elif not _has_utf8_form(text):
            bad.report(path, row.line, Translatable("the text has a lone surrogate, half of a character"))
        else:
            yield text


def _text_of(row: dict[str, Any], columns: Sequence[str]) -> str | None:
    """The text of a row: what stands in all of ``columns``, or in the first of TEXT_FIELDS that holds something."""
    texts = {name: row[name] for name in columns or TEXT_FIELDS if isinstance(row.get(name), str)}
    if columns:
        return "\n\n".join(filter(str.strip, texts.values())) if texts else None
    name = first_filled(texts, TEXT_FIELDS)
    return None if name is None else texts[name]


def read_rows(path: Path, bad: BadRows, fields: Sequence[str] = ()) -> Iterator[Row]:
    """The values of a JSONL or Parquet file: any JSON value a line, or a dict a row.

    Of a Parquet file only those of ``fields`` that it has are read, or all columns if it has none of them.
    """
    if _suffix(path) == ".parquet":
        yield from _read_parquet(path, bad, fields)
        return
    for line, content in _read_lines(path, bad):
        if content.isspace():
            continue
        try:
            yield Row(path, line, json.loads(content))
        except RecursionError:
            bad.report(path, line, Translatable("the JSON value is nested too deeply"))
        except json.JSONDecodeError as error:
            bad.report(path, line, Translatable("not valid JSON: {error}", error=error))
        except ValueError:  # Python converts no numbers of thousands of digits
            bad.report(path, line, Translatable("a number has too many digits"))


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _read_lines(path: Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    """The lines of a file, numbered from 1, with line ends as in Unix and without the mark that may start UTF-8."""
    line = 0
    try:
        limit = UnpackingLimit(path) if _suffix(path) in COMPRESSED else None
        with _open(path) as file:
            while content := file.readline(MAX_ROW_BYTES):
                line += 1
                if limit is not None:
                    limit.take(len(content))
                if len(content) == MAX_ROW_BYTES and not content.endswith(b"\n"):
                    bad.report(
                        path,
                        line,
                        Translatable(
                            "the line is longer than {max_row_bytes} MB", max_row_bytes=MAX_ROW_BYTES // 1_000_000
                        ),
                    )
                    while content and not content.endswith(b"\n"):
                        content = file.readline(MAX_ROW_BYTES)
                        if limit is not None:
                            limit.take(len(content))
                    continue
                if line == 1:
                    content = content.removeprefix(codecs.BOM_UTF8)
                if content.endswith(b"\r\n"):
                    content = content[:-2] + b"\n"
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError as error:
                    bad.report(
                        path,
                        line,
                        Translatable(
                            "not UTF-8: {reason} at byte {start} of the line", reason=error.reason, start=error.start
                        ),
                    )
                    continue
                yield line, text
    except UnpackingError as error:
        bad.report(path, line, Translatable("{problem}", problem=error))
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        bad.report(
            path, line + 1, Translatable("the file breaks off or is damaged ({error}), so fetch it again", error=error)
        )


def _open(path: Path) -> IO[bytes]:
    suffix = _suffix(path)
    open_regular(path).close()  # the readers of packed files open theirs by its name
    if suffix in (".jsonl.gz", ".jsonl.zst") and path.stat().st_size == 0:
        raise EOFError("it is empty")  # for their readers a whole file of no rows, which no compressor writes so
    match suffix:
        case ".jsonl.gz":
            return cast(IO[bytes], gzip.open(path))
        case ".jsonl.xz":
            return lzma.open(path)
        case ".jsonl.zst":
            # zstandard's own reader takes a file that breaks off for a whole one.
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
        case _:
            return path.open("rb")


def _read_parquet(path: Path, bad: BadRows, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa

    line = 0
    try:
        open_regular(path).close()
        names = parquet_columns(path)
        for value in parquet_rows(path, [name for name in fields if name in names] or None):
            line += 1
            yield Row(path, line, value)
    except UnpackingError as error:
        bad.report(path, line + 1, Translatable("{problem}", problem=error))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        bad.report(
            path,
            line + 1,
            Translatable("the file breaks off or is damaged ({error})", error=" ".join(str(error).split())),
        )


def _has_utf8_form(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), type(value).__name__)
