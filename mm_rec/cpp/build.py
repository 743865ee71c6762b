"""Compiles the native kernels into shared libraries beside this file.

The kernels need no header of Python or PyTorch, so one library serves every version of both. This file uses the
standard library alone: it also runs before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["CPU_LIBRARY", "BuildError", "build_all", "build_cpu"]

HERE = Path(__file__).resolve().parent
CPU_LIBRARY = "libmm_rec_cpu.so"

# No -march=native and no -ffast-math: one library for every machine, and NaN stays NaN. Contraction of a * b + c
# is the one licence given. libgomp is found by its name, so the process shares the one that PyTorch has loaded.
COMPILE_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra",
]  # fmt: skip
LEVEL_FLAGS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says what is missing or what the compiler said."""


def _levels() -> list[str]:
    return list(LEVEL_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"`{' '.join(command)}` failed:\n{result.stdout}{result.stderr}".rstrip())
    if result.stderr:
        print(result.stderr, end="")  # noqa: T201 - compiler warnings belong to the build's output


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler found; install g++ (Debian, Ubuntu: apt-get install g++) or set CXX")


def build_cpu(folder: Path = HERE) -> Path:
    """Compile the CPU kernels, once per instruction set of this architecture, into one library in ``folder``.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = _compiler()
    target = folder / CPU_LIBRARY
    with tempfile.TemporaryDirectory() as temporary:
        jobs: list[tuple[str, str, list[str]]] = [("level.cpp", "level.o", [])]
        jobs += [("kernels.cpp", f"{level}.o", [f"-DMM_LEVEL={level}", *LEVEL_FLAGS[level]]) for level in _levels()]

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, name, flags = job
            output = str(Path(temporary) / name)
            _run([compiler, *COMPILE_FLAGS, *flags, "-c", str(HERE / "src" / source), "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        linked = Path(temporary) / CPU_LIBRARY
        _run([compiler, "-shared", "-fopenmp", "-Wl,--as-needed", *objects, "-o", str(linked), "-lm"])
        folder.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(linked, staged)
        os.replace(staged, target)  # a process that has the old library mapped keeps it
    return target


def build_all(folder: Path = HERE) -> list[Path]:
    """Build what this machine can: the CPU kernels always."""
    return [build_cpu(folder)]
