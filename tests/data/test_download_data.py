"""The command: the guides' flags, the way to other sources, and what happens without a hub."""

import gzip
import json
import re

import pytest
from made_up_entries import made_up_entries

from mm_rec.data import download_data
from mm_rec.data.conversations import parse_conversation
from mm_rec.data.documents.reading import ReadOptions
from mm_rec.data.download import builtin, local
from mm_rec.data.download.sources import DEFAULT_SOURCES, SOURCES, describe_sources, find_source
from mm_rec.data.download_data import Request, download, main
from mm_rec.data.files import BadRows, read_texts
from mm_rec.data.manifest import read_manifest
from mm_rec.data.prepare import prepare
from mm_rec.data.synthetic import synthetic_code, synthetic_text
from mm_rec.errors import UserError
from mm_rec.program import run_program
from mm_rec.storage.lock import Lock


@pytest.fixture
def fetched(monkeypatch):
    """What would have been downloaded, in place of downloading it."""
    calls = []

    def record(source, samples, data_dir, tell):
        calls.append((source.name, samples))
        return data_dir / source.path

    monkeypatch.setattr(download_data, "fetch", record)
    return calls


@pytest.fixture
def no_hub(connect, monkeypatch):
    connect.point_to("http://127.0.0.1:9")
    monkeypatch.setattr(builtin, "_MAX_TEXT", 200_000)
    monkeypatch.setattr(builtin, "_MAX_CODE", 200_000)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", [("wikitext", 20_000), ("python", 2_000)]),
        ("--text_samples 500 --code_samples 500", [("wikitext", 500), ("python", 500)]),
        ("--text_samples 1000 --no_code", [("wikitext", 1000)]),
        ("--code_samples 1000 --no_wikitext", [("python", 1000)]),
        ("--source c4 --source codesearchnet --code_samples 7", [("c4", 20_000), ("codesearchnet", 7)]),
        ("--source alpaca --source sharegpt --chat_samples 9", [("alpaca", 9), ("sharegpt", 9)]),
        ("--source the_pile", [("pile", 20_000)]),
    ],
)
def test_flags(tmp_path, fetched, capsys, flags, expected):
    assert main(["--output_dir", str(tmp_path / "new" / "data"), *flags.split()]) == 0
    assert fetched == expected
    assert ("train_cpu --stage stage1 --data_dir" in capsys.readouterr().out) == ("alpaca" not in flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--text_samples 0", "--text_samples: must be a whole number of at least 1"),
        ("--text_samples many", "--text_samples: must be"),
        ("--no_such_flag", "unrecognized"),
        ("--no_code --no_wikitext", "nothing to download"),
        ("--source wikitekst", "did you mean wikitext"),
        ("--source nothing-like-it", "there are wikitext, .*builtin"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, fetched, capsys, flags, message):
    def program():
        return main(["--output_dir", str(tmp_path), *flags.split()])

    try:
        code = run_program(program)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert fetched == []


def test_help_shows_every_source(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in SOURCES)
    assert "builtin" in text


def test_the_table_has_what_the_guides_name():
    named = [
        "wikitext-2",
        "wikitext-103",
        "openwebtext",
        "c4",
        "pile",
        "the-stack",
        "python",
        "codesearchnet",
        "alpaca",
    ]
    assert all(find_source(name) for name in [*named, "sharegpt", "ultrachat", *DEFAULT_SOURCES])
    assert all("/" in source.hub_id for source in SOURCES.values())
    assert len({source.path for source in SOURCES.values()}) == len(SOURCES)
    assert (SOURCES["wikitext"].path, SOURCES["python"].path) == ("text/wikitext.jsonl", "code/code.jsonl")
    text = describe_sources()
    assert "gated" in text
    assert "the-eye.eu, is gone" in text
    assert "403" in text


def test_without_a_hub_the_command_fails_and_names_the_remedies(tmp_path, no_hub):
    with pytest.raises(UserError, match=r"cannot be reached .*HF_ENDPOINT.*--source builtin.*--use_synthetic"):
        main(["--output_dir", str(tmp_path)])


def test_without_a_hub_the_builtin_source_can_take_its_place(tmp_path, no_hub):
    told = []
    files = download(tmp_path, on_unreachable="builtin", tell=told.append)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["text/builtin.jsonl", "code/builtin.jsonl"]
    assert "cannot be reached" in told[0]
    assert "taking the builtin text in place of wikitext" in told[0]
    assert {entry["source"] for entry in read_manifest(tmp_path).values()} == {"builtin"}
    before = [file.stat().st_mtime_ns for file in files]
    told.clear()
    assert download(tmp_path, on_unreachable="builtin", tell=told.append) == files
    assert [file.stat().st_mtime_ns for file in files] == before
    assert sum("is there already" in line for line in told) == 2
    assert set(prepare(tmp_path, 512).train) == {"text", "code"}


def test_the_builtin_source_by_name(tmp_path, no_hub):
    assert (
        main(["--output_dir", str(tmp_path), "--source", "builtin", "--text_samples", "3", "--no_code", "--no_chat"])
        == 0
    )
    assert len(list(read_texts(tmp_path / "text" / "builtin.jsonl", BadRows()))) == 3
    assert not (tmp_path / "code").exists()


def test_own_files(tmp_path, fetched):
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.txt").write_text("A text of my own.\n")
    (own / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Another one."}\nbroken\n'))
    data = tmp_path / "data"
    with pytest.raises(UserError, match=r"b\.jsonl\.gz:2: not valid JSON"):
        download(data, Request({}, text_dir=own))
    assert not list(data.rglob("*.jsonl")) + list(data.rglob(".own*"))
    told = []
    download(data, Request({}, text_dir=own, reading=ReadOptions(skip_bad=1)), tell=told.append)
    lines = (data / "text" / "own.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ["A text of my own.\n", "Another one."]
    assert fetched == []  # on documents of one's own alone
    assert any("1 bad rows left out" in line for line in told)


def test_own_code_is_a_folder_of_programs(tmp_path, fetched):
    (tmp_path / "src" / "pack").mkdir(parents=True)
    (tmp_path / "src" / "pack" / "a.py").write_text("print(1)\n")
    (tmp_path / "src" / "notes.md").write_text("no program\n")
    download(tmp_path / "data", Request({}, code_dir=tmp_path / "src", text=False))
    assert list(read_texts(tmp_path / "data" / "code" / "own.jsonl", BadRows())) == ["print(1)\n"]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"1")
    told = []
    with pytest.raises(UserError, match=r"no document in .*; what is read are \.txt"):
        download(tmp_path / "data", Request({}, text_dir=tmp_path / "pictures", code=False), tell=told.append)
    assert told[0].endswith("1 files, 0 read and 1 left out")


@pytest.mark.parametrize("source", ["own", "builtin"])
def test_a_file_put_there_by_hand_is_not_overwritten(tmp_path, fetched, source):
    other, mine = tmp_path / "other.txt", tmp_path / "data" / "text" / f"{source}.jsonl"
    other.write_text("Another text.\n")
    mine.parent.mkdir(parents=True)
    mine.write_text('"mine"\n')
    request = (
        Request({"text": 1}, text_dir=other) if source == "own" else Request({"text": 1}, ("builtin",), code=False)
    )
    with pytest.raises(UserError, match="is in the way"):
        download(tmp_path / "data", request)
    assert mine.read_text() == '"mine"\n'
    with pytest.raises(UserError, match="in the data folder already"):
        download(tmp_path / "data", Request({}, text_dir=mine.parent))


def test_own_files_that_are_not_there(tmp_path, fetched):
    (tmp_path / "empty").mkdir()
    for path, message in (("none", "no file or folder"), ("empty", "no document in")):
        with pytest.raises(UserError, match=message):
            download(tmp_path / "data", Request({}, code_dir=tmp_path / path, text=False))


def test_two_processes_do_not_write_into_one_folder(tmp_path, fetched):
    lock = Lock(tmp_path / ".lock")
    with pytest.raises(UserError, match="in use"):
        download(tmp_path)
    lock.release()
    download(tmp_path)


def test_both_domains_from_the_guides_command_to_tokens(tmp_path, connect):
    from hub_samples import CARD, PYTHON, compressed
    from hub_stub import Repository

    def repository(field, texts, config="default"):
        card = CARD.format("data-*").replace("default", config).encode()
        return Repository({"README.md": card, "data-0.json.gz": compressed([{field: text} for text in texts])})

    wikitext = repository("text", synthetic_text(60), "wikitext-103-raw-v1")
    connect({"Salesforce/wikitext": wikitext, PYTHON: repository("content", synthetic_code(60))})
    assert main(["--output_dir", str(tmp_path), "--text_samples", "50", "--code_samples", "50"]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json*")) == [
        "code/code.jsonl", "manifest.json", "text/wikitext.jsonl",
    ]  # fmt: skip
    report = prepare(tmp_path, 512).report["domains"]
    assert {name: entry["read"] for name, entry in report.items()} == {"text": 50, "code": 50}


def test_the_builtin_source_has_questions_for_both_tasks_and_some_to_test_with(tmp_path, no_hub, monkeypatch):
    monkeypatch.setattr(local, "builtin_entries", lambda: made_up_entries(900))
    told = []
    request = Request({"text": 1, "code": 1, "instruct": 300}, ("builtin",))
    files = download(tmp_path, request, tell=told.append)
    rows = {file.parent.name: file.read_text().splitlines() for file in files}
    assert list(rows) == ["text", "code", "instruct", "chat", "questions"]
    assert (len(rows["instruct"]), len(rows["chat"])) == (300, 100)
    asked = [{json.loads(row)["entry"] for row in rows[kind]} for kind in ("instruct", "questions")]
    assert asked[1]
    assert not asked[0] & asked[1]
    assert all(parse_conversation(json.loads(row)) for kind in ("instruct", "chat") for row in rows[kind])
    before = [file.stat().st_mtime_ns for file in files]
    assert download(tmp_path, request, tell=told.append) == files
    assert [file.stat().st_mtime_ns for file in files] == before
