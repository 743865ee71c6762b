"""Reads the documents of files of any kind, and keeps account of what is left out."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mm_rec.data.documents.encoding import check_encoding, decode, find_encoding
from mm_rec.data.documents.folder import LeftOut
from mm_rec.data.documents.kinds import PROGRAM, Kind, LeftOutError, kind_of
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.files import MAX_ROW_BYTES, TEXT_FIELDS, BadRows, read_rows, read_texts
from mm_rec.errors import UserError
from mm_rec.regular_file import open_regular, read_regular
from mm_rec.storage.files import some_names
from mm_rec.translation import Translatable

__all__ = ["Document", "Documents", "ReadOptions", "read_options", "read_plain", "texts_without_parsing"]

TEXT_PIECE = 4_000_000
"""Characters: a text file is one document, unless it is longer than this; then it is several, cut at lines."""


@dataclass(frozen=True)
class ReadOptions:
    """What a user says of files that are to be read.

    Attributes:
        encoding: of text files; None finds it out.
        columns: of tables and of JSON, those that hold the text; none takes ``text``, ``content`` or ``code``.
        skip_bad: rows of JSONL and Parquet that cannot be read to leave out before it is an error.
    """

    encoding: str | None = None
    columns: tuple[str, ...] = ()
    skip_bad: int = 0


def read_options(encoding: str | None, columns: str | None, skip_bad: int) -> ReadOptions:
    """Returns what the flags ``--encoding``, ``--columns`` and ``--skip_bad`` say.

    >>> read_options("latin1", "title, body", 0)
    ReadOptions(encoding='cp1252', columns=('title', 'body'), skip_bad=0)

    Raises:
        UserError: if there is no such encoding.
    """
    names = tuple(name.strip() for name in (columns or "").split(",") if name.strip())
    try:
        return ReadOptions(encoding and check_encoding(encoding), names, skip_bad)
    except LookupError:
        raise UserError(
            "there is no encoding {encoding!r:.40}; take utf-8, cp1254, latin1 or another", encoding=encoding
        ) from None


class Document(NamedTuple):
    """A document, the file that it is from, and whether it is a program."""

    text: str
    path: Path
    is_program: bool


@dataclass
class Documents:
    """The documents of some files, which can be read again and again with the same outcome.

    Attributes:
        files: in the order of reading.
        parser: reads those that need parsing.
        options: what the user says of them.
        left_out: files that are not used, known once all were read.
    n_read: how many files of each kind were read, likewise.
        counts: how many documents each kind of file gave, likewise.
        bad_rows: file, line and fault of each row that was left out, likewise.
    """

    files: Sequence[Path]
    parser: Parser
    options: ReadOptions
    left_out: dict[Path, LeftOut] = field(default_factory=dict)
    n_read: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)
    _is_known: bool = False

    def read(self) -> Generator[Document, None, None]:
        """Yields all documents. The first time, what cannot be read is noted; later on it is passed over.

        Raises:
            UserError: for a bad row too many, or a file that was read before and now cannot be.
        """
        bad = BadRows(self.options.skip_bad)
        try:
            for path in self.files:
                if path not in self.left_out:
                    yield from self._read_file(path, bad)
        finally:  # also where the caller has enough
            if not self._is_known:
                self.bad_rows = bad.found
                self._is_known = True

    def _read_file(self, path: Path, bad: BadRows) -> Iterator[Document]:
        kind = kind_of(path)
        assert kind is not None, "only files of known kinds are to be read"
        is_first = not self._is_known
        self.n_read[kind.name] += is_first
        try:
            for text in self._texts(path, kind, bad):
                self.counts[kind.name] += is_first
                yield Document(text, path, kind is PROGRAM)
        except LeftOutError as error:
            if not is_first:
                raise UserError(
                    "{path} was changed while it was read; run the same command again", path=path
                ) from error
            self.n_read[kind.name] -= 1
            self.left_out[path] = LeftOut(path, kind.name, str(error))

    def _texts(self, path: Path, kind: Kind, bad: BadRows) -> Iterator[str]:
        if kind.how == "plain":
            return read_plain(path, self.options.encoding)
        if kind.how == "rows":
            return _read_rows(path, bad, self.options.columns)
        return self.parser.texts(path, kind)


def texts_without_parsing(path: Path, options: ReadOptions) -> Iterator[str]:
    """Yields the documents of a file of a kind that needs no parsing; none of others. Raises as :func:`read_plain`."""
    kind = kind_of(path)
    if kind is not None and kind.how == "plain":
        yield from read_plain(path, options.encoding)
    elif kind is not None and kind.how == "rows":
        yield from _read_rows(path, BadRows(), options.columns)


def read_plain(path: Path, encoding: str | None = None) -> Iterator[str]:
    """Yields a file of text as one document, or several if it is very long, with line ends as in Unix.

    All of it is decoded before the first document is given, so that no part of a file is used without the rest.

    Raises:
        LeftOutError: if it is not text.
        OSError: if it cannot be opened.
    """
    try:
        if path.stat().st_size <= MAX_ROW_BYTES:
            text = decode(read_regular(path), encoding)
            if not text:
                raise LeftOutError("empty")
            yield from _cut_at_lines(io.StringIO(text, newline=""))
            return
        open_regular(path).close()
        name = encoding or _encoding_of_large(path)
        with path.open(encoding=name) as file:
            _check_signs(file)
        with path.open(encoding=name) as file:
            yield from _cut_at_lines(file)
    except UnicodeDecodeError:
        raise LeftOutError(
            Translatable("not {encoding}", encoding=encoding) if encoding else "no encoding fits its bytes"
        ) from None
    except OSError as error:
        raise LeftOutError("cannot be opened ({reason})", reason=(error.strerror or str(error)).lower()) from None


def _encoding_of_large(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            _check_signs(file)
        return "utf-8-sig"
    except UnicodeDecodeError:
        with open_regular(path) as raw:
            return find_encoding(raw.read(TEXT_PIECE))


def _check_signs(file: io.TextIOBase) -> None:
    """Read a large file to its end, which raises what is wrong with it."""
    while piece := file.read(TEXT_PIECE):
        if "\0" in piece:
            raise LeftOutError("zero bytes in it, so it is no text")


def _cut_at_lines(file: io.TextIOBase) -> Iterator[str]:
    while piece := file.read(TEXT_PIECE):
        yield piece + file.readline(TEXT_PIECE)


def _read_rows(path: Path, bad: BadRows, columns: Sequence[str]) -> Iterator[str]:
    """The texts of a file of rows, the first of which tells whether it holds texts at all."""
    if path.stat().st_size:
        first = next(read_rows(path, BadRows(cap=2)), None)
        there = first.value if first is not None else None
        if isinstance(there, dict) and not set(columns or TEXT_FIELDS) & set(there):
            names = some_names(list(there))
            raise LeftOutError(
                "no field {names}, but {there}; choose some with --columns",
                names=", ".join(columns or TEXT_FIELDS),
                there=names,
            )
    yield from read_texts(path, bad, columns)
