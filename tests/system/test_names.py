"""Names that are one file on some systems, or none, and files that stay where they are while somebody reads them."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from mm_rec import system
from mm_rec.data.documents.reading import ReadOptions
from mm_rec.data.download.local import take_own
from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_conversations import prepare_conversations
from mm_rec.data.prepare_recall import add_recall_rows
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.serve.errors import ApiError
from mm_rec.serve.sessions import SessionStore
from mm_rec.storage import checkpoint, files
from mm_rec.storage.lock import Lock

PROBLEM = "Windows keeps the name nul for a device"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without files called nul, and without backslashes in names."""

    def problem(name: str) -> str | None:
        return PROBLEM if name.split(".")[0] == "nul" else "no such names" if "\\" in name else None

    monkeypatch.setattr(system, "name_problem", problem)


@pytest.mark.usefixtures("refused")
def test_names_that_a_system_has_not_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    for write in (
        lambda: files.write_atomic(tmp_path / "nul.json", b"x"),
        lambda: files.atomic_folder(tmp_path / "nul").__enter__(),
        lambda: Lock(tmp_path / ".nul.lock", of=tmp_path / "nul"),
    ):
        with pytest.raises(UserError, match=f"{PROBLEM}; use another name"):
            write()
    assert list(tmp_path.iterdir()) == []
    store = SessionStore.__new__(SessionStore)
    with pytest.raises(ApiError, match=PROBLEM), store.turn("nul"):
        pass


@pytest.mark.usefixtures("refused")
def test_a_manifest_leads_out_of_its_folder_by_no_sign(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("x")
    path = tmp_path / "folder" / files.MANIFEST
    assert list(files.read_manifest(path.parent)) == ["inside"]
    content = json.loads(path.read_bytes())
    for name in ("..\\outside", "C:\\outside", "\\\\host\\share"):
        content["files"] = {name: {"bytes": 1, "sha256": "0" * 64}}
        path.write_bytes(files._manifest_bytes(content["files"]))
        with pytest.raises(files.DamageError, match="is damaged"):
            files.read_manifest(path.parent)


@pytest.mark.parametrize("name", ["data", "DATA"])
def test_own_data_is_not_copied_into_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The second name is the same folder, as where case does not count; the system's own paths keep the case."""
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "one.txt").write_text("A text.")
    if name != "data":
        (tmp_path / name).symlink_to(tmp_path / "data")
        monkeypatch.setattr(Path, "resolve", Path.absolute)
    for path in (tmp_path / name / "text", tmp_path / name / "text" / "one.txt"):
        with pytest.raises(UserError, match="is in the data folder already"):
            take_own("text", path, ReadOptions(), tmp_path / "data", lambda line: None)
    take_own("text", tmp_path / name / "text", ReadOptions(), tmp_path / "other", lambda line: None)
    assert (tmp_path / "other" / "text" / "own.jsonl").exists()


def test_a_checkpoint_that_somebody_reads_is_pruned_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"step_{step:06d}" for step in range(1, 5)]
    for name in names:
        (tmp_path / name).mkdir()
    rename = system.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == names[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", refuse)
        patch.setattr(system, "is_in_use", lambda error: isinstance(error, PermissionError))
        assert [path.name for path in checkpoint.prune(tmp_path, 2)] == [names[1]]
        with pytest.raises(files.InUseError, match="another program has it open"):
            files.remove_folder(tmp_path / names[0])
    assert [path.name for path in checkpoint.prune(tmp_path, 2)] == [names[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == names[2:]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which files are open")
def test_nothing_is_open_in_a_folder_that_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows would not rename it."""
    rename = system.rename
    renamed = []

    def check(source: Path, target: Path) -> None:
        for number in os.listdir("/proc/self/fd"):
            path = Path("/proc/self/fd") / number
            assert not path.is_symlink() or source not in Path(os.readlink(path)).parents
        renamed.append(target.parent.name)
        rename(source, target)

    monkeypatch.setattr(system, "rename", check)
    write_synthetic(tmp_path / "data", 40)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepared = prepare(tmp_path / "data", 300)
    add_recall_rows(prepared, share=0.1, seed=1, longest=200)
    prepare_conversations(tmp_path / "rows.jsonl", prepared.tokenizer, name="chat", cache=tmp_path / "conversations")
    assert renamed == ["prepared", "prepared", "conversations"]
