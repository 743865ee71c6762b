"""The threads of the kernels: OpenMP's where PyTorch has loaded it, and our own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.threads import single_tokens, training_step
from mm_rec.cpp.build import HERE
from mm_rec.errors import SettingError
from mm_rec.ops.cpu.load_library import CpuLibrary

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def library() -> Iterator[CpuLibrary]:
    before = torch.get_num_threads()
    found = CpuLibrary()
    yield found
    found.use_openmp(True)
    torch.set_num_threads(before)


@pytest.mark.native
@pytest.mark.skipif(sys.platform == "win32", reason="the threads there are our own")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [training_step, single_tokens])
def test_both_kinds_of_threads_give_the_same_bits(
    make: Callable[[str, str], Callable[[], Tensor]], precision: str, library: CpuLibrary
) -> None:
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        found = []
        for wanted in (True, False):
            assert library.use_openmp(wanted) == wanted
            action = make("tiny", precision)
            action()
            found.append(action())
        assert torch.equal(*found)


@pytest.mark.native
def test_openmp_is_that_of_the_library_that_is_named(library: CpuLibrary) -> None:
    """PyTorch's runtime is not among the names that everybody sees where only PyTorch's own libraries ask for it."""
    assert library.use_openmp(True) == (library.threads == "OpenMP")
    assert not library.use_openmp(True, user=str(library.path))  # is loaded, and was linked with none
    assert not library.use_openmp(True, user="not-loaded.so")


CHILD = """
import os, sys, torch
from benchmarks.threads import training_step
from mm_rec import ops
torch.set_num_threads(3)
ops.status()
action = training_step("tiny", "fp32")
x = torch.randn(64, 512)
expected = ops.rms_norm(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.rms_norm(x), expected) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MM_REC_THREADS": "own"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.stdout == "0\n", result.stderr


@pytest.mark.native
def test_threads_of_an_unknown_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_REC_THREADS", "many")
    with pytest.raises(SettingError, match="must be openmp or own"):
        CpuLibrary()


def _run_test(compiler: str, flags: list[str], program: Path, *arguments: str) -> None:
    source = Path(__file__).with_name("parallel_test.cpp")
    libraries = [] if sys.platform == "win32" else ["-ldl", "-pthread"]
    command = [compiler, "-std=c++17", *flags, f"-I{HERE / 'src'}", str(source), "-o", str(program), *libraries]
    subprocess.run(command, check=True, capture_output=True)
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("done")


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_part_is_done_once(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    _run_test(compiler, ["-O2"], tmp_path / "test.exe", "fork")


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("g++") is None, reason="needs GCC's ThreadSanitizer")
def test_no_data_race(tmp_path: Path) -> None:
    _run_test("g++", ["-O1", "-g1", "-fsanitize=thread"], tmp_path / "test")
