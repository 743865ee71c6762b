"""Compiles the native kernels into shared libraries beside this file.

The kernels need no header of Python or PyTorch, so one library serves every version of both. This file uses the
standard library alone: it also runs before anything is installed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = [
    "CPU_LIBRARY", "CUDA_LIBRARY", "LEVELS", "REBUILD", "BuildError",
    "build_all", "build_cpu", "build_cuda", "cpu_compiler", "cuda_compiler",
]  # fmt: skip

HERE = Path(__file__).resolve().parent
CPU_LIBRARY = "libmm_rec_cpu.so"
CUDA_LIBRARY = "libmm_rec_cuda.so"
REBUILD = "cd mm_rec/cpp && python setup.py build_ext --inplace"

# No -march=native and no -ffast-math: one library for every machine, and NaN stays NaN. Contraction of a * b + c
# is the one licence given. libgomp is found by its name, so the process shares the one that PyTorch has loaded.
COMPILE_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra",
]  # fmt: skip
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
LEVEL_FLAGS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512_FLAGS,
    "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "amx": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
LEVELS = tuple(LEVEL_FLAGS)
"""From the oldest processors to the newest; mm_rec_best_level() of src/level.cpp is an index into this list."""
SOURCES = ("kernels.cpp", "step.cpp", "products.cpp")
ONLY_SOURCES = {"amx": ("products.cpp",)}  # everything else of this level is that of the one before

# The run-time library is linked in, so the one that PyTorch brings may be of any version. Subnormal numbers count as
# zero: exponentials and reciprocals, which many kernels are made of, then take one instruction in place of four.
CUDA_FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC", "-cudart", "static"]
CUDA_ARCHITECTURES = "80 90"
"""The two generations with bf16 matrix units that differ; of the last one also PTX, which the driver compiles for later
ones. MM_REC_CUDA_ARCHITECTURES names others, or fewer for a shorter build."""
OLDEST_CUDA = (12, 1)  # the first whose kernels take more than 4 kB of parameters
HOPPER_SOURCES = ("window_walk_backward.cu",)  # with instructions that only capability 9.0 has, which "90a" stands for


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says what is missing or what the compiler said."""


def _levels() -> list[str]:
    return list(LEVELS if platform.machine() in ("x86_64", "AMD64") else LEVELS[:1])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"`{' '.join(command)}` failed:\n{result.stdout}{result.stderr}".rstrip())
    if result.stderr:
        print(result.stderr, end="")  # noqa: T201 - compiler warnings belong to the build's output


def cpu_compiler() -> str:
    """The C++ compiler: what CXX names, or the first one found.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler found; install g++ (Debian, Ubuntu: apt-get install g++) or set CXX")


def build_cpu(folder: Path = HERE) -> Path:
    """Compile the CPU kernels, once per instruction set of this architecture, into one library in ``folder``.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = cpu_compiler()
    target = folder / CPU_LIBRARY
    jobs = [([compiler, *COMPILE_FLAGS], "level.cpp")]
    for level in _levels():
        command = [compiler, *COMPILE_FLAGS, f"-DMM_LEVEL={level}", *LEVEL_FLAGS[level]]
        jobs += [(command, name) for name in ONLY_SOURCES.get(level, SOURCES)]
    _build(
        [(command, HERE / "src" / source) for command, source in jobs],
        [compiler, "-shared", "-fopenmp", "-Wl,--as-needed"],
        ["-lm"],
        target,
    )
    return target


def cuda_compiler() -> str | None:
    """The CUDA compiler: what CUDACXX names, nvcc on PATH, or that of CUDA_HOME or /usr/local/cuda; None if none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for name in (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc"):
        if name and shutil.which(name):
            return name
    return None


def _architecture_flags(source: str = "") -> list[str]:
    names = os.environ.get("MM_REC_CUDA_ARCHITECTURES", "").split() or CUDA_ARCHITECTURES.split()
    own = [f"{name}a" if name == "90" and source in HOPPER_SOURCES else name for name in names]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in own]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def build_cuda(folder: Path = HERE) -> Path:
    """Compile the CUDA kernels into one library in ``folder``; needs no GPU.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = cuda_compiler()
    if compiler is None:
        raise BuildError("no CUDA compiler found; install the CUDA toolkit and put nvcc on PATH, or set CUDACXX")
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", answer)
    if release and (int(release[1]), int(release[2])) < OLDEST_CUDA:
        raise BuildError(f"{compiler} is of CUDA {release[1]}.{release[2]}; the kernels need CUDA 12.1 or newer")
    target = folder / CUDA_LIBRARY
    command = [compiler, *CUDA_FLAGS]
    jobs = [([*command, *_architecture_flags(source.name)], source) for source in sorted((HERE / "cuda").glob("*.cu"))]
    _build(jobs, [*command, *_architecture_flags(), "-shared"], [], target)
    return target


def _build(jobs: list[tuple[list[str], Path]], link: list[str], libraries: list[str], target: Path) -> None:
    """Compile each (command, source), all cores at once, link the objects and put the result at ``target``."""
    with tempfile.TemporaryDirectory() as temporary:

        def compile_one(index: int) -> str:
            command, source = jobs[index]
            output = str(Path(temporary) / f"{index}.o")
            _run([*command, "-c", str(source), "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, range(len(jobs))))
        linked = Path(temporary) / target.name
        _run([*link, *objects, "-o", str(linked), *libraries])
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(linked, staged)
        os.replace(staged, target)  # a process that has the old library mapped keeps it


def build_all(folder: Path = HERE) -> list[Path]:
    """Build what this machine can: the CPU kernels always, the CUDA kernels if nvcc is there."""
    libraries = [build_cpu(folder)]
    if cuda_compiler() is not None:
        libraries.append(build_cuda(folder))
    return libraries
