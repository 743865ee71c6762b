"""The process that parses documents: whatever a file does to its reader, it does to this process alone.

Readers of PDF, archives and pages take what strangers wrote. So they run here, with a limit on memory and on the time
of each file, and a process that crashes, grows or hangs is replaced by the next (:mod:`mm_rec.data.documents.parsing`).
Requests come as lines of JSON on standard input. Each answer is some lines of JSON: ``{"text": ..., "more": ...}`` for
each piece of a document, then ``{"done": true}``, or ``{"left_out": reason}``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from mm_rec import system
from mm_rec.data.documents import markup, office, structured, tables
from mm_rec.data.documents.kinds import LeftOutError
from mm_rec.errors import is_out_of_memory
from mm_rec.regular_file import read_regular
from mm_rec.storage.files import format_bytes
from mm_rec.translation import Translatable

__all__ = ["LARGEST_FILE", "MEMORY_BYTES", "main"]

MEMORY_BYTES = 1_500_000_000
"""Of addresses, for the interpreter, its libraries and what a file is read into."""

LARGEST_FILE = 64_000_000
"""Of files that a reader takes into memory as a whole."""


class _Piece(NamedTuple):
    """A piece of text; ``more`` if the same document goes on."""

    text: str
    more: bool


def main() -> int:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="surrogatepass", newline="\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    system.limit_memory(MEMORY_BYTES)
    with open(os.devnull, "wb") as nowhere:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            # Ends the process from a thread of its own, even while a library holds the interpreter.
            faulthandler.dump_traceback_later(request["seconds"], exit=True, file=nowhere)
            _answer(request, answers)
            faulthandler.cancel_dump_traceback_later()
    return 0


def _answer(request: dict[str, object], answers: IO[str]) -> None:
    try:
        for piece in _read(Path(str(request["path"])), str(request["kind"]), request["encoding"], request["columns"]):  # type: ignore[arg-type]
            answers.write(json.dumps({"text": piece.text, "more": piece.more}, ensure_ascii=False) + "\n")
        answer: dict[str, object] = {"done": True}
    except LeftOutError as error:
        answer = {"left_out": str(error)}
    except RecursionError:
        answer = {"left_out": Translatable("nested too deeply")}
    except ModuleNotFoundError as error:
        answer = {"left_out": Translatable("its reader misses the package {name}", name=error.name)}
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        answer = {"left_out": Translatable("cannot be opened ({reason})", reason=reason)}
    except Exception as error:  # of a library that a damaged file has led astray
        kind = type(error).__name__
        damaged = Translatable("damaged ({kind})", kind=kind)
        answer = {"left_out": Translatable("needs too much memory") if is_out_of_memory(error) else damaged}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _read(path: Path, kind: str, encoding: str | None, columns: Sequence[str]) -> Iterator[_Piece]:
    """The text of a file of that kind, in pieces."""
    match kind:
        case "PDF":
            for page in structured.read_pdf(path):
                yield _Piece(page, more=True)
            yield _Piece("", more=False)
        case "Word":
            yield _Piece(office.read_word(path), more=False)
        case "PowerPoint":
            yield _Piece(office.read_powerpoint(path), more=False)
        case "OpenDocument":
            yield _Piece(office.read_opendocument(path), more=False)
        case "EPUB":
            yield _Piece(office.read_epub(path), more=False)
        case "spreadsheet":
            if path.suffix.lower() != ".xls":  # the one that is no archive
                office.check_archive(path)
            for text in tables.read_spreadsheet(path, columns):
                yield _Piece(text, more=False)
        case _:
            if path.stat().st_size > LARGEST_FILE:
                raise LeftOutError("larger than {most}, which its reader takes whole", most=format_bytes(LARGEST_FILE))
            for text in _read_content(read_regular(path), path.name, kind, encoding, columns):
                yield _Piece(text, more=False)


def _read_content(content: bytes, name: str, kind: str, encoding: str | None, columns: Sequence[str]) -> Iterator[str]:
    """The documents of a file that is read as a whole."""
    match kind:
        case "HTML":
            yield markup.read_html(content, encoding)
        case "JSON":
            yield from structured.read_json(content, encoding, columns)
        case "notebook":
            yield structured.read_notebook(content, encoding)
        case "CSV":
            yield from tables.read_csv(content, encoding, columns, name)
        case "RTF":
            yield structured.read_rtf(content)
        case _:
            raise ValueError(f"there is no reader for {kind}")


if __name__ == "__main__":
    raise SystemExit(main())
