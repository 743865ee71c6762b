"""The text of documents that are a ZIP archive of XML: Word, OpenDocument, PowerPoint and EPUB.

They are read with Python's own ``zipfile`` and ``expat``, which keeps no tree, so that memory is that of the text.
``zipfile`` holds a part to the size that the archive states for it, so stated sizes bound what is unpacked.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO
from urllib.parse import unquote
from xml.parsers import expat

from mm_rec.data.documents.kinds import LeftOutError
from mm_rec.data.documents.markup import read_html, tidy
from mm_rec.data.unpacking import UnpackingError, UnpackingLimit

__all__ = ["check_archive", "read_epub", "read_opendocument", "read_powerpoint", "read_word"]

MOST_PARTS = 20_000
PIECE_BYTES = 1 << 16
LONGEST_LIST = 4_000_000
_OLD_OFFICE = b"\xd0\xcf\x11\xe0"
_SLIDE = re.compile(r"ppt/slides/slide(\d+)\.xml")


def check_archive(path: Path) -> None:
    """Refuse an archive that is damaged, encrypted, or unpacks to more than a text ever does.

    Raises:
        LeftOutError: with the reason.
    """
    with path.open("rb") as file:
        if file.read(4) == _OLD_OFFICE:
            raise LeftOutError("encrypted, or of an old format under a new name")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # What damage makes `zipfile` raise: offsets before the file's start are a ValueError, a version of the format that
    # it does not know is a NotImplementedError.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise LeftOutError("damaged: not the archive that its kind is") from None
    if any(entry.flag_bits & 1 for entry in entries):
        raise LeftOutError("encrypted")
    if len(entries) > MOST_PARTS:
        raise LeftOutError("an archive of more than {most:,} parts", most=MOST_PARTS)
    try:
        UnpackingLimit(path).take(sum(entry.file_size for entry in entries if not _is_picture(entry.filename)))
    except UnpackingError:
        raise LeftOutError("unpacks to far more than a text ever does") from None


def read_word(path: Path) -> str:
    """Returns the text of a Word document: body, then notes; text that is marked as deleted is not in it."""
    with _opened(path) as archive:
        names = set(archive.namelist())
        if "word/document.xml" not in names:
            raise LeftOutError("damaged: no text in the archive")
        notes = [one for one in ("word/footnotes.xml", "word/endnotes.xml") if one in names]
        return tidy("\n".join(_read_part(archive, part, _OfficeText()) for part in ("word/document.xml", *notes)))


def read_powerpoint(path: Path) -> str:
    """Returns the text of all slides in their order."""
    with _opened(path) as archive:
        slides = sorted((int(found[1]), name) for name in archive.namelist() if (found := _SLIDE.fullmatch(name)))
        if not slides:
            raise LeftOutError("damaged: no slides in the archive")
        return tidy("\n\n".join(_read_part(archive, name, _OfficeText()) for _, name in slides))


def read_opendocument(path: Path) -> str:
    """Returns the text of an OpenDocument text or presentation: body, then notes."""
    with _opened(path) as archive:
        if "content.xml" not in archive.namelist():
            raise LeftOutError("damaged: no text in the archive")
        if b"encryption-data" in archive.read("META-INF/manifest.xml")[:LONGEST_LIST]:
            raise LeftOutError("encrypted")
        return tidy(_read_part(archive, "content.xml", _OpenDocumentText()))


def read_epub(path: Path) -> str:
    """Returns the text of a book: its chapters in the order of reading."""
    with _opened(path) as archive:
        names = set(archive.namelist())
        if "META-INF/encryption.xml" in names and b"xmlenc#aes" in archive.read("META-INF/encryption.xml"):
            raise LeftOutError("encrypted (a copy protection)")
        if "META-INF/container.xml" not in names:
            raise LeftOutError("damaged: no list of chapters in the archive")
        (package,) = _elements(archive, "META-INF/container.xml", "rootfile")[:1] or [{}]
        root = package.get("full-path", "")
        if root not in names:
            raise LeftOutError("damaged: no list of chapters in the archive")
        items = {one.get("id"): one.get("href", "") for one in _elements(archive, root, "item")}
        order = [items.get(one.get("idref"), "") for one in _elements(archive, root, "itemref")]
        chapters = [posixpath.normpath(posixpath.join(posixpath.dirname(root), unquote(one))) for one in order]
        if not chapters or any(chapter not in names for chapter in chapters):
            raise LeftOutError("damaged: chapters are missing")
        return tidy("\n\n".join(read_html(archive.read(chapter), None) for chapter in chapters))


def _opened(path: Path) -> zipfile.ZipFile:
    check_archive(path)
    return zipfile.ZipFile(path)


def _is_picture(name: str) -> bool:
    return "/media/" in name or name.lower().endswith((".png", ".jpg", ".jpeg", ".gif", ".emf", ".wmf", ".mp4", ".wav"))


class _XmlText:
    """Takes the elements of an XML file and collects text."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.later: list[str] = []

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        """Take the begin of an element, whose name is without its prefix."""

    def end(self, name: str) -> None:
        """Take the end of an element."""

    def data(self, text: str) -> None:
        """Take text between tags."""

    def text(self) -> str:
        """Returns all text."""
        return "".join([*self.pieces, *self.later]).replace(" \t", "\t")


class _Elements(_XmlText):
    """The attributes of all elements of a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self._wanted = name

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == self._wanted:
            self.found.append({key.rpartition("}")[2]: value for key, value in attributes.items()})


class _OfficeText(_XmlText):
    """Text of a part of Word or PowerPoint: runs ``t`` of paragraphs ``p``, in cells ``tc`` of rows ``tr``."""

    _SIGNS: Mapping[str, str] = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}

    def __init__(self) -> None:
        super().__init__()
        self._fallback = 0  # inside of it stands the same content once more, for older programs
        self._in_text = False
        self._in_style = 0  # where ``tab`` is a place on the ruler
        self._cells: list[int] = []

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._fallback += name == "Fallback"
        self._in_style += name in ("pPr", "rPr", "sectPr")
        if self._fallback or self._in_style:
            return
        self._in_text = name == "t"
        if name == "tr":
            self._cells.append(0)
        elif name == "tc" and self._cells:
            self.pieces.append("\t" if self._cells[-1] else "")
            self._cells[-1] += 1
        else:
            self.pieces.append(self._SIGNS.get(name, ""))

    def end(self, name: str) -> None:
        self._in_text = False
        was_outside = not (self._fallback or self._in_style)
        self._fallback -= name == "Fallback"
        self._in_style -= name in ("pPr", "rPr", "sectPr")
        if not was_outside:
            return
        if name == "p":
            self.pieces.append(" " if self._cells else "\n\n")
        elif name == "tr" and self._cells:
            self._cells.pop()
            self.pieces.append(" " if self._cells else "\n")
        elif name == "tbl":
            self.pieces.append("\n")

    def data(self, text: str) -> None:
        if self._in_text and not self._fallback:
            self.pieces.append(text)


class _OpenDocumentText(_XmlText):
    """Text of OpenDocument, which stands between the tags of paragraphs ``p`` and headings ``h``."""

    _LEFT_OUT = ("tracked-changes", "annotation", "note-citation")

    def __init__(self) -> None:
        super().__init__()
        self._skipping = self._paragraphs = self._notes = 0
        self._cells: list[int] = []

    def _add(self, text: str) -> None:
        (self.later if self._notes else self.pieces).append(text)

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._skipping += name in self._LEFT_OUT
        if self._skipping:
            return
        self._notes += name == "note-body"
        self._paragraphs += name in ("p", "h")
        if name == "s":
            count = next((value for key, value in attributes.items() if key.rpartition("}")[2] == "c"), "1")
            self._add(" " * min(int(count), 1000) if count.isdecimal() and len(count) < 5 else " ")
        elif name in ("tab", "line-break"):
            self._add("\t" if name == "tab" else "\n")
        elif name == "table-row":
            self._cells.append(0)
        elif name == "table-cell" and self._cells:
            self._add("\t" if self._cells[-1] else "")
            self._cells[-1] += 1

    def end(self, name: str) -> None:
        if self._skipping:
            self._skipping -= name in self._LEFT_OUT
            return
        if name in ("p", "h"):
            self._paragraphs -= 1
            self._add(" " if self._cells and not self._notes else "\n\n")
        elif name == "table-row" and self._cells:
            self._cells.pop()
            self._add(" " if self._cells else "\n")
        self._notes -= name == "note-body"

    def data(self, text: str) -> None:
        if self._paragraphs and not self._skipping:
            self._add(text.replace("\n", " "))


def _read_part(archive: zipfile.ZipFile, part: str, reader: _XmlText) -> str:
    with archive.open(part) as file:
        _parse(file, reader)
    return reader.text()


def _elements(archive: zipfile.ZipFile, part: str, name: str) -> list[dict[str, str]]:
    """The attributes of all elements of that name in a part."""
    reader = _Elements(name)
    _read_part(archive, part, reader)
    return reader.found


def _parse(file: IO[bytes], reader: _XmlText) -> None:
    """Hand the elements and the text of an XML file to ``reader``; raises LeftOutError if it is damaged."""

    def refuse(*_: object) -> None:
        raise LeftOutError("its XML defines entities, which documents never do")

    parser = expat.ParserCreate(namespace_separator="}")
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = lambda name, attributes: reader.start(name.rpartition("}")[2], attributes)
    parser.EndElementHandler = lambda name: reader.end(name.rpartition("}")[2])
    parser.CharacterDataHandler = reader.data
    parser.buffer_text = True
    try:
        while piece := file.read(PIECE_BYTES):
            parser.Parse(piece, False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise LeftOutError("damaged: its XML breaks off or is wrong (line {lineno})", lineno=error.lineno) from None
