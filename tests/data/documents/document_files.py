"""Writes documents of each kind from paragraphs, with nothing but Python: whole ones, and what belongs into them."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

PARAGRAPHS = [
    "Işık ve güneş: çocuklar öğleden sonra bahçede oynuyor.",
    "The second paragraph has a few more words & signs, such as <these>.",
    "Sonuncu satır; ağaçların gölgesi uzun, İstanbul'da akşam oluyor.",
]
"""Turkish and English, with what markup has to escape."""

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
ODF = "urn:oasis:names:tc:opendocument:xmlns:"


def archive(path: Path, parts: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return path


def word(path: Path, paragraphs: Sequence[str], body: str = "") -> Path:
    runs = "".join(f"<w:p><w:r><w:t>{escape(one)}</w:t></w:r></w:p>" for one in paragraphs)
    xml = f'<?xml version="1.0"?><w:document xmlns:w="{WORD}"><w:body>{runs}{body}</w:body></w:document>'
    return archive(path, {"[Content_Types].xml": "<Types/>", "word/document.xml": xml})


def powerpoint(path: Path, paragraphs: Sequence[str]) -> Path:
    names = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" xmlns:p="urn:p"'
    slides = {
        f"ppt/slides/slide{number}.xml": f"<p:sld {names}><a:p><a:r><a:t>{escape(one)}</a:t></a:r></a:p></p:sld>"
        for number, one in enumerate(paragraphs, 1)
    }
    return archive(path, dict(reversed(slides.items())))


def opendocument(path: Path, paragraphs: Sequence[str], body: str = "") -> Path:
    names = f'xmlns:text="{ODF}text:1.0" xmlns:office="{ODF}office:1.0" xmlns:table="{ODF}table:1.0"'
    lines = "".join(f"<text:p>{escape(one)}</text:p>" for one in paragraphs)
    content = f"<office:document-content {names}>{lines}{body}</office:document-content>"
    return archive(path, {"META-INF/manifest.xml": "<manifest/>", "content.xml": content})


def epub(path: Path, paragraphs: Sequence[str]) -> Path:
    chapters = {
        f"OEBPS/{i}.xhtml": f"<html><body><p>{escape(one)}</p></body></html>" for i, one in enumerate(paragraphs)
    }
    items = "".join(f'<item id="c{i}" href="{i}.xhtml"/>' for i in range(len(paragraphs)))
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(paragraphs)))
    package = f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>"
    container = '<container><rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
    return archive(path, {"META-INF/container.xml": container, "OEBPS/book.opf": package, **chapters})


def html(path: Path, paragraphs: Sequence[str], encoding: str = "utf-8") -> Path:
    lines = "".join(f"<p>{escape(one)}</p>" for one in paragraphs)
    page = f'<html><head><meta charset="{encoding}"><style>p {{}}</style></head><body>{lines}</body></html>'
    path.write_text(page, encoding)
    return path


def rtf(path: Path, paragraphs: Sequence[str]) -> Path:
    def coded(text: str) -> str:
        return "".join(one if one < "\x7f" else f"\\'{one.encode('cp1254').hex()}" for one in text)

    lines = "\\par\\par ".join(coded(one) for one in paragraphs)
    path.write_text(f"{{\\rtf1\\ansi\\ansicpg1254 {lines}}}", "ascii")
    return path


def pdf(
    path: Path, lines: Sequence[str], *, trailer: str = "", extra: Sequence[bytes] = (), kids: str = "[3 0 R]"
) -> Path:
    """A PDF of one page of ASCII lines."""
    shown = " ".join(f"({line.replace('(', '').replace(')', '')}) Tj 0 -14 Td" for line in lines)
    stream = zlib.compress(f"BT /F1 12 Tf 72 720 Td {shown} ET".encode())
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids {kids} /Count 1 >>".encode(),
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(stream)} /Filter /FlateDecode >>\nstream\n".encode() + stream + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        *extra,
    ]
    content, places = b"%PDF-1.5\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n".encode() + one + b"\nendobj\n"
    start = len(content)
    content += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    content += b"".join(f"{place:010} 00000 n \n".encode() for place in places)
    content += f"trailer << /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode()
    path.write_bytes(content)
    return path


def encrypted_pdf(path: Path) -> Path:
    key = "<" + "ab" * 32 + ">"
    encrypt = f"<< /Filter /Standard /V 1 /R 2 /O {key} /U {key} /P -4 >>".encode()
    return pdf(path, ["secret"], trailer=f"/Encrypt 6 0 R /ID [{key} {key}]", extra=[encrypt])


def spreadsheet(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    cells = "".join(
        "<row>" + "".join(f'<c t="inlineStr"><is><t>{escape(cell)}</t></is></c>' for cell in row) + "</row>"
        for row in rows
    )
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    sheet = f'<Relationship Id="r1" Type="{office}/worksheet" Target="worksheets/sheet1.xml"/>'
    book = f'<Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/>'
    return archive(
        path,
        {
            "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>',
            "_rels/.rels": f'<Relationships xmlns="{relations}">{book}</Relationships>',
            "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{relations}">{sheet}</Relationships>',
            "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
            '<sheet name="one" sheetId="1" r:id="r1"/></sheets></workbook>',
            "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
        },
    )


def notebook(path: Path, paragraphs: Sequence[str]) -> Path:
    cells = [{"cell_type": "markdown", "source": [one]} for one in paragraphs]
    path.write_text(json.dumps({"cells": [*cells, {"cell_type": "raw", "source": ["no"]}], "nbformat": 4}), "utf-8")
    return path
