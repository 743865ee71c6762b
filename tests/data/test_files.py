"""Reading data files, whole and broken: every fault is an error with file and line, or counted up to a cap."""

import gzip
import json
import lzma
import random

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mm_rec.data import files
from mm_rec.data.files import TEXT_FIELDS, BadRows, find_files, read_rows, read_texts
from mm_rec.errors import UserError

TEXTS = ["A first text.\nIt has two lines.", "Zweiter Text: äöü 漢字 🙂", "third"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}


def write_jsonl(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content))
    return path


def texts(path, cap=0):
    return list(read_texts(path, BadRows(cap)))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("field", [None, "text", "content", "code"])
def test_jsonl_plain_and_compressed(tmp_path, suffix, field):
    rows = TEXTS if field is None else [{"id": 7, field: text} for text in TEXTS]
    assert texts(write_jsonl(tmp_path / f"a.jsonl{suffix}", rows)) == TEXTS


def test_parquet(tmp_path):
    pq.write_table(pa.table({"id": [1, 2, 3], "content": TEXTS}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS
    assert next(read_rows(tmp_path / "a.parquet", BadRows())).value == {"id": 1, "content": TEXTS[0]}


def test_each_row_has_its_own_column_of_text(tmp_path):
    rows = [{"id": i, TEXT_FIELDS[i % 3]: f"text {i}"} for i in range(9)] + [{"content": "first", "code": "second"}]
    names = dict.fromkeys(("id", *TEXT_FIELDS))
    pq.write_table(pa.Table.from_pylist([names | row for row in rows]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(names | row) for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in pandas.DataFrame(rows).to_dict("records")))
    for name in ("a.parquet", "a.jsonl", "b.parquet", "b.jsonl"):
        assert texts(tmp_path / name) == [f"text {i}" for i in range(9)] + ["first"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_text_is_the_first_field_that_holds_something(tmp_path, name):
    rows = [
        {"text": "", "content": "one", "code": None},
        {"text": " ", "content": "", "code": "two"},
        {"text": "three", "content": "no", "code": ""},
        {"text": None, "content": "", "code": None},
    ]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    assert texts(tmp_path / name) == ["one", "two", "three", ""]


def test_byte_order_mark_crlf_and_blank_lines_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf"one"\r\n\r\n  \n"two"')
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]


def test_find_files(tmp_path):
    for name in ("b.jsonl", "sub/a.jsonl.gz", "sub/c.parquet", "notes.md", ".hidden/x.jsonl", ".x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(path.relative_to(tmp_path)) for path in find_files(tmp_path)] == [
        "b.jsonl",
        "sub/a.jsonl.gz",
        "sub/c.parquet",
    ]
    assert find_files(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]
    with pytest.raises(UserError, match="no file or folder"):
        find_files(tmp_path / "none")
    with pytest.raises(UserError, match=r"notes\.md.*\.jsonl\.xz"):
        find_files(tmp_path / "notes.md")


BAD_LINES = {
    "cut JSON": (b'"abc', "not valid JSON"),
    "bare words": (b"hello world", "not valid JSON"),
    "two values": (b'"a" "b"', "not valid JSON"),
    "NUL byte": (b'"a\x00b"', "not valid JSON"),
    "NUL escape": (b'"a\\u0000b"', "NUL"),
    "lone surrogate": (b'"a\\ud800b"', "lone surrogate"),
    "lone surrogate in an object": (b'{"text": "\\udfff"}', "lone surrogate"),
    "not UTF-8": (b'"a\xff"', "not UTF-8: invalid start byte at byte 2"),
    "UTF-16": ('"a"'.encode("utf-16"), "not UTF-8"),
    "number": (b"17", "not a number"),
    "huge number": (b"1" * 5000, "a number has too many digits"),
    "true": (b"true", "not true or false"),
    "null": (b"null", "not null"),
    "list": (b'["a"]', "not a list"),
    "object without text": (b'{"body": "a"}', "no string in a field text, content, code"),
    "object with a wrong text": (b'{"text": 5}', "no string in a field"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"text":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path, name):
    line, problem = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'"good"\n' + line + b'\n"better"\n')
    with pytest.raises(UserError) as error:
        texts(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert problem in str(error.value)
    assert "--skip_bad" in str(error.value)
    assert "\n" not in str(error.value)
    bad = BadRows(1)
    assert list(read_texts(path, bad)) == ["good", "better"]
    assert len(bad.found) == 1


def test_a_line_of_100_mb_is_refused_without_reading_it_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'"good"\n"' + b"x" * 10_000 + b'"\n"' + b"y" * 900 + b'"\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line is longer"):
        texts(tmp_path / "a.jsonl")
    assert texts(tmp_path / "a.jsonl", cap=1) == ["good", "y" * 900]


def test_a_line_as_long_as_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 10)
    (tmp_path / "a.jsonl").write_bytes(b'"1234567"\n"1"\n')
    assert texts(tmp_path / "a.jsonl") == ["1234567", "1"]


def test_more_bad_rows_than_the_cap_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('"a"\n' + "bad\n" * 3)
    assert texts(tmp_path / "a.jsonl", cap=3) == ["a"]
    with pytest.raises(UserError, match=r"a\.jsonl:4: .* more than 2 bad rows"):
        texts(tmp_path / "a.jsonl", cap=2)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_a_compressed_file_that_breaks_off(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", TEXTS * 100)
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.jsonl.*:\d+: the file breaks off or is damaged"):
            texts(path)
        bad = BadRows(5)
        list(read_texts(path, bad))
        assert len(bad.found) in (1, 2)  # the file, and the line in which it breaks off


def test_a_parquet_file_that_breaks_off_or_lacks_text(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:1: the object has no string"):
        texts(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"a\.parquet:1: the file breaks off or is damaged"):
        texts(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet"])
def test_random_damage_never_does_more_than_raise_an_error(tmp_path, suffix):
    chance = random.Random(17)
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS * 20}), path)
    else:
        write_jsonl(path, TEXTS * 20)
    whole = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(1, len(damaged))])])
        for cap in (0, 1000):
            try:
                assert all("\0" not in text and text.encode() is not None for text in texts(path, cap))
            except UserError as error:
                assert str(error).startswith(f"{path}:") and "\n" not in str(error)  # noqa: PT017, PT018
