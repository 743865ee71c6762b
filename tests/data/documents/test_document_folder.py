"""A folder of documents: every file is read or counted, and what is left out has a reason and a name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import document_files as write
import pytest

from mm_rec.data.documents import folder as folder_module
from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.reading import read_options
from mm_rec.data.download_data import main
from mm_rec.data.prepare import prepare
from mm_rec.data.synthetic import synthetic_code, synthetic_text
from mm_rec.errors import UserError

PROSE = synthetic_text(60)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder as people have it, in which half is no text."""
    folder = tmp_path / "docs"
    (folder / "sub" / ".git").mkdir(parents=True)
    write.word(folder / "a.docx", PROSE[:20])
    write.html(folder / "sub" / "b.html", PROSE[20:40])
    (folder / "c.md").write_text("\n\n".join(PROSE[40:]))
    (folder / "short.txt").write_text("short")
    (folder / "photo.JPG").write_bytes(b"1")
    (folder / "all.zip").write_bytes(b"1")
    (folder / "strange.xyz").write_bytes(b"1")
    (folder / "old.doc").write_bytes(b"1")
    (folder / "broken.epub").write_bytes(b"1")
    (folder / "sub" / ".git" / "config").write_text("x")
    (folder / "nowhere.txt").symlink_to("nothing")
    return folder


def test_the_table_counts_every_file(docs: Path, tmp_path: Path) -> None:
    told: list[str] = []
    prepared = prepare(tmp_path, 512, folders={"text": docs}, cache=tmp_path / "cache", progress=told.append)
    assert list(prepared.train) == ["text"]
    start = told.index("text: 11 files, 4 read and 7 left out")
    assert told[start + 1 : start + 12] == [
        "  kind       files  read  documents  left out",
        "  HTML           1     1          1",
        "  Markdown       1     1          1",
        "  Word           1     1          1",
        "  text           2     1          1  1 a link to nothing; 1 too short (a filter)",
        "  .doc           1     0          0  1 no reader; save it as .docx",
        "  .jpg           1     0          0  1 no text in pictures",
        "  .xyz           1     0          0  1 no reader for this kind",
        "  .zip           1     0          0  1 archives are not opened; unpack it",
        "  EPUB           1     0          0  1 damaged: not the archive that its kind is",
        "  no ending      1     0          0  1 hidden, as its name begins with a dot",
    ]
    assert told[start + 12] == "  --list names what is left out"
    again: list[str] = []
    prepare(tmp_path, 512, folders={"text": docs}, cache=tmp_path / "cache", progress=again.append, name_left_out=True)
    assert again[:11] == told[start : start + 11]
    named = {line.partition(": ")[2] for line in again if line.startswith("  left out: ")}
    assert {"short.txt: too short", "all.zip: archives are not opened; unpack it"} < named
    assert len(named) == 8


def test_the_command_names_what_it_leaves_out(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--text_dir", str(docs), "--output_dir", str(tmp_path / "data"), "--no_code", "--list"])
    said = capsys.readouterr().out.splitlines()
    assert f"{docs}: 11 files, 4 read and 7 left out" in said
    assert f"  left out: {docs / 'old.doc'}: no reader; save it as .docx" in said


def test_linked_folders_are_read_once_and_circles_end(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    (home / "inside").mkdir(parents=True)
    other.mkdir()
    (other / "far.txt").write_text("far")
    (home / "near.txt").write_text("near")
    (home / "link").symlink_to(other)
    (home / "again").symlink_to(other)
    (home / "inside" / "up").symlink_to(home)
    (other / "back").symlink_to(home)
    (home / "file.txt").symlink_to(other / "far.txt")
    names = [path.relative_to(home).as_posix() for path in find_documents(home).paths]
    assert names == ["file.txt", "near.txt", "again/far.txt"]


def test_what_the_program_writes_itself_is_no_document(docs: Path, tmp_path: Path) -> None:
    runs = docs / "runs"
    (runs / "stage1" / "samples").mkdir(parents=True)
    (runs / "stage1" / "samples" / "1.txt").write_text("what the model said")
    (docs / "up").symlink_to(runs / "stage1")
    for place in (runs, docs / "sub" / ".." / "runs"):
        assert runs / "stage1" / "samples" / "1.txt" not in find_documents(docs, skip=[place]).paths
    (docs / "up").unlink()
    first = prepare(tmp_path, 512, folders={"text": docs}, cache=runs / "prepared", skip=[runs])
    assert first.path.parent == runs / "prepared"
    assert prepare(tmp_path, 512, folders={"text": docs}, cache=runs / "prepared", skip=[runs]).path == first.path


def test_a_missing_extra_is_one_line_with_the_command(
    docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "x.pdf").write_bytes(b"%PDF")
    (docs / "y.xlsx").write_bytes(b"PK")
    monkeypatch.setattr(folder_module, "_is_installed", lambda package: False)
    told: list[str] = []
    prepare(tmp_path, 512, folders={"text": docs}, cache=tmp_path / "cache", progress=told.append)
    assert any(re.fullmatch(r"  PDF +1 +0 +0  1 needs the extra documents", line) for line in told)
    (line,) = [line for line in told if "pip install" in line]
    assert line.startswith("  to read what needs the extra documents: pip install ")


def test_programs_are_judged_as_programs_and_stay_whole(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, code in enumerate(synthetic_code(30)):
        (folder / f"{number:02}.py").write_bytes(code.encode())
    (folder / "torn.py").write_bytes(b"x = 1\ny = '\0'\nz = 3\n" * 9)
    (folder / "notes.txt").write_text("\n".join(PROSE))
    prepared = prepare(tmp_path, 512, folders={"text": folder}, cache=tmp_path / "cache", filters=False)
    stores = [prepared.train["text"], prepared.valid["text"]]
    texts = {prepared.tokenizer.decode(store.document(i)) for store in stores for i in range(store.n_documents)}
    assert texts == {*synthetic_code(30), "\n".join(PROSE)}
    only = find_documents(folder, programs_only=True)
    assert len(only.files) == 31
    assert [one.why for one in only.left_out] == ["no program"]


def test_where_nothing_can_be_written_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("\n".join(PROSE))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    told: list[str] = []
    prepared = prepare(data, 512, cache=tmp_path / "cache", progress=told.append)
    assert told[0] == f"nothing can be written into {data}, so the prepared data go to {tmp_path / 'cache'}"
    assert prepared.path.parent == tmp_path / "cache"
    assert not (data / "prepared").exists()


def test_encodings_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="there is no encoding 'klingon'; take utf-8"):
        read_options("klingon", None, 0)
    with pytest.raises(UserError, match="there is no encoding 'zlib'"):
        read_options("zlib", None, 0)
