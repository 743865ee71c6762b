"""Documents in JSON, notebooks, RTF and PDF."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm_rec.data.documents.encoding import decode
from mm_rec.data.documents.kinds import LeftOutError
from mm_rec.data.documents.markup import tidy
from mm_rec.data.files import TEXT_FIELDS
from mm_rec.text.message import first_filled

__all__ = ["read_json", "read_notebook", "read_pdf", "read_rtf"]

_END_OF_LINE_HYPHEN = re.compile("[\x02\ufffe]\n?")


def read_json(content: bytes, encoding: str | None, columns: Sequence[str]) -> Iterator[str]:
    """Yields the texts of a JSON file: a list of strings or of objects with text, or one such object.

    The list may also be the one value of an object that is a list, and JSON lines under this name are read too.
    """
    rows = _json_rows(decode(content, encoding))
    names = list(columns) or list(TEXT_FIELDS)
    for number, row in enumerate(rows, 1):
        if isinstance(row, str) and not columns:
            yield row
            continue
        found = [row.get(name) for name in names] if isinstance(row, dict) else []
        texts = {name: text for name, text in zip(names, found, strict=False) if isinstance(text, str)}
        if not texts:
            raise LeftOutError(
                "value {number} has no text in {names}; name other fields with --columns",
                number=number,
                names=", ".join(names),
            )
        if columns:
            yield "\n\n".join(filter(None, texts.values()))
        else:
            filled = first_filled(texts, TEXT_FIELDS)
            yield texts[filled] if filled is not None else ""


def _json_rows(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            if not error.msg.startswith("Extra data"):
                raise
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:
            raise LeftOutError("damaged: not valid JSON (line {lineno})", lineno=error.lineno) from None
    except (RecursionError, ValueError):
        raise LeftOutError("nested too deeply, or a number of too many digits") from None
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        return lists[0] if len(lists) == 1 and all(isinstance(one, dict | str) for one in lists[0]) else [value]
    return value if isinstance(value, list) else [value]


def read_notebook(content: bytes, encoding: str | None) -> str:
    """Returns the text and the programs of a Jupyter notebook, without what they printed."""
    (notebook,) = _json_rows_of_notebook(decode(content, encoding))
    try:
        cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] in ("markdown", "code")]
        return "\n\n".join("".join(source) for source in cells)
    except (KeyError, TypeError):
        raise LeftOutError("damaged: not the notebook that its kind is") from None


def _json_rows_of_notebook(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        raise LeftOutError("damaged: not the notebook that its kind is") from None


def read_rtf(content: bytes) -> str:
    """Returns the text of an RTF document."""
    from striprtf.striprtf import rtf_to_text

    if not content.lstrip().startswith(b"{\\rtf"):
        raise LeftOutError("damaged: not the RTF that its kind is")
    text = content.decode("latin-1")
    stated = re.search(r"\\ansicpg(\d{3,5})", text)
    return tidy(rtf_to_text(text, encoding=f"cp{stated[1]}" if stated else "cp1252"))


def read_pdf(path: Path) -> Iterator[str]:
    """Yields the text of a PDF page by page.

    Raises:
        LeftOutError: if it is encrypted or damaged, or one of its pages cannot be read.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        encrypted = "password" in str(error).lower()
        raise LeftOutError("encrypted" if encrypted else "damaged: not the PDF that its kind is") from None
    for number in range(len(document)):
        try:
            page = document[number]
            text = page.get_textpage().get_text_bounded()
            page.close()
        except pypdfium2.PdfiumError:
            raise LeftOutError("damaged: page {number} cannot be read", number=number + 1) from None
        lines = text.replace("\r\n", "\n").replace("\r", "\n")
        yield tidy(_END_OF_LINE_HYPHEN.sub("", lines)) + "\n\n"
