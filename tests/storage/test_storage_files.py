"""Files and folders that are whole or not there, whatever call of the system fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mm_rec.storage import files
from mm_rec.storage.files import DamageError, StorageError
from mm_rec.system import REMOVES_OPEN_FILES

OLD, NEW = b"old content", b"new content, a little longer"


def write_old_and_new(folder: Path) -> Path:
    path = folder / "file"
    files.write_atomic(path, OLD)
    files.write_atomic(path, NEW)
    return path


def make_folder(path: Path, size: int = 1000) -> Path:
    with files.atomic_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "a.bin").write_bytes(bytes(range(256)) * (size // 256 + 1))
        (folder / "inner" / "b.txt").write_text("b")
        (folder / "empty").touch()
    return path


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, call: int, code: int) -> Iterator[None]:
    """Let call number ``call`` (from 0) of ``os.NAME`` fail with ``code``."""
    original: Callable[..., object] = getattr(os, name)
    count = -1

    def replacement(*arguments: object, **keywords: object) -> object:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, replacement)
        yield
    assert count >= call, f"os.{name} was called only {count + 1} times"


@contextlib.contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let writes beyond ``n_bytes`` of a file fail; the one that crosses the limit is cut short by the system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- one file -------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = write_old_and_new(tmp_path)
    assert path.read_bytes() == NEW
    assert entries(tmp_path) == ["file"]


@pytest.mark.parametrize(("name", "call"), [("fsync", 0), ("replace", 0)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, code: int
) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, OLD)
    reason = re.escape(os.strerror(code).lower())
    with (
        failing(monkeypatch, name, call, code),
        pytest.raises(StorageError, match=rf"file: {reason} \(28 bytes needed, [\d.]+ [kMGT]?B? ?.*free\)"),
    ):
        files.write_atomic(path, NEW)
    assert path.read_bytes() == OLD
    assert entries(tmp_path) == ["file"]


@pytest.mark.parametrize("limit", [0, 1, 27])
def test_a_short_write_leaves_the_old_file(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, OLD)
    with largest_file(limit), pytest.raises(StorageError, match=r"file too large.*ulimit -f"):
        files.write_atomic(path, NEW)
    assert path.read_bytes() == OLD
    assert entries(tmp_path) == ["file"]
    with largest_file(28):
        files.write_atomic(path, NEW)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder .*gone"):
        files.write_atomic(tmp_path / "gone" / "file", NEW)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="there is no folder"):
        files.write_atomic(tmp_path / "file" / "inner", NEW)


# --- a folder -------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "folder")
    assert entries(tmp_path) == [
        *("folder", "folder/a.bin", "folder/empty", "folder/inner", "folder/inner/b.txt", "folder/manifest.json")
    ]
    assert files.verify_folder(path) == ["a.bin", "empty", "inner/b.txt"]


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "folder", manifest=False) as folder:
        files.write_atomic(folder / "inside", OLD)
    assert entries(tmp_path) == ["folder", "folder/inside"]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with files.atomic_folder(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, ConnectionResetError])
def test_an_interruption_removes_the_temporary_and_keeps_its_error(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with files.atomic_folder(tmp_path / "folder") as folder:
            (folder / "a").write_text("a")
            raise error

    with pytest.raises(error):
        interrupted()
    assert entries(tmp_path) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "folder")
    before = entries(tmp_path)
    with pytest.raises(StorageError, match="nothing is overwritten"):
        make_folder(path)
    assert entries(tmp_path) == before


def test_every_failing_sync_and_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "earlier")
    before = entries(tmp_path)
    # Three files, a folder in it, the manifest, the folder; the seventh flushes the name of what is there already.
    # On Windows folders are not flushed.
    last = 6 if REMOVES_OPEN_FILES else 4
    for name, call in [*(("fsync", call) for call in range(last)), ("rename", 0)]:
        with failing(monkeypatch, name, call, errno.EIO), pytest.raises(StorageError, match=r"later: .*fault"):
            make_folder(tmp_path / "later")
        assert entries(tmp_path) == before, (name, call)
    if REMOVES_OPEN_FILES:
        with failing(monkeypatch, "fsync", last, errno.EIO), pytest.raises(StorageError):
            make_folder(tmp_path / "later")
    else:
        make_folder(tmp_path / "later")
    assert len(files.verify_folder(tmp_path / "later")) == 3


@pytest.mark.parametrize("limit", [0, 1, 1000, 4096])
def test_a_short_write_in_a_folder_leaves_nothing(tmp_path: Path, limit: int) -> None:
    with largest_file(limit), pytest.raises(StorageError, match="file too large"):
        make_folder(tmp_path / "folder", size=5000)
    assert entries(tmp_path) == []


def test_too_little_space_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    petabyte = 10**15
    with (
        pytest.raises(StorageError, match=r"folder: no space left on device \(1000\.0 TB needed, .* free\); free some"),
        files.atomic_folder(tmp_path / "folder", petabyte),
    ):
        pytest.fail("the body must not run")
    assert entries(tmp_path) == []


def test_free_space_of_what_is_not_there_yet(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet" / "there") > 0
    files.require_space(Path("relative"), 1)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (384_500_000, "384.5 MB")]
)
def test_format_bytes(n_bytes: int, text: str) -> None:
    assert files.format_bytes(n_bytes) == text


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.bin", "inner/b.txt", "empty"])
def test_a_changed_file_is_named(tmp_path: Path, name: str) -> None:
    path = make_folder(tmp_path / "folder")
    with open(path / name, "ab") as file:
        file.write(b"x")
    with pytest.raises(DamageError, match=re.escape(f"{name} is damaged")):
        files.verify_folder(path)
    assert files.verify_folder(path, skip=[name])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "folder")
    (path / "inner" / "b.txt").unlink()
    with pytest.raises(DamageError, match=r"inner/b\.txt cannot be read: No such file"):
        files.verify_folder(path)


def rename_in_manifest(folder: Path, old: str, new: str) -> None:
    """Say in the manifest of ``folder`` that a file is another; written as the storage writes it."""
    content = json.loads((folder / "manifest.json").read_bytes())
    content["files"][new] = content["files"].pop(old)
    (folder / "manifest.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "inner/../../outside", "nul\0"])
def test_a_manifest_cannot_name_what_is_outside(tmp_path: Path, name: str) -> None:
    path = make_folder(tmp_path / "folder")
    for file in (path / "good", tmp_path / "outside"):
        file.write_text("b")
    rename_in_manifest(path, "inner/b.txt", "good")
    assert "good" in files.verify_folder(path)
    rename_in_manifest(path, "good", name)
    with pytest.raises(DamageError, match="manifest"):
        files.verify_folder(path)


# --- leftovers ------------------------------------------------------------------------------------------------------


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from mm_rec.storage import files
with files.atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    (folder / "big").write_bytes(bytes(1000))
    print("writing", flush=True)
    sys.stdin.readline()
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    (tmp_path / ".tmp-file-0123456789abcdef").write_text("half")
    (tmp_path / "kept").write_text("kept")
    assert [path.name for path in files.remove_leftovers(tmp_path)] == [".tmp-file-0123456789abcdef"]
    writer.kill()
    writer.wait(60)
    assert len(files.remove_leftovers(tmp_path)) == 1
    assert entries(tmp_path) == ["kept"]


def test_a_folder_is_removed_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_folder(tmp_path / "folder")

    def killed(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(path)
    assert not path.exists()
    assert len(files.remove_leftovers(tmp_path)) == 1
    assert entries(tmp_path) == []
