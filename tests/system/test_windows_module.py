"""The functions for Windows, on locks and names that behave as Microsoft and Python document them."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from mm_rec.system import posix

sys.path.insert(0, str(Path(__file__).parent / "bare"))
bare: Any = importlib.import_module("sitecustomize")
sys.path.pop(0)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "msvcrt", bare.msvcrt)
    monkeypatch.setattr(signal, "SIGBREAK", bare.SIGBREAK, raising=False)
    monkeypatch.delitem(sys.modules, "mm_rec.system.windows", raising=False)
    module = importlib.import_module("mm_rec.system.windows")
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.2)
    yield module
    sys.modules.pop("mm_rec.system.windows", None)


def public(module: ModuleType) -> list[str]:
    return sorted(module.__all__)


def test_both_modules_offer_the_same(windows: Any) -> None:
    assert public(windows) == public(posix)
    for name in public(posix):
        if callable(getattr(posix, name)):
            assert getattr(windows, name).__doc__.split(".")[0].split(";")[0]


def test_a_lock_has_one_owner_and_its_content_can_be_read(windows: Any, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"who owns it")
    first, second = (os.open(path, os.O_RDWR) for _ in range(2))
    assert windows.try_lock(first)
    assert not windows.try_lock(second)
    assert not windows.try_lock(second, shared=True)
    assert path.read_bytes() == b"who owns it"
    assert windows.lock_holder(second) is None
    windows.close_lock(first)
    windows.wait_for_lock(second)
    windows.close_lock(second)


def test_a_disk_that_cannot_lock_says_so(windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EINVAL, "no locks here")

    monkeypatch.setattr(bare.msvcrt, "locking", fail)
    (tmp_path / "file").touch()
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    with pytest.raises(OSError, match="no locks here"):
        windows.try_lock(descriptor)
    os.close(descriptor)
    assert windows.claim(tmp_path / "file", required=True) is None
    give_up = windows.claim(tmp_path / "file")
    assert give_up is not None
    give_up()


@pytest.mark.parametrize("folder", [False, True])
def test_a_claimed_temporary_can_be_renamed(windows: Any, tmp_path: Path, folder: bool) -> None:
    path = tmp_path / ".tmp-a-0123456789abcdef"
    path.mkdir() if folder else path.touch()
    give_up = windows.claim(path)
    assert windows.claim(path, required=True) is None
    assert not bare.is_open(str(path))
    windows.rename(path, tmp_path / "a")
    give_up()
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert windows.claim(path) is None, "it is gone"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_what_is_in_use_for_a_moment_is_tried_again(windows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def replace(source: Path, target: Path) -> None:
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "a virus scanner reads it")

    monkeypatch.setattr(os, "replace", replace)
    windows.replace(Path("a"), Path("b"))
    assert len(tries) == 3


@pytest.mark.parametrize(("error", "tried_again"), [(errno.EACCES, True), (errno.ENOSPC, False)])
def test_what_stays_in_use_is_an_error(
    windows: Any, monkeypatch: pytest.MonkeyPatch, error: int, tried_again: bool
) -> None:
    tries = []

    def rename(source: Path, target: Path) -> None:
        tries.append(source)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match=os.strerror(error)) as caught:
        windows.rename(Path("a"), Path("b"))
    assert windows.is_in_use(caught.value) is tried_again
    assert (len(tries) > 1) is tried_again


def test_folders_are_neither_opened_nor_flushed(windows: Any, tmp_path: Path) -> None:
    windows.sync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        windows.open_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    windows.sync(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("talk.safetensors", None), ("console", None), ("com10.txt", None), ("İstanbul ışık", None), (".lock", None),
        ("con", "keeps the name con for a device"), ("NUL.safetensors", "keeps the name NUL"), ("com1.x.y", "keeps"),
        ("LPT³", "keeps"), ("talk:1", "no file names with ':'"), ("a\\b", "no file names with"),
        ("a\nb", "no file names with"), ("talk.", "a full stop at the end"), ("talk ", "a space or"),
    ],
)  # fmt: skip
def test_names_that_windows_has_not(windows: Any, name: str, problem: str | None) -> None:
    found = windows.name_problem(name)
    assert found is None if problem is None else problem in found
    assert posix.name_problem(name) is None


def test_ctrl_break_asks_as_sigterm_does(windows: Any) -> None:
    assert [windows.exit_code(signum) for signum in windows.SIGNALS] == [143, 130, 143]


def test_limits_and_memory(windows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert windows.open_files_limit() is None
    assert windows.address_space_left() is None
    assert windows.cores() == posix.cores()

    class Used:
        peak_wset = 123

    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: Used)
    assert windows.peak_memory() == 123
