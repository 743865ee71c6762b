"""Whatever stands where a file should be, nobody waits for it: readers and writers refuse it in one line."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mm_rec.data.blocks import BlockArray
from mm_rec.data.conversations import find_conversations, read_conversations
from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.reading import ReadOptions
from mm_rec.data.download.local import take_own
from mm_rec.data.files import BadRows, find_files, read_texts
from mm_rec.data.manifest import read_manifest as read_download_manifest
from mm_rec.data.pack import Document, TokenStore, write_store
from mm_rec.errors import UserError
from mm_rec.inference import session_file
from mm_rec.regular_file import append_regular, open_regular, read_regular
from mm_rec.scripts.doctor_command import check_run
from mm_rec.scripts.sampling_options import read_json_schema
from mm_rec.storage.adapter import read_adapter
from mm_rec.storage.files import read_manifest
from mm_rec.storage.hf_folder import read_saved_weights
from mm_rec.storage.lock import owner_of
from mm_rec.storage.reading import read_file, read_tensors
from mm_rec.storage.resume import open_run, rewind
from mm_rec.storage.run_folder import RunFolder
from mm_rec.storage.yaml_file import read_yaml
from mm_rec.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here"),
]
ENTRY = {"bytes": 0, "sha256": "0" * 64}


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "link") == b"abc" * 100_000


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", tmp_path, Path("/dev/zero")):
            for attempt in (open_regular, append_regular):
                with pytest.raises(OSError, match=f"'{path}'"):
                    attempt(path)


def test_a_file_is_added_to_and_made_if_it_is_missing(tmp_path: Path) -> None:
    for _ in range(2):
        with append_regular(tmp_path / "file") as file:
            file.write(b"abc")
    assert file.closed
    assert read_regular(tmp_path / "file") == b"abcabc"


READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": lambda path: read_manifest(path.parent),
    "downloads/manifest.json": lambda path: read_download_manifest(path.parent),
    "model.safetensors": lambda path: read_tensors(path, ENTRY),
    "config.json": lambda path: read_file(path, ENTRY),
    "saved/model.safetensors": lambda path: read_saved_weights(path.parent),
    "saved/model.safetensors.index.json": lambda path: read_saved_weights(path.parent),
    "adapter/adapter_config.json": lambda path: read_adapter(path.parent),
    "tokenizer.json": lambda path: Tokenizer.load(path.parent),
    "tokens.bin": lambda path: BlockArray(path, np.dtype(np.uint8), 0, "", path.parent),
    "settings.yaml": read_yaml,
    "schema.json": read_json_schema,
    "session.safetensors": session_file.read,
    "a.json": find_conversations,
    "b.json": lambda path: list(read_conversations(path, BadRows())),
    **{f"a{ending}": find_documents for ending in (".txt", ".pdf", ".jsonl")},
    **{f"c{ending}": find_files for ending in (".jsonl", ".parquet")},
    **{
        f"b{ending}": lambda path: list(read_texts(path, BadRows()))
        for ending in (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
    },
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=str(path.parent)) as error:
        READERS[name](path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["index.json", "tokens.bin", "offsets.npy", "n_bytes.npy"])
def test_a_pipe_in_a_token_store_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    write_store(path, [Document([1, 2], 2)], vocab_size=300)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UserError, match=name) as error:
        TokenStore.open(path)
    assert "\n" not in str(error.value)


def _train(run: RunFolder) -> None:
    """Everything that is written into a run folder but checkpoints."""
    rewind(run)
    run.log_metrics(1, loss=1.0)
    run.log_loss(1, 1.0)
    run.log_timing(1, seconds=1.0)
    run.event("a line")


@pytest.mark.parametrize("read", [False, True], ids=["that nobody reads", "that somebody reads"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "loss_log.txt", "timing.jsonl", "events.log", "run.lock"])
def test_a_pipe_in_a_run_folder_is_refused_in_one_line(name: str, read: bool, tmp_path: Path) -> None:
    with open_run(tmp_path, "stage1", {"lr": 0.1}) as run:
        path = run.path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if read else None
    with pytest.raises(UserError, match=str(path)) as error, open_run(tmp_path, "stage1", {"lr": 0.1}) as run:
        _train(run)
    assert "\n" not in str(error.value)
    assert [finding.text for finding in check_run(path.parent) if finding.level == "broken"] == [
        f"{path} is a pipe, a device or a folder, not a file; move it away"
    ]
    if reader is not None:
        os.close(reader)
    path.unlink()
    with open_run(tmp_path, "stage1", {"lr": 0.1}) as run:
        _train(run)


def test_a_pipe_in_place_of_a_lock_file_has_no_owner(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.lock")
    assert owner_of(tmp_path / "run.lock") is None


def test_own_data_are_copied_where_a_pipe_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a text of mine")
    (tmp_path / "data" / "text").mkdir(parents=True)
    os.mkfifo(tmp_path / "data" / "text" / ".own.jsonl.part")
    target = take_own("text", tmp_path / "mine.txt", ReadOptions(), tmp_path / "data", lambda line: None)
    assert target.read_text() == '"a text of mine"\n'


def test_folders_are_searched_for_regular_files(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json"):
        os.mkfifo(tmp_path / name)
    assert [one.why for one in find_documents(tmp_path).left_out] == ["a pipe or a device"] * 3
    (tmp_path / "b.jsonl").write_text("")
    assert find_files(tmp_path) == find_conversations(tmp_path) == [tmp_path / "b.jsonl"]
