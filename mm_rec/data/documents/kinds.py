"""The kinds of files that documents come in: one table by the ending of the name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mm_rec.data.files import SUFFIXES
from mm_rec.translation import Translatable

__all__ = ["KINDS", "PROGRAM", "Kind", "LeftOutError", "kind_of", "readable_endings", "why_unread"]


class LeftOutError(Exception):
    """A file is not used; the message is the reason in a few words, as it stands in the table of what was read."""

    def __init__(self, template: str, /, **fields: object) -> None:
        super().__init__(Translatable(template, **fields))


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the kind, as it stands in the table.
        endings: of the names of its files, in lower case.
        how: ``plain`` is text as it stands, ``rows`` has a document a row (:mod:`mm_rec.data.files`), ``parsed`` is
            read by a function of the worker process (:mod:`mm_rec.data.documents.worker`).
        package: that reads it and comes with an extra, by the name that it is imported by; None for Python itself.
        unpacks_to: about how many bytes of text a byte of such a file holds.
    """

    name: str
    endings: tuple[str, ...]
    how: Literal["plain", "rows", "parsed"]
    package: str | None = None
    unpacks_to: float = 1.0


PROGRAM = Kind(
    Translatable("source code"),
    (
        ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".swift", ".js",
        ".jsx", ".ts", ".tsx", ".rb", ".php", ".sh", ".sql", ".lua", ".r", ".jl", ".scala", ".hs", ".ml", ".cs",
    ),
    "plain",
)  # fmt: skip
"""Programs: judged by rules of their own, and what ``--code_dir`` is for."""

KINDS = (
    Kind(Translatable("text"), (".txt", ".text", ".log", ".srt", ".vtt"), "plain"),
    Kind("Markdown", (".md", ".markdown", ".mdx", ".rst", ".org", ".adoc", ".tex"), "plain"),
    Kind("JSONL", tuple(one for one in SUFFIXES if one.startswith(".jsonl")), "rows"),
    Kind("Parquet", (".parquet",), "rows", "pyarrow", 2.5),
    PROGRAM,
    Kind("HTML", (".html", ".htm", ".xhtml"), "parsed", None, 0.5),
    Kind("JSON", (".json",), "parsed", None, 0.8),
    Kind(Translatable("notebook"), (".ipynb",), "parsed", None, 0.3),
    Kind("CSV", (".csv", ".tsv", ".tab"), "parsed"),
    Kind("Word", (".docx", ".docm"), "parsed", None, 0.5),
    Kind("OpenDocument", (".odt", ".odp"), "parsed", None, 0.5),
    Kind("PowerPoint", (".pptx", ".pptm"), "parsed", None, 0.1),
    Kind("EPUB", (".epub",), "parsed"),
    Kind("PDF", (".pdf",), "parsed", "pypdfium2", 0.2),
    Kind(Translatable("spreadsheet"), (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"), "parsed", "python_calamine"),
    Kind("RTF", (".rtf",), "parsed", "striprtf", 0.3),
)
"""All kinds that can be read."""

_NO_ENDING = Kind(Translatable("no ending"), (), "plain")

_UNREAD = {
    Translatable("archives are not opened; unpack it"): (
        ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".jar", ".whl",
    ),
    Translatable("no reader; save it as .docx"): (".doc", ".dot", ".wps", ".pages"),
    Translatable("no reader; save it as .pptx"): (".ppt", ".key"),
    Translatable("no reader; save it as .epub"): (".mobi", ".azw", ".azw3", ".djvu", ".fb2"),
    Translatable("no text in pictures"): (
        ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".ico", ".heic",
    ),
    Translatable("no text in sound and film"): (
        ".mp3", ".wav", ".flac", ".ogg", ".m4a", ".mp4", ".mkv", ".avi", ".mov", ".webm",
    ),
}  # fmt: skip
"""Why common kinds are not read."""


def kind_of(path: Path) -> Kind | None:
    """Returns the kind of a file by its name; None if there is no reader for it.

    >>> kind_of(Path("report.PDF")).name, kind_of(Path("README")).name, kind_of(Path("a.png"))
    ('PDF', 'no ending', None)
    """
    name = path.name.lower()
    for kind in KINDS:
        if name.endswith(kind.endings):
            return kind
    return _NO_ENDING if not path.suffix else None


def why_unread(path: Path) -> str:
    """Returns why a file of no known kind is not read, with a remedy where there is one."""
    ending = path.suffix.lower()
    return next((why for why, endings in _UNREAD.items() if ending in endings), Translatable("no reader for this kind"))


def readable_endings() -> str:
    """Returns the endings of all files that can be read, for messages."""
    return ", ".join(ending for kind in KINDS for ending in kind.endings)
