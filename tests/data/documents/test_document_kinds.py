"""Every kind of document gives its text, and each fault one reason in a few words."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import document_files as write
import pytest
from document_files import PARAGRAPHS

from mm_rec.data.documents import parsing
from mm_rec.data.documents.encoding import decode, find_encoding
from mm_rec.data.documents.kinds import LeftOutError, kind_of
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions

ENGLISH = ["The first line of a page.", "And the second, with 7 words in it."]


def read(path: Path, encoding: str | None = None, columns: tuple[str, ...] = (), skip_bad: int = 0) -> list[str]:
    """The documents of a file; raises LeftOutError with the reason if it is left out."""
    with Parser(encoding=encoding, columns=columns) as parser:
        documents = Documents([path], parser, ReadOptions(encoding, columns, skip_bad))
        texts = [document.text for document in documents.read()]
        assert [document.text for document in documents.read()] == texts, "a second pass differs"
    if documents.left_out:
        assert not texts
        raise LeftOutError(documents.left_out[path].why)
    return texts


def requires(name: str) -> None:
    kind = kind_of(Path(name))
    assert kind is not None
    if kind.package is not None:
        pytest.importorskip(kind.package)


def paragraphs(text: str) -> list[str]:
    return [one for one in text.split("\n") if one]


@pytest.mark.parametrize(
    ("name", "write_file"),
    [
        ("a.docx", write.word),
        ("a.pptx", write.powerpoint),
        ("a.odt", write.opendocument),
        ("a.epub", write.epub),
        ("a.html", write.html),
        ("a.HTM", lambda path, lines: write.html(path, lines, "cp1254")),
        ("a.rtf", write.rtf),
        ("a.ipynb", write.notebook),
    ],
)
def test_paragraphs_come_out_as_they_went_in(tmp_path: Path, name: str, write_file: Callable[..., Path]) -> None:
    requires(name)
    (text,) = read(write_file(tmp_path / name, PARAGRAPHS))
    assert paragraphs(text) == PARAGRAPHS


def test_pdf(tmp_path: Path) -> None:
    requires("a.pdf")
    (text,) = read(write.pdf(tmp_path / "a.pdf", ENGLISH))
    assert paragraphs(text) == ENGLISH


def test_tables_are_lines_of_cells(tmp_path: Path) -> None:
    rows = "".join(
        "<w:tr>" + "".join(f"<w:tc><w:p><w:r><w:t>{cell}</w:t></w:r></w:p></w:tc>" for cell in row) + "</w:tr>"
        for row in (("a", "b"), ("c", "d"))
    )
    (text,) = read(write.word(tmp_path / "a.docx", ["Before"], f"<w:tbl>{rows}</w:tbl>"))
    assert text == "Before\n\na\tb\nc\td"
    cells = "<table:table-row><table:table-cell><text:p>a</text:p></table:table-cell><table:table-cell>"
    body = f"<table:table>{cells}<text:p>b</text:p></table:table-cell></table:table-row></table:table>"
    assert read(write.opendocument(tmp_path / "a.odt", ["Before"], body)) == ["Before\n\na\tb"]


def test_what_is_no_text_of_a_word_document_is_not_read(tmp_path: Path) -> None:
    body = (
        "<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:r><w:delText>gone</w:delText><w:instrText>PAGE</w:instrText>"
        "<w:t>kept</w:t><w:tab/><w:t>too</w:t></w:r><mc:AlternateContent xmlns:mc='urn:mc'><mc:Choice><w:t> once</w:t>"
        "</mc:Choice><mc:Fallback><w:t>twice</w:t></mc:Fallback></mc:AlternateContent></w:p>"
    )
    assert read(write.word(tmp_path / "a.docx", [], body)) == ["kept\ttoo once"]


def test_html_is_read_as_a_browser_shows_it(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text(
        "<title>Head</title><nav>menu</nav><p>One <b>bo</b>ld\nline.<br>New<script>x()</script></p><ul><li>a<li>b</ul>"
        "<pre> x\n  y</pre><table><tr><th>k<th>v<tr><td>1<td>2</table><p hidden>no</p>&eacute;&#351;"
    )
    assert read(page) == ["Head\n\nOne bold line.\nNew\n\na\nb\n\n x\n  y\n\nk\tv\n1\t2\n\néş"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    lines = [["ad", "yaş", "not"], ["Ayşe", "30", '"iki\nsatır"'], ["Işık", "7", "kısa"]]
    path.write_text("\n".join(delimiter.join(line) for line in lines) + "\n", "cp1254")
    assert read(path) == ["ad\tyaş\tnot\nAyşe\t30\tiki\nsatır\nIşık\t7\tkısa"]
    assert read(path, columns=("ad", "not")) == ["Ayşe\n\niki\nsatır", "Işık\n\nkısa"]
    with pytest.raises(LeftOutError, match="no column title; there are ad, yaş, not"):
        read(path, columns=("title",))


def test_spreadsheet(tmp_path: Path) -> None:
    requires("a.xlsx")
    path = write.spreadsheet(tmp_path / "a.xlsx", [["id", "body"], ["1", "Güneş"], ["2", "Two"]])
    assert read(path) == ["id\tbody\n1\tGüneş\n2\tTwo"]
    assert read(path, columns=("body",)) == ["Güneş", "Two"]


@pytest.mark.parametrize(
    ("value", "columns", "texts"),
    [
        (["a b", "c"], (), ["a b", "c"]),
        ([{"text": "a"}, {"content": "b"}], (), ["a", "b"]),
        ({"version": 1, "rows": [{"title": "t", "body": "b"}]}, ("title", "body"), ["t\n\nb"]),
        ({"text": "alone"}, (), ["alone"]),
    ],
)
def test_json(tmp_path: Path, value: object, columns: tuple[str, ...], texts: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    assert read(path, columns=columns) == texts


def test_rows_without_a_text_are_left_out_with_the_names_that_there_are(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        path = tmp_path / name
        path.write_text('{"title": "t", "n": 3}\n')
        with pytest.raises(LeftOutError, match="--columns"):
            read(path)
        assert read(path, columns=("title",)) == ["t"]


WRITTEN = {
    "cp1254": ["Işık ve güneş", "Dağ", "İŞ", "KIŞ GELDİ", "Türkçe bir belge. Şu “çığlığı” duydun mu – hayır…"],
    "iso8859_9": ["ağaç gölgesi"],
    "cp857": ["Türkçe bir belge. Şu çığlığı duydun mu?"],
    "mac_turkish": ["Türkçe bir belge. Şu çığlığı duydun mu?"],
    "cp1252": ["Größe und Maß", "L'élève a été là-bas.", "¿Qué? El niño comió piñas.", "café", "20 °C", "50 £ for “it”",
               "Müller, François, Peña and Åse met", "Það er svo gott veður í dag."],
    "cp1250": ["może być", "Zażółć gęślą jaźń", "Příliš žluťoučký kůň", "Árvíztűrő tükörfúrógép"],
    "utf-8": ["ş", "plain"],
    "utf-8-sig": ["ş"],
    "utf-16": ["Işık"],
    "utf-16-le": ["Işık ve güneş", "plain"],
    "utf-16-be": ["Işık ve güneş"],
    "utf-32": ["Işık"],
}  # fmt: skip


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in WRITTEN.items() for text in texts])
def test_encodings_are_found_out_in_short_texts_too(tmp_path: Path, encoding: str, text: str) -> None:
    assert decode(text.encode(encoding)) == text
    (tmp_path / "a.txt").write_bytes(f"{text}\r\n{text}\r\n".encode(encoding))
    assert read(tmp_path / "a.txt") == [f"{text}\n{text}\n"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "Привет, мир"),
        ("koi8_r", "Это небольшой русский текст для проверки."),
        ("cp1253", "Καλημέρα κόσμε"),
        ("cp1256", "مرحبا بالعالم"),
        ("cp932", "これは日本語の短い文章です。"),
        ("gb18030", "这是一段中文文本，用于测试。这是一段中文文本。"),
    ],
)
def test_other_scripts(encoding: str, text: str) -> None:
    pytest.importorskip("charset_normalizer")
    assert decode(text.encode(encoding)) == text


def test_what_the_user_says_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("þorn og ð".encode("cp1252"))
    assert find_encoding(path.read_bytes()) == "cp1254"  # a few letters, which are Turkish as well
    assert read(path, "cp1252") == ["þorn og ð"]
    path.write_bytes(b"\xff\xff")
    with pytest.raises(LeftOutError, match="not utf-8"):
        read(path, "utf-8")


@pytest.mark.parametrize("content", [b"one\ntwo\0\nthree", b"\0" * 100, bytes(range(256)) * 4])
def test_a_text_is_read_whole_or_not_at_all(tmp_path: Path, content: bytes) -> None:
    for name in ("a.txt", "a.py", "a.md"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LeftOutError, match="zero bytes in it, so it is no text"):
            read(tmp_path / name)


def test_a_file_that_takes_too_long_is_left_out_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = kind_of(Path("a.html"))
    assert kind is not None
    long, short = write.html(tmp_path / "a.html", PARAGRAPHS * 20_000), write.html(tmp_path / "b.html", PARAGRAPHS)
    with Parser() as parser:
        with monkeypatch.context() as patch:
            patch.setattr(parsing, "SECONDS", 0.01)
            patch.setattr(parsing, "SECONDS_A_MEGABYTE", 0.0)
            with pytest.raises(LeftOutError, match="takes longer than 0 s"):
                list(parser.texts(long, kind))
        assert [paragraphs(text) for text in parser.texts(short, kind)] == [PARAGRAPHS]


def test_a_long_text_is_cut_at_lines_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = importlib.import_module("mm_rec.data.documents.reading")
    monkeypatch.setattr(reading, "TEXT_PIECE", 10)
    path = tmp_path / "a.txt"
    path.write_text("123456\n123456\nabc\n")
    assert read(path) == ["123456\n123456\n", "abc\n"]
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 12)  # larger ones are not taken into memory as a whole
    assert read(path) == ["123456\n123456\n", "abc\n"]
    path.write_bytes("ağ\r\n".encode("cp1254") * 8)
    assert read(path) == ["ağ\nağ\nağ\nağ\n"] * 2
    path.write_bytes(b"123456\n12\0")
    with pytest.raises(LeftOutError, match="zero bytes"):
        read(path)
