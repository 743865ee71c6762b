"""Runs tests of the kernels with a library for Windows, on Linux: PyTorch is Linux's, the kernels are those of a DLL.

    CXX=x86_64-w64-mingw32-g++ python tests/cpp/wine_kernels.py FOLDER tests/ops/test_cpu.py ...
    MM_REC_CPU_LEVEL=avx2 python tests/cpp/wine_kernels.py FOLDER tests/ops/test_cpu.py ...

A program of Wine's (``wine_python.c``, made by winegcc) loads the DLL and is Python in the same process. The library
that the package finds has the names of the real one, and each function calls that of the DLL in the way of Windows.
Needs Debian's g++-mingw-w64-x86-64, wine and libwine-dev, and a Python with a shared library. FOLDER keeps what was
built, and ``FOLDER/libmm_rec_cpu.dll`` may be of another compiler; the package and the tests are copied each time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from mm_rec.cpp.build import CPU_LIBRARY, LEVELS, build_cpu, library_name
from mm_rec.ops.cpu.load_library import _SIGNATURES, _compiled_for

ROOT = Path(__file__).resolve().parents[2]
DLL = library_name("cpu", "win32")
C_TYPES = {"p": "void*", "n": "int64_t", "i": "int", "f": "float", "d": "double", "-": "void"}
HEADER = """#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
static void* find(const char* name) {
    void* (*functions)(const char*) = (void* (*)(const char*))strtoull(getenv("LIBRARY_FUNCTIONS"), 0, 16);
    void* found = functions(name);
    if (!found) fprintf(stderr, "the DLL lacks %s\\n", name), abort();
    return found;
}
"""


def function(name: str, arguments: str, result: str) -> str:
    """Returns a function in C that calls the one of the same name in the DLL."""
    types = [C_TYPES[code] for code in arguments.replace(" ", "")]
    named = ", ".join(f"{one} a{index}" for index, one in enumerate(types)) or "void"
    call = f"(({C_TYPES[result]} (__attribute__((ms_abi))*)({', '.join(types) or 'void'}))found)"
    values = ", ".join(f"a{index}" for index in range(len(types)))
    back = "" if result == "-" else "return "
    return (
        f"{C_TYPES[result]} {name}({named}) {{\n    static void* found;\n"
        f'    if (!found) found = find("{name}");\n    {back}{call}({values});\n}}\n'
    )


def proxy() -> str:
    """Returns the source of a library for Linux with the functions of that for Windows."""
    functions = {"mm_rec_sources": ("", "n"), "mm_rec_best_level": ("", "i"), "mm_rec_use_openmp": ("p", "i")}
    for name, signature in _SIGNATURES.items():
        functions |= {f"mm_rec_{name}_{_compiled_for(name, level)}": signature for level in LEVELS}
    return HEADER + "".join(function(name, *signature) for name, signature in functions.items())


def prepare(folder: Path) -> None:
    """Build the DLL and the program, if the folder has none, and copy the tree, whose library calls the DLL."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / DLL).exists():
        build_cpu(folder)
    if not (folder / "python.exe.so").exists():
        name = f"python{sysconfig.get_config_var('LDVERSION')}"
        libraries = [f"-L{sysconfig.get_config_var('LIBDIR')}", f"-l{name}", "-ldl"]
        source = str(Path(__file__).with_name("wine_python.c"))
        subprocess.run(["winegcc", source, "-o", str(folder / "python"), *libraries], check=True)
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("mm_rec", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "fixtures")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (folder / "proxy.c").write_text(proxy(), encoding="utf-8")
    library = str(tree / "mm_rec" / "cpp" / CPU_LIBRARY)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", str(folder / "proxy.c"), "-o", library], check=True)


def main(folder: Path, arguments: list[str]) -> int:
    """Prepare, run pytest with the arguments and return its exit code."""
    prepare(folder)
    libraries = Path(sysconfig.get_config_var("LIBDIR"))
    environment = {
        **os.environ,
        "WINEPREFIX": str(folder / "wine"),
        "WINEDEBUG": "-all",
        "LIBRARY": f"Z:{folder / DLL}".replace("/", "\\"),
        "LIBPYTHON": str(libraries / sysconfig.get_config_var("INSTSONAME")),
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": os.pathsep.join([str(folder / "tree"), sysconfig.get_path("purelib")]),
        "MM_REC_REQUIRE_NATIVE": "1",
    }
    command = ["wine", str(folder / "python.exe.so"), "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=folder / "tree", env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
