"""Building the CPU kernels by hand and with the package, with and without a compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mm_rec.cpp import build
from mm_rec.cpp.build import LEVELS
from mm_rec.ops.cpu.load_library import CpuLibrary

ROOT = Path(__file__).resolve().parents[2]


def _exports(library: Path) -> set[str]:
    lines = subprocess.run(["nm", "-D", "--defined-only", str(library)], check=True, capture_output=True, text=True)
    return {line.split()[-1] for line in lines.stdout.splitlines()}


@pytest.mark.native
def test_library_has_every_level_and_nothing_else() -> None:
    names = _exports(CpuLibrary().path)
    levels = LEVELS if platform.machine() == "x86_64" else LEVELS[:1]
    assert {f"mm_rec_{kind}_product_{level}" for kind in ("tile", "vector") for level in levels} <= names
    assert {f"mm_rec_scan_forward_{level}" for level in levels if level != "amx"} <= names
    assert all(name.startswith("mm_rec_") for name in names)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_the_library_runs_with_an_older_glibc() -> None:
    """With that of manylinux_2_28 and newer ones, whichever it was built with."""
    listed = subprocess.run(["nm", "-D", str(CpuLibrary().path)], check=True, capture_output=True, text=True).stdout
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"@GLIBC_([\d.]+)", listed)}
    assert versions
    assert max(versions) <= (2, 28)


def test_the_library_counts_levels_as_the_build_lists_them() -> None:
    source = (build.HERE / "src" / "level.cpp").read_text()
    listed = re.search(r"// Index into \{(.*?)\}", source)
    assert listed is not None
    assert tuple(listed[1].split(", ")) == LEVELS
    answers = re.search(r"return (!avx2 \?.*?);", source)
    assert answers is not None
    assert [int(level) for level in re.findall(r"\b\d\b", answers[1])] == list(range(len(LEVELS)))


def test_constants_of_templates_are_inline() -> None:
    """Else Clang gives each of the files that include them one, under the same name, and the linker refuses."""
    headers = {path.name: path.read_text(encoding="utf-8") for path in (build.HERE / "src").glob("*.h")}
    constants = re.compile(r"^template <[^>]*>\n((?:inline |static )?)constexpr \w+ (\w+)[^({]*=", re.MULTILINE)
    found = {match[2]: match[1] for text in headers.values() for match in constants.finditer(text)}
    assert {"DEPTH", "SPAN"} <= found.keys()
    assert all(found.values()), found


@pytest.mark.slow
def test_build_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One level alone: the library that all other tests use has them all."""
    monkeypatch.setattr(build, "LEVELS", LEVELS[:1])
    library = build.build_cpu(tmp_path)
    assert list(tmp_path.iterdir()) == [library]
    loaded = ctypes.CDLL(str(library))
    loaded.mm_rec_sources.restype = ctypes.c_uint64
    assert loaded.mm_rec_sources() == build.hash_of_sources("cpu")
    assert loaded[f"mm_rec_scan_forward_{LEVELS[0]}"]


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_every_source_and_flag_is_in_the_hash(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.HERE, tmp_path / "cpp", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(build, "HERE", tmp_path / "cpp")
    folder, endings = build.SOURCES_OF[kernels]
    sources = [path for path in (tmp_path / "cpp" / folder).iterdir() if path.suffix in endings]
    (tmp_path / "cpp" / folder / "kernels.o").touch()  # is no source
    found = {build.hash_of_sources(kernels)}
    for changed, path in enumerate(sources):
        path.write_bytes(path.read_bytes() + b"\n")
        found.add(build.hash_of_sources(kernels))
        assert len(found) == changed + 2, path
    flags = "COMPILE_FLAGS" if kernels == "cpu" else "CUDA_FLAGS"
    monkeypatch.setattr(build, flags, [*getattr(build, flags), "-ffast-math"])
    assert build.hash_of_sources(kernels) not in found


def test_no_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found"):
        build.build_cpu(tmp_path)


def test_the_generations_of_gpus_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MM_REC_CUDA_ARCHITECTURES", raising=False)
    assert [flag.rpartition("=")[2] for flag in build._architecture_flags()] == ["sm_80", "sm_90", "compute_90"]
    for source in build.HOPPER_SOURCES:  # what only that generation can run is not for later ones
        found = [flag.rpartition("=")[2] for flag in build._architecture_flags(source)]
        assert found == ["sm_80", "sm_90a", "compute_90"]
        assert (build.HERE / "cuda" / source).exists()
    monkeypatch.setenv("MM_REC_CUDA_ARCHITECTURES", "86")
    assert [flag.rpartition("=")[2] for flag in build._architecture_flags()] == ["sm_86", "compute_86"]


def test_an_old_cuda_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(old))
    with pytest.raises(build.BuildError, match=r"11\.8; the kernels need CUDA 12\.1"):
        build.build_cuda(tmp_path)


def test_what_the_compiler_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'cannot do it' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match="cannot do it"):
        build.build_cpu(tmp_path)


COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in *-dumpmachine*) echo {target}; exit;; esac
while [ $# -gt 0 ] && [ "$1" != -o ]; do shift; done
[ $# -eq 0 ] || echo built > "$2"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a script")
@pytest.mark.parametrize(
    ("name", "target", "library", "levels", "flag"),
    [
        ("g++", "x86_64-linux-gnu", "libmm_rec_cpu.so", 5, "-fPIC"),
        ("g++", "aarch64-linux-gnu", "libmm_rec_cpu.so", 1, "-fPIC"),
        ("clang++", "arm64-apple-darwin24.1.0", "libmm_rec_cpu.dylib", 1, "-fPIC"),
        ("clang++", "x86_64-apple-darwin24.1.0", "libmm_rec_cpu.dylib", 4, "-fPIC"),
        ("g++", "x86_64-w64-mingw32", "libmm_rec_cpu.dll", 4, "-Wa,-muse-unaligned-vector-move"),
        ("clang-cl", "x86_64-pc-windows-msvc", "libmm_rec_cpu.dll", 4, "--driver-mode=g++"),
    ],
)
def test_what_the_compiler_compiles_for_decides(
    name: str, target: str, library: str, levels: int, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / name
    compiler.write_text(COMPILER.format(target=target))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.build_cpu(tmp_path / "out") == tmp_path / "out" / library
    commands = [line for line in Path(f"{compiler}.log").read_text().splitlines() if " -c " in line]
    assert len({word for line in commands for word in line.split() if word.startswith("-DMM_LEVEL=")}) == levels
    assert all(flag in line for line in commands)
    assert all("-fPIC" not in line for line in commands) == library.endswith(".dll")


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a script")
def test_a_library_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER.format(target="aarch64-linux-gnu"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"cannot be written .*virtual environment"):
        build.build_cpu(compiler / "out")


def test_the_gpus_here_are_what_cuda_kernels_are_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '12.0\\n9.0\\n9.0\\n7.5\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert build._architectures_here() == ["90", "120"]  # and not one that is too old
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert build._architectures_here() == []


def test_only_libraries_that_there_are_can_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["cpu", "gpu"]) == 2
    assert capsys.readouterr().err == "usage: python -m mm_rec.cpp.build [cpu] [cuda]\n"


def test_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no C++ compiler found; install")


def test_setup_builds_nothing_else() -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "install"],
        cwd=build.HERE,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode != 0
    assert "build_ext --inplace" in result.stderr
