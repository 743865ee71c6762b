"""Row 25, the readers of documents: what is encrypted, damaged, or made to exhaust whoever reads it."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from workload import Trial, workload

from mm_rec.data.documents import parsing
from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions
from mm_rec.data.documents.worker import MEMORY_BYTES

sys.path.append(str(Path(__file__).parents[1] / "data" / "documents"))
import document_files as write

SECONDS = 8.0
"""What a file may take here, in place of a minute."""

IDLE = "its reader is not installed"

LONGEST = SECONDS + 30
OWN_MEMORY_BYTES = 400_000_000
MEGABYTE = 1_000_000
Hostile = Callable[[random.Random, Path], Path]


def word_bomb(rng: random.Random, folder: Path) -> Path:
    return write.archive(folder / "a.docx", {"word/document.xml": bytes(rng.randint(400, 700) * MEGABYTE)})


def word_bomb_that_lies(rng: random.Random, folder: Path) -> Path:
    path = write.archive(folder / "a.docx", {"word/document.xml": b" " * 300 * MEGABYTE})
    content = path.read_bytes()
    true_size, stated = (300 * MEGABYTE).to_bytes(4, "little"), rng.randint(1, 1000).to_bytes(4, "little")
    assert true_size in content
    path.write_bytes(content.replace(true_size, stated))
    return path


def laughs(rng: random.Random, folder: Path) -> Path:
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, rng.randint(5, 12)))
    xml = f'<!DOCTYPE w [<!ENTITY a0 "ha">{entities}]><w>&a4;</w>'
    name, part = rng.choice([("a.docx", "word/document.xml"), ("a.odt", "content.xml")])
    return write.archive(folder / name, {"META-INF/manifest.xml": "<m/>", part: xml})


def deep_xml(rng: random.Random, folder: Path) -> Path:
    depth = rng.choice([10_000, 1_000_000])
    return write.word(folder / "a.docx", ["x"], "<w:p>" * depth + "</w:p>" * depth)


def ten_thousand_tables(rng: random.Random, folder: Path) -> Path:
    table = "<table><tr><td>1<td>2</table>" if rng.random() < 0.5 else "<table><tr><td>"
    (folder / "a.html").write_text("<html>" + table * 10_000)
    return folder / "a.html"


def deep_html(rng: random.Random, folder: Path) -> Path:
    page = rng.choice(["<div>" * 10**6, "<b><i>" * 10**6, "<a " * 10**6, "<!--" * 10**5, "&" * 10**6, "<![" * 10**5])
    (folder / "a.html").write_text(page)
    return folder / "a.html"


def book_of_one_chapter(rng: random.Random, folder: Path) -> Path:
    path = write.epub(folder / "a.epub", ["word " * rng.randint(10**5, 10**6)])
    with zipfile.ZipFile(path) as file:
        parts: dict[str, str | bytes] = {name: file.read(name) for name in file.namelist()}
    spine = '<itemref idref="c0"/>' * 10_000
    parts["OEBPS/book.opf"] = f'<package><item id="c0" href="0.xhtml"/><spine>{spine}</spine></package>'
    return write.archive(path, parts)


def archives_in_archives(rng: random.Random, folder: Path) -> Path:
    inner = write.archive(folder / "inner.zip", {"a": bytes(MEGABYTE)}).read_bytes()
    (folder / "inner.zip").unlink()
    for _ in range(rng.randint(1, 20)):
        inner = write.archive(folder / "next.zip", {"word/document.xml": inner, "b.docx": inner}).read_bytes()
        (folder / "next.zip").unlink()
        if len(inner) > MEGABYTE:
            break
    (folder / "a.docx").write_bytes(inner)
    return folder / "a.docx"


def encrypted(rng: random.Random, folder: Path) -> Path:
    if rng.random() < 0.5:
        return write.encrypted_pdf(folder / "a.pdf")
    (folder / "a.docx").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + rng.randbytes(4000))
    return folder / "a.docx"


def pages_in_a_circle(rng: random.Random, folder: Path) -> Path:
    return write.pdf(folder / "a.pdf", ["x"], kids=rng.choice(["[2 0 R]", "[3 0 R 2 0 R]", "[2 0 R] /Count 99999999"]))


def pdf_bomb(rng: random.Random, folder: Path) -> Path:
    packer = zlib.compressobj(9)
    piece = rng.choice([b" ", b"(a) Tj ", b"q "]) * MEGABYTE
    stream = b"".join(packer.compress(piece) for _ in range(2000 // (len(piece) // MEGABYTE))) + packer.flush()
    body = f"<< /Length {len(stream)} /Filter /FlateDecode >>\nstream\n".encode() + stream + b"\nendstream"
    path = write.pdf(folder / "a.pdf", ["x"], extra=[body])
    path.write_bytes(path.read_bytes().replace(b"/Contents 4 0 R", b"/Contents 6 0 R"))
    return path


def far_cell(rng: random.Random, folder: Path) -> Path:
    path = write.spreadsheet(folder / "a.xlsx", [["a", "b"]])
    with zipfile.ZipFile(path) as file:
        parts: dict[str, str | bytes] = {name: file.read(name) for name in file.namelist()}
    name = "xl/worksheets/sheet1.xml"
    sheet = bytes(parts[name]).replace(
        b"</sheetData>", b'<row r="1048576"><c r="XFD1048576"><v>1</v></c></row></sheetData>'
    )
    return write.archive(path, {**parts, name: sheet})


def deep_json(rng: random.Random, folder: Path) -> Path:
    depth = rng.choice([10**4, 10**6])
    (folder / "a.json").write_text(rng.choice(["[" * depth, '{"a":' * depth, "[" * depth + "]" * depth, "9" * 10**6]))
    return folder / "a.json"


def odd_json(rng: random.Random, folder: Path) -> Path:
    values = [
        None,
        3,
        [None],
        [{"text": 3}],
        {"cells": 3},
        {"cells": [{"cell_type": "code", "source": 3}]},
        "\ud800",
        [[]],
    ]
    path = folder / rng.choice(["a.json", "a.ipynb"])
    path.write_text(json.dumps(rng.choice(values)))
    return path


def rtf_of_groups(rng: random.Random, folder: Path) -> Path:
    (folder / "a.rtf").write_text("{\\rtf1 " + rng.choice(["{", "\\'", "{\\*\\a "]) * 10**6)
    return folder / "a.rtf"


def zeros(rng: random.Random, folder: Path) -> Path:
    path = folder / rng.choice(["a.txt", "a.csv", "a.html", "a.md"])
    with path.open("wb") as file:
        file.truncate(rng.choice([10**6, 10**10]))
    return path


HOSTILE: tuple[Hostile, ...] = (
    word_bomb, word_bomb_that_lies, laughs, deep_xml, ten_thousand_tables, deep_html, book_of_one_chapter,
    archives_in_archives, encrypted, pages_in_a_circle, pdf_bomb, far_cell, deep_json, odd_json, rtf_of_groups, zeros,
)  # fmt: skip


@workload(
    25, "documents that are encrypted, unpack to gigabytes, nest, refer to themselves or never end, of all kinds",
    unit="files", quick=len(HOSTILE), soak=400, idle=[IDLE],
)  # fmt: skip
def hostile_documents(folder: Path) -> Iterator[Trial]:
    neighbour = write.html(folder / "z.html", ["A page beside it, which has to be read."])

    def trial(seed: int) -> str:
        rng = random.Random(seed)
        hostile = HOSTILE[seed % len(HOSTILE)]
        path = hostile(rng, folder)
        try:
            return _outcome(folder, path, neighbour, hostile.__name__.replace("_", " "))
        finally:
            path.unlink()

    with _less_time():
        yield trial


@workload(
    25, "documents of all kinds with flipped, cut and zeroed bytes", unit="files", quick=24, soak=2000,
    idle=[IDLE],
)  # fmt: skip
def damaged_documents(folder: Path) -> Iterator[Trial]:
    neighbour = write.html(folder / "z.html", ["A page beside it, which has to be read."])
    lines = ["A line of text.", "Işık ve güneş."] * 20
    sound = [
        write.word(folder / "a.docx", lines), write.powerpoint(folder / "a.pptx", lines),
        write.rtf(folder / "a.rtf", lines), write.opendocument(folder / "a.odt", lines),
        write.epub(folder / "a.epub", lines), write.html(folder / "a.html", lines),
        write.pdf(folder / "a.pdf", ["A line of text."] * 20),
        write.spreadsheet(folder / "a.xlsx", [lines]), write.notebook(folder / "a.ipynb", lines),
    ]  # fmt: skip
    contents = {path: path.read_bytes() for path in sound}
    for path in sound:
        path.unlink()

    def trial(seed: int) -> str:
        rng, path = random.Random(seed), sound[seed % len(sound)]
        content = bytearray(contents[path])
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            content[place : place + rng.choice([1, 1, 64])] = rng.choice([rng.randbytes(1), bytes(8), b""])
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            return _outcome(folder, path, neighbour, path.suffix)
        finally:
            path.unlink()

    with _less_time():
        yield trial


@contextlib.contextmanager
def _less_time() -> Iterator[None]:
    before, parsing.SECONDS = parsing.SECONDS, SECONDS
    try:
        yield
    finally:
        parsing.SECONDS = before


def _outcome(folder: Path, path: Path, neighbour: Path, what: str) -> str:
    """Read the folder: the file is read or left out for one reason in one line, and its neighbour is read."""
    found = find_documents(folder)
    if path not in found.paths:
        (why,) = [one.why for one in found.left_out if one.path == path]
        assert why.startswith("needs the extra"), (path, why)
        return IDLE
    start, most = time.monotonic(), _Peak()
    with Parser(folder) as parser, most:
        documents = Documents(found.paths, parser, ReadOptions())
        texts = {document.path: len(document.text) for document in documents.read()}
    assert time.monotonic() - start < LONGEST, (path, time.monotonic() - start)
    assert most.children < MEMORY_BYTES, (path, most.children)
    assert most.own < OWN_MEMORY_BYTES, (path, most.own)
    assert neighbour in texts, (path, documents.left_out)
    if path not in documents.left_out:
        return f"{what}: read in bounded memory"
    why = documents.left_out[path].why
    assert "\n" not in why, why
    assert len(why) < 200, why
    return f"{what}: left out in one line"


class _Peak:
    """The most memory that this process grew by, and that its children had, meanwhile."""

    def __enter__(self) -> None:
        self.children = self.own = 0
        self._me = psutil.Process()
        self._before = self._me.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.own = max(self.own, self._me.memory_info().rss - self._before)
            for child in self._me.children():
                with contextlib.suppress(psutil.Error):
                    self.children = max(self.children, child.memory_info().rss)
