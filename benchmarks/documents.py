"""Forty documents of ten kinds, English and Turkish, read and compared with what they were made of.

    python -m benchmarks.documents [--keep FOLDER] [--json FILE]

The texts are real: topics of Python's own documentation, the project's documents, and, in Turkish, README.tr.md and the
manual pages of Debian's packages where they are installed. Each kind is written by the library that people's programs
use for it: Word by python-docx, spreadsheets by openpyxl, PDF by matplotlib, HTML by markdown-it, Parquet by pyarrow;
text files are in UTF-8, UTF-16, Windows-1252 and Windows-1254. The score of a document is the share of words, in their
order, that the text read from it and its reference have in common (``difflib``); layout is not compared.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import gzip
import json
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from mm_rec.data.documents.account import count_kinds, table
from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions

ROOT = Path(__file__).parents[1]
OF_EACH_KIND = 4
LONGEST = 4000  # characters of a document
MANUALS = Path("/usr/share/man/tr")

Paragraphs = list[str]


class Written(NamedTuple):
    """A document, and the words that have to come out."""

    path: Path
    kind: str
    language: str
    words: list[str]


def english() -> list[Paragraphs]:
    """Topics of Python's documentation that are long enough, and the project's documents."""
    texts = [topics[name] for name in sorted(topics) if len(topics[name]) > 1500]
    texts += [(ROOT / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", "CONTRIBUTING.md")]
    return [paragraphs(text) for text in texts]


def turkish() -> list[Paragraphs]:
    """The manual pages without their commands, and the sections of README.tr.md."""
    texts = re.split(r"\n(?=## )", (ROOT / "README.tr.md").read_text(encoding="utf-8"))
    for path in sorted(MANUALS.glob("man*/*.gz")):
        page = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        lines = [line for line in page.split("\n") if not line.startswith((".", "'"))]
        texts.append(re.sub(r"\\f[A-Z]|\\&|\\", "", "\n\n".join(lines)))
    found = [paragraphs(text) for text in texts]
    return [one for one in found if sum(map(len, one)) > 600]


def paragraphs(text: str) -> Paragraphs:
    """The first paragraphs of a text, without what is layout alone."""
    found, size = [], 0
    for one in re.split(r"\n\s*\n", text):
        line = " ".join(re.sub(r"[*`|#_<>~\[\]=-]+", " ", one).split())
        if len(line) > 20 and size + len(line) < LONGEST:
            found.append(line)
            size += len(line)
    return found


def write_text(path: Path, text: Paragraphs, number: int, language: str) -> None:
    encodings = {"tr": ("cp1254", "utf-16"), "en": ("utf-8", "cp1252")}[language]
    path.write_text("\n\n".join(text), encodings[number % 2], errors="ignore")


def write_markdown(path: Path, text: Paragraphs, number: int, language: str) -> None:
    path.write_text("\n\n".join(text), "utf-8")


def write_html(path: Path, text: Paragraphs, number: int, language: str) -> None:
    from markdown_it import MarkdownIt

    encoding = "iso-8859-9" if language == "tr" and number % 2 else "utf-8"
    body = MarkdownIt().render("\n\n".join(text))
    page = f'<!doctype html><html lang="{language}"><head><meta charset="{encoding}"></head><body>{body}</body></html>'
    path.write_text(page, encoding, errors="xmlcharrefreplace")


def write_pdf(path: Path, text: Paragraphs, number: int, language: str) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    mpl.rcParams["pdf.fonttype"] = 42
    mpl.rcParams["text.parse_math"] = False
    lines = [line for one in text for line in (*re.findall(r".{1,80}(?:\s|$)", one), "")]
    with PdfPages(path) as pages:
        for start in range(0, len(lines), 50):
            page = Figure(figsize=(8, 11))
            page.text(0.08, 0.95, "\n".join(lines[start : start + 50]), va="top", fontsize=9)
            pages.savefig(page)


def write_word(path: Path, text: Paragraphs, number: int, language: str) -> None:
    import docx

    document = docx.Document()
    for one in text:
        document.add_paragraph(one)
    document.save(str(path))


def write_epub(path: Path, text: Paragraphs, number: int, language: str) -> None:
    names = [f"{i}.xhtml" for i in range(len(text))]
    items = "".join(f'<item id="c{i}" href="{name}"/>' for i, name in enumerate(names))
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(names)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("META-INF/container.xml", '<container><rootfile full-path="EPUB/book.opf"/></container>')
        book.writestr("EPUB/book.opf", f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>")
        for name, one in zip(names, text, strict=True):
            book.writestr(
                f"EPUB/{name}", f'<?xml version="1.0" encoding="utf-8"?><html><body><p>{escape(one)}</p></body></html>'
            )


def write_csv(path: Path, text: Paragraphs, number: int, language: str) -> None:
    encoding, delimiter = ("cp1254", ";") if language == "tr" else ("utf-8", ",")
    with path.open("w", encoding=encoding, errors="ignore", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["no", "text"])
        rows.writerows(enumerate(text))


def write_spreadsheet(path: Path, text: Paragraphs, number: int, language: str) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["no", "text"])
    for row in enumerate(text):
        book.active.append(list(row))
    book.save(path)


def write_jsonl(path: Path, text: Paragraphs, number: int, language: str) -> None:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in text))


def write_parquet(path: Path, text: Paragraphs, number: int, language: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": text}), path)


WRITERS: dict[str, Callable[[Path, Paragraphs, int, str], None]] = {
    ".txt": write_text,
    ".md": write_markdown,
    ".html": write_html,
    ".pdf": write_pdf,
    ".docx": write_word,
    ".epub": write_epub,
    ".csv": write_csv,
    ".xlsx": write_spreadsheet,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def write_documents(folder: Path) -> list[Written]:
    """Write forty documents into ``folder``."""
    sources = {"en": english(), "tr": turkish()}
    written = []
    for place, (ending, write) in enumerate(WRITERS.items()):
        for number in range(OF_EACH_KIND):
            language = ("en", "tr")[number % 2]
            texts = sources[language]
            text = texts[(place * OF_EACH_KIND + number) // 2 % len(texts)]
            path = folder / f"{language}-{place}-{number}{ending}"
            write(path, text, number // 2, language)
            written.append(Written(path, ending, language, words(text)))
    return written


def words(text: Sequence[str]) -> list[str]:
    """The words of paragraphs, in their order."""
    return " ".join(text).split()


def similarity(found: list[str], reference: list[str]) -> float:
    """The share of words in common and in order, from 0 to 1."""
    return difflib.SequenceMatcher(None, found, reference, autojunk=False).ratio()


def main() -> None:
    """Write the documents, read them, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for the documents, which stay there")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        written = write_documents(folder)
        start = time.monotonic()
        found = find_documents(folder)
        texts: dict[Path, list[str]] = {}
        with Parser() as reader:
            documents = Documents(found.paths, reader, ReadOptions())
            for document in documents.read():
                texts.setdefault(document.path, []).append(document.text)
        seconds = time.monotonic() - start
    left_out = [*found.left_out, *documents.left_out.values()]
    for line in table("documents", count_kinds(documents), left_out, []):
        print(line)
    scores = [similarity(words(texts.get(one.path, [])), one.words) for one in written]
    rows = []
    print(f"\n{'document':20}{'language':10}{'words':>8}{'similarity':>12}")
    for one, score in zip(written, scores, strict=True):
        print(f"{one.path.name:20}{one.language:10}{len(one.words):8,}{score:12.4f}")
        known = {"kind": one.kind, "language": one.language, "words": len(one.words)}
        rows.append({**known, "similarity": round(score, 4)})
    lowest, kind = min((score, one.kind) for score, one in zip(scores, written, strict=True))
    print(f"\n{len(rows)} documents in {seconds:.1f} s; the lowest similarity is {lowest:.4f} ({kind})")
    if options.json is not None:
        options.json.write_text(json.dumps({"seconds": round(seconds, 2), "documents": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
