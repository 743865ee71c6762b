"""What a wheel and a source distribution hold: the native library or, by name, none; and nothing of earlier builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from mm_rec.cpp.build import CPU_LIBRARY, HERE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compiler that these tests pretend is a script")

COMPILER = """#!/bin/sh
case "$*" in *-dumpmachine*) echo x86_64-linux-gnu; exit;; esac
while [ "$1" != -o ]; do shift; done
echo built > "$2"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built from, with what earlier builds and other work left in it."""
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE.parent, copy / "mm_rec", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for folder in ("lib", f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"):
        stale = copy / "build" / folder / "mm_rec" / "stale.py"
        stale.parent.mkdir(parents=True)
        stale.touch()
    for name in ("libmm_rec_cpu.so", "libmm_rec_cuda.so"):  # of work in place
        (copy / "mm_rec" / "cpp" / name).write_text("of the checkout")
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return copy


def build(tree: Path, what: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
    base = {name: value for name, value in os.environ.items() if name not in ("CXX", "MM_REC_BUILD", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**base, **environment}, capture_output=True, text=True
    )


def names_of(tree: Path) -> list[str]:
    [wheel] = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture
def compiler(tree: Path) -> str:
    return str(tree.parent / "compiler")


@pytest.mark.slow
def test_a_wheel_holds_the_library_that_it_built(tree: Path, compiler: str) -> None:
    result = build(tree, CXX=compiler, CUDACXX=compiler)
    assert result.returncode == 0, result.stderr
    [wheel] = (tree / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = names_of(tree)
    libraries = [name for name in names if name.endswith((".so", ".dylib", ".dll"))]
    assert libraries == [f"mm_rec/cpp/{CPU_LIBRARY}"]  # no CUDA kernels, though there is a compiler for them
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(libraries[0]) == b"built\n"
    assert not [name for name in names if "stale" in name]


@pytest.mark.slow
def test_an_editable_installation_has_its_library_in_place(tree: Path, compiler: str) -> None:
    result = build(tree, "editable", CXX=compiler)
    assert result.returncode == 0, result.stderr
    assert (tree / "mm_rec" / "cpp" / CPU_LIBRARY).read_text() == "built\n"
    assert not [name for name in names_of(tree) if name.endswith(".so")]


@pytest.mark.slow
def test_a_pure_wheel_holds_none(tree: Path) -> None:
    result = build(tree, MM_REC_BUILD="pure", PATH="")
    assert result.returncode == 0, result.stderr
    names = names_of(tree)
    assert not [name for name in names if "stale" in name or name.endswith(".so")]
    assert next((tree / "dist").glob("*.whl")).name.endswith("-py3-none-any.whl")
    assert "mm_rec/translation/tr.po" in names
    assert {f"mm_rec/cpp/src/{path.name}" for path in (HERE / "src").iterdir()} <= set(names)  # to build them later


def test_a_build_without_a_compiler_fails(tree: Path) -> None:
    result = build(tree, PATH="")
    assert result.returncode != 0
    assert "error: the native kernels cannot be built: no C++ compiler found; install" in result.stderr
    assert result.stderr.rstrip().endswith("set MM_REC_BUILD=pure")
    assert not list(tree.glob("dist/*.whl"))


def test_an_unknown_kind_of_build_fails(tree: Path) -> None:
    assert "MM_REC_BUILD must be cpu, all or pure, got 'none'" in build(tree, MM_REC_BUILD="none").stderr


@pytest.mark.slow
def test_a_wheel_is_built_from_a_source_distribution(tree: Path, compiler: str) -> None:
    assert build(tree, "sdist").returncode == 0
    [archive] = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tree.parent / "unpacked", filter="data")
    [unpacked] = (tree.parent / "unpacked").iterdir()
    assert not list(unpacked.rglob("*.so"))
    result = build(unpacked, CXX=compiler)
    assert result.returncode == 0, result.stderr
    assert f"mm_rec/cpp/{CPU_LIBRARY}" in names_of(unpacked)
