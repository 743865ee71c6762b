"""Compiles the native kernels into shared libraries beside this file: ``python -m mm_rec.cpp.build [cpu] [cuda]``.

The kernels need no header of Python or PyTorch, so one library serves every version of both. This file uses the
standard library alone: it also runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = [
    "CPU_LIBRARY", "CUDA_LIBRARY", "LEVELS", "REBUILD", "REBUILD_CUDA", "BuildError",
    "build_all", "build_cpu", "build_cuda", "cpu_compiler", "cuda_compiler", "hash_of_sources", "library_name",
    "main",
]  # fmt: skip

HERE = Path(__file__).resolve().parent
REBUILD = "python -m mm_rec.cpp.build"
REBUILD_CUDA = f"{REBUILD} cuda"

# No -march=native and no -ffast-math: one library for every machine, and NaN stays NaN. Contraction of a * b + c
# is the one licence given. There is no -fopenmp: parallel.cpp finds the runtime that PyTorch was linked with.
COMPILE_FLAGS = [
    "-std=c++17", "-O3", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-ffp-contract=fast", "-Wall", "-Wextra",
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
SHARED_SOURCES = ("level.cpp", "parallel.cpp")  # compiled once, for the oldest processor
SOURCES_OF = {"cpu": ("src", (".cpp", ".h")), "cuda": ("cuda", (".cu", ".cuh"))}
ONLY_SOURCES = {"amx": ("products.cpp",)}  # everything else of this level is that of the one before
LEVELS_OF_LINUX = ("amx",)  # level.cpp asks Linux alone for its registers; GCC for Windows can't compile it either

COMPILERS = ["clang-cl", "clang++", "g++"] if sys.platform == "win32" else ["g++", "c++", "clang++"]
INSTALL_COMPILER = {
    "linux": "install g++ (Debian, Ubuntu: apt-get install g++)",
    "darwin": "install Apple's compiler (xcode-select --install)",
    "win32": "install Clang and the Build Tools for Visual Studio (winget install LLVM.LLVM"
    " Microsoft.VisualStudio.2022.BuildTools)",
}


def library_name(kernels: str, system: str = sys.platform) -> str:
    """Returns the file name of the library of "cpu" or "cuda" kernels on a system, named as in ``sys.platform``."""
    ending = {"darwin": "dylib", "win32": "dll"}.get(system, "so")
    return f"libmm_rec_{kernels}.{ending}"


CPU_LIBRARY = library_name("cpu")
CUDA_LIBRARY = library_name("cuda")

# The run-time library is linked in, so the one that PyTorch brings may be of any version. Subnormal numbers count as
# zero: exponentials and reciprocals, which many kernels are made of, then take one instruction in place of four.
CUDA_FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC", "-cudart", "static"]
CUDA_ARCHITECTURES = "80 90"
"""The two generations with bf16 matrix units that differ; of the last one also PTX, which the driver compiles for later
ones. MM_REC_CUDA_ARCHITECTURES names others, or fewer for a shorter build."""
OLDEST_CUDA = (12, 1)  # the first whose kernels take more than 4 kB of parameters
HOPPER_SOURCES = ("window_walk_backward.cu",)  # with instructions that only capability 9.0 has, which "90a" stands for


def hash_of_sources(kernels: str) -> int:
    """Returns 64 bits of a hash of the sources of the "cpu" or "cuda" kernels and of the flags to compile them.

    A library carries the one that it was built from, so that it is never used with the Python code of another version.
    """
    folder, endings = SOURCES_OF[kernels]
    flags = [COMPILE_FLAGS, LEVEL_FLAGS] if kernels == "cpu" else CUDA_FLAGS
    found = hashlib.sha256(repr(flags).encode())
    for path in sorted((HERE / folder).iterdir(), key=lambda path: path.name):
        if path.suffix in endings:
            found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return int.from_bytes(found.digest()[:8], "big")


def _sources_flag(kernels: str) -> str:
    return f"-DMM_SOURCES={hash_of_sources(kernels):#x}u"


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says what is missing or what the compiler said."""


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"`{' '.join(command)}` failed:\n{result.stdout}{result.stderr}".rstrip())
    if result.stderr:
        print(result.stderr, end="")  # noqa: T201 - compiler warnings belong to the build's output
    return result.stdout


def cpu_compiler() -> list[str]:
    """Returns the command of the C++ compiler: what CXX says, or the first one found.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        command = shlex.split(name, posix=sys.platform != "win32")
        if command and shutil.which(command[0]):
            # clang-cl takes the flags of cl.exe unless it is told to take those of everyone else
            return [*command, "--driver-mode=g++"] if Path(command[0]).stem.startswith("clang-cl") else command
    remedy = INSTALL_COMPILER.get(sys.platform, "install GCC or Clang")
    raise BuildError(f"no C++ compiler found; {remedy} or set CXX")


def _system_flags(compiler: list[str], target: str) -> tuple[str, list[str], list[str]]:
    """Returns the system that a target like "x86_64-linux-gnu" means, and what compiling and linking for it need."""
    if "apple" in target:
        return "darwin", ["-fPIC"], []
    if "mingw" in target:  # GCC for Windows does not align the stack for vectors of 32 bytes and more (its bug 54412)
        from_gcc = "clang" not in _run([*compiler, "--version"])
        return "win32", ["-Wa,-muse-unaligned-vector-move"] if from_gcc else [], ["-static"]
    if "windows" in target:
        return "win32", [], []
    return "linux", ["-fPIC"], ["-Wl,--as-needed", "-Wl,-z,defs", "-lm", "-ldl", "-lpthread"]


def _levels_for(target: str, system: str) -> list[str]:
    """Returns the levels to compile for a target like "x86_64-linux-gnu" of a system like "linux"."""
    if not target.startswith(("x86_64", "amd64")):
        return ["baseline"]
    return [level for level in LEVELS if system == "linux" or level not in LEVELS_OF_LINUX]


def build_cpu(folder: Path = HERE) -> Path:
    """Compile the CPU kernels, once per instruction set of the target, into one library in ``folder``.

    What the compiler compiles for decides: a cross compiler in CXX makes the library of another machine.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = cpu_compiler()
    target = _run([*compiler, "-dumpmachine"]).strip()
    system, flags, link = _system_flags(compiler, target)
    command = [*compiler, *COMPILE_FLAGS, _sources_flag("cpu"), *flags]
    jobs = [(command, HERE / "src" / source) for source in SHARED_SOURCES]
    for level in _levels_for(target, system):
        of_level = [*command, f"-DMM_LEVEL={level}", *LEVEL_FLAGS[level]]
        jobs += [(of_level, HERE / "src" / source) for source in ONLY_SOURCES.get(level, SOURCES)]
    library = folder / library_name("cpu", system)
    _build(jobs, [*compiler, "-shared"], link, library)
    return library


def cuda_compiler() -> str | None:
    """The CUDA compiler: what CUDACXX names, nvcc on PATH, or that of CUDA_HOME or /usr/local/cuda; None if none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for name in (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc"):
        if name and shutil.which(name):
            return name
    return None


def _architectures_here() -> list[str]:
    """Returns the generations of this machine's GPUs that the kernels are written for, as ["90"]."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    found = {major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", answer, re.MULTILINE)}
    oldest = int(CUDA_ARCHITECTURES.split()[0])
    return sorted((name for name in found if int(name) >= oldest), key=int)


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
    command = [compiler, *CUDA_FLAGS, _sources_flag("cuda")]
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
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(linked, staged)
            os.replace(staged, target)  # a process that has the old library mapped keeps it, but for Windows
        except OSError as error:
            raise BuildError(
                f"{target} cannot be written ({error.strerror}); end the programs that use it, or install MM-Rec where "
                "you may write, as in a virtual environment"
            ) from None


def build_all(folder: Path = HERE) -> list[Path]:
    """Build what this machine can: the CPU kernels always, the CUDA kernels if nvcc is there."""
    libraries = [build_cpu(folder)]
    if cuda_compiler() is not None:
        libraries.append(build_cuda(folder))
    return libraries


def main(arguments: list[str]) -> int:
    """Build the libraries that are named, ``cpu`` if none is, CUDA's for the GPUs here; returns the exit code."""
    builders = {"cpu": build_cpu, "cuda": build_cuda}
    wanted = arguments or ["cpu"]
    if not set(wanted) <= set(builders):
        print(f"usage: {REBUILD} [{'] ['.join(builders)}]", file=sys.stderr)  # noqa: T201
        return 2
    if here := _architectures_here():
        os.environ.setdefault("MM_REC_CUDA_ARCHITECTURES", " ".join(here))
    try:
        for kernels in wanted:
            print(f"built {builders[kernels](HERE)}")  # noqa: T201
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
