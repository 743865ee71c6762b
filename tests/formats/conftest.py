"""The fixtures (see write_fixtures.py), and what this version makes of them when it goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from write_fixtures import COMMIT

from mm_rec.config import PRESETS, ModelConfig

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The unpacked fixtures, to which no test may add a file: others look at them in any order."""
    folder = unpacked(COMMIT, tmp_path_factory)
    files = sorted(folder.rglob("*"))
    yield folder
    assert sorted(folder.rglob("*")) == files


@pytest.fixture(scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a session and an exported folder of b411fa1, whose model had another long-term memory."""
    return unpacked("b411fa1", tmp_path_factory)


def unpacked(commit: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(commit)
    with tarfile.open(HERE / "fixtures" / f"{commit}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def about(written: Path) -> dict[str, Any]:
    """What write_fixtures.py noted: versions, environment, settings."""
    content: dict[str, Any] = json.loads((written / "written.json").read_text())
    return content


@pytest.fixture
def copy(written: Path, about: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the fixtures as the current folder, for commands in this process."""
    folder, threads = tmp_path / "copy", torch.get_num_threads()
    shutil.copytree(written, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(**about["model"]))
    yield folder
    torch.set_num_threads(threads)


def go_on(written: Path, target: Path, environment: dict[str, str]) -> Path:
    """Continue a copy of the fixtures in a process with these variables set; returns the copy."""
    folder = target / "continued"
    shutil.copytree(written, folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MM_REC_", "ONEDNN_"))}
    command = [sys.executable, str(HERE / "continue_fixtures.py")]
    done = subprocess.run(command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def continued(written: Path, about: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixtures continued in the environment that they were written in."""
    return go_on(written, tmp_path_factory.mktemp("same"), about["environment"])


@pytest.fixture(scope="session")
def continued_natively(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixtures continued by this machine's own kernels."""
    return go_on(written, tmp_path_factory.mktemp("native"), {"OMP_NUM_THREADS": "1"})
