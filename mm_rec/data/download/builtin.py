"""Real text and code that every installation carries, for machines without a network.

Code: the modules of Python's own standard library. Text: English prose from the documentation that is installed, that
is Python's language reference, the docstrings of the standard library and of installed packages, and their README and
other documentation files. The same installation gives the same documents. What questions and answers are made of
(:mod:`mm_rec.data.questions`) is read from the same places.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import import_module
from inspect import cleandoc
from itertools import islice
from pathlib import Path

from mm_rec.data.questions.entries import Entry
from mm_rec.data.questions.programs import entries_of_program
from mm_rec.data.questions.texts import entries_of_text
from mm_rec.regular_file import read_regular

__all__ = ["builtin_code", "builtin_entries", "builtin_text", "prose"]

_MAX_TEXT = 12_000_000  # bytes of all documents: more than a CPU reads in days of training
_MAX_CODE = 20_000_000
_MAX_PACKAGE = 2_500_000  # bytes of prose from one package, so that none sets the tone
_MAX_ENTRIES, _MAX_PACKAGE_ENTRIES = 25_000, 600  # for questions: of all there is, and of one package
_MAX_FILE = 500_000  # bytes; larger modules hold tables
_MIN_DOCUMENT = 300  # characters of prose in a module or file

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
_SKIPPED_FILES = re.compile(r"licen[cs]e|copying|notice|authors|change|requirements|record|top_level", re.I)
_LONG_STRING = re.compile(r"\"\"\"(.*?)\"\"\"|'''(.*?)'''", re.S)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_COMMON_WORDS = """a all also an and any are as at be because been but by can do each for from has have if in into is it
    its may more must no not of on one only or other should so such than that the their them then there these they this
    to use used was we when where which will with you your"""
_COMMON = frozenset(_COMMON_WORDS.split())


def builtin_code(root: Path | None = None) -> Iterator[str]:
    """The modules of the standard library, its tests last, or those in the folder ``root``."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = sorted(_files(root, (".py",)), key=lambda path: "test" in str(path.relative_to(root).parent))
    yield from _first(_MAX_CODE, filter(None, map(_read, files)))


def builtin_text(roots: Iterable[Path] | None = None) -> Iterator[str]:
    """Prose, one document a module or documentation file: what is installed, or what is in the folders ``roots``.

    A paragraph that occurs in many places, as inherited docstrings do, is kept once.
    """
    seen: set[str] = set()
    sources: list[Iterable[str]] = []
    if roots is None:
        reference: dict[str, str] = import_module("pydoc_data.topics").topics
        sources.append(reference.values())
        roots = _installed()
    sources.extend(map(_documentation, roots))
    documents = (text for source in sources for text in _first(_MAX_PACKAGE, _distinct_prose(source, seen)))
    yield from _first(_MAX_TEXT, documents)


def builtin_entries(roots: Iterable[Path] | None = None) -> Iterator[Entry]:
    """What questions can be made from: of Python's language reference, the standard library and installed packages.

    Tests are left out, and of a package what comes after its first entries.

    Args:
        roots: the folders to read in place of all these.
    """
    yield from islice(_all_entries(roots), _MAX_ENTRIES)


def _all_entries(roots: Iterable[Path] | None) -> Iterator[Entry]:
    if roots is None:
        reference: dict[str, str] = import_module("pydoc_data.topics").topics
        for text in reference.values():
            yield from entries_of_text(text)
        roots = _installed()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for root in roots:
        entries = _entries(root, root if root == stdlib else root.parent)
        yield from entries if root == stdlib else islice(entries, _MAX_PACKAGE_ENTRIES)


def _entries(root: Path, home: Path) -> Iterator[Entry]:
    """Yields the entries of the files below ``root``, whose modules are named as seen from ``home``."""
    for path in _files(root, (".py", ".md", ".rst", ".txt", "METADATA")):
        place = path.relative_to(home).with_suffix("")
        if any("test" in part for part in place.parts) or (path.suffix != ".py" and _SKIPPED_FILES.search(path.name)):
            continue
        content = _read(path)
        if content is None:
            continue
        if path.suffix == ".py":
            parts = place.parts[:-1] if place.name == "__init__" else place.parts
            yield from entries_of_program(content, ".".join(parts))
        else:
            yield from entries_of_text(content)


def prose(text: str) -> Iterator[str]:
    r"""The paragraphs of ``text`` that read like English prose.

    >>> list(prose("Usage\n\n>>> f(1)\n\nThis is the only paragraph that a reader would take for a piece of text."))
    ['This is the only paragraph that a reader would take for a piece of text.']
    """
    for paragraph in re.split(r"\n\s*\n", text):
        words = _WORD.findall(paragraph)
        signs = sum(map(len, paragraph.split()))
        if (
            len(words) >= 10
            and sum(word.lower() in _COMMON for word in words) >= 0.25 * len(words)
            and sum(map(len, words)) >= 0.85 * signs
            and ">>>" not in paragraph
        ):
            yield paragraph.strip()


def _installed() -> Iterator[Path]:
    """The standard library and each installed package, by name."""
    yield Path(sysconfig.get_path("stdlib"))
    for folder in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        yield from sorted(
            path for path in Path(folder).iterdir() if path.is_dir() and path.name not in _SKIPPED_FOLDERS
        )


def _documentation(root: Path) -> Iterator[str]:
    """Everything in a folder that may be documentation: long strings of modules, and whole documentation files."""
    for path in _files(root, (".py", ".md", ".rst", ".txt", "METADATA")):
        content = _read(path)
        if content is None or (path.suffix != ".py" and _SKIPPED_FILES.search(path.name)):
            continue
        if path.suffix == ".py":
            content = "\n\n".join(cleandoc(a or b) for a, b in _LONG_STRING.findall(content))
        yield content


def _distinct_prose(contents: Iterable[str], seen: set[str]) -> Iterator[str]:
    for content in contents:
        paragraphs = [paragraph for paragraph in prose(content) if paragraph not in seen]
        seen.update(paragraphs)
        document = "\n\n".join(dict.fromkeys(paragraphs))
        if len(document) >= _MIN_DOCUMENT:
            yield document


def _files(root: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """The files below ``root`` with one of the endings, by name, those of a folder before its subfolders."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(endings))


def _read(path: Path) -> str | None:
    try:
        content = read_regular(path)
        return content.decode("utf-8").replace("\r\n", "\n") if len(content) <= _MAX_FILE else None
    except (OSError, UnicodeDecodeError):
        return None  # one unreadable file of thousands is no loss


def _first(n_bytes: int, documents: Iterable[str]) -> Iterator[str]:
    """Documents until there are ``n_bytes`` of them."""
    total = 0
    for document in documents:
        if total >= n_bytes:
            return
        total += len(document.encode())
        yield document
