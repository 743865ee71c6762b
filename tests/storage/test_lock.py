"""Ownership: one process owns a folder or file, whatever happens to its lock file, and others are told who."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm_rec.errors import UserError
from mm_rec.storage.lock import Lock, owner_of
from mm_rec.system import REMOVES_OPEN_FILES

open_files_stay = pytest.mark.skipif(
    not REMOVES_OPEN_FILES, reason="Windows neither removes nor renames what somebody has open, nor its folder"
)

WORK = """
import sys
from pathlib import Path
from mm_rec.storage.lock import Lock
with Lock(Path(sys.argv[1]), of=Path(sys.argv[2]) if len(sys.argv) > 2 else None):
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_owner(*paths: Path) -> Iterator[int]:
    """A process that owns a lock; yields its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, *map(str, paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    yield process.pid
    process.communicate("")
    assert process.returncode == 0


@pytest.mark.parametrize(
    "removed", [pytest.param(False, id="with-its-file"), pytest.param(True, id="without", marks=open_files_stay)]
)
def test_a_folder_keeps_its_owner(tmp_path: Path, removed: bool) -> None:
    path = tmp_path / "run.lock"
    with another_owner(path) as pid:
        if removed:
            path.unlink()
        who = f"{tmp_path} is in use by process {pid} on {socket.gethostname()}"
        with pytest.raises(UserError, match=who):
            Lock(path)
        assert owner_of(path) is not None
        assert f"process {pid} on" in str(owner_of(path))
    assert owner_of(path) is None
    with Lock(path) as lock:
        assert lock.dead_owner is None


def test_the_lock_file_of_a_file_does_not_stay(tmp_path: Path) -> None:
    path, file = tmp_path / ".talk.lock", tmp_path / "talk"
    with another_owner(path, file) as pid, pytest.raises(UserError, match=f"{file} is in use by process {pid}"):
        Lock(path, of=file)
    assert not path.exists()
    with Lock(path, of=file) as lock, Lock(tmp_path / ".other.lock", of=tmp_path / "other"):
        lock.require()
        path.unlink()
        with pytest.raises(UserError, match="is not owned by this process any more"):
            lock.require()
        with Lock(path, of=file):
            with pytest.raises(UserError, match=f"was removed; it is in use by process {os.getpid()} on"):
                lock.require()
            lock.release()
            assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_waiting_tells_for_whom(tmp_path: Path) -> None:
    path, told = tmp_path / "lock", []
    process = subprocess.Popen([sys.executable, "-c", WORK, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"owned\n"

    def tell(owner: str) -> None:
        told.append(owner)
        process.stdin.close()  # type: ignore[union-attr]

    with Lock(path, wait=True, on_wait=tell):
        assert told[0].startswith(f"process {process.pid} on ")
    assert process.wait() == 0


@open_files_stay
def test_a_folder_is_found_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    with Lock(folder / "run.lock") as lock:
        assert lock.is_in(folder)
        folder.rename(tmp_path / "two")
        folder.mkdir()
        assert not lock.is_in(folder)
        assert lock.find_folder() == tmp_path / "two"
        (tmp_path / "two" / "run.lock").unlink()
        assert lock.is_in(tmp_path / "two")
        (tmp_path / "two").rmdir()
        assert lock.find_folder() is None
    assert not lock.held
