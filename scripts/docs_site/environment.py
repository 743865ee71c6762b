"""The page of environment variables: all that are read are found in the code, and each has a sentence here."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from docs_site import ROOT
from docs_site.markdown import code, table

__all__ = ["DEVELOPMENT", "OTHERS", "USE", "find_variables", "make_page"]

USE = {
    "MM_REC_API_KEY": (
        "The key that clients of `mm-rec serve` have to send. `--api_key` wins over it, but can be seen in the "
        "list of processes."
    ),
    "MM_REC_BACKEND": (
        "`reference` runs every op in plain PyTorch, `native` refuses to run where the kernels cannot. Without it "
        "the kernels run where they are built."
    ),
    "MM_REC_CPU_LEVEL": (
        "The instructions that the CPU kernels may use, at most: one of the levels that `mm-rec doctor` names. "
        "Without it the best that the processor has."
    ),
    "MM_REC_CUDA_SHARED_MEMORY": (
        "Bytes of shared memory that a block of a CUDA kernel may use, at most, to run the kernels of a smaller "
        "GPU on a larger one."
    ),
    "MM_REC_LANG": (
        "The language of help, errors and progress, `en` or `tr`, whatever the locale is. Logs, records and JSON are "
        "always English."
    ),
    "MM_REC_MAX_STEPS": "Every stage stops after this many steps, to try a command quickly.",
    "MM_REC_THREADS": (
        "`own` makes the CPU kernels use threads of their own in place of those of PyTorch's OpenMP (`openmp`)."
    ),
}
"""Variables of MM-Rec that matter to who uses it."""

DEVELOPMENT = {
    "MM_REC_BUILD": (
        "What an installation compiles: `cpu`, `all` (also the CUDA kernels, where `nvcc` is) or `pure` (nothing)."
    ),
    "MM_REC_CUDA_ARCHITECTURES": "The GPUs to compile for, as compute capabilities without the dot: `90`, or `80 90`.",
    "MM_REC_FUZZ_CASES": "How many random calls the tests of the C++ kernels make.",
    "MM_REC_REQUIRE_NATIVE": "Tests that need the native kernels fail where they would be skipped without them.",
    "MM_REC_SCHEMA_CASES": "How many random requests the tests of the server make for each path.",
    "MM_REC_TEST_SYSTEM": "`bare` runs the tests on a simulated Windows.",
}
"""Variables of MM-Rec for building and testing it."""

OTHERS = {
    "ATEN_CPU_CAPABILITY": "Holds PyTorch's own kernels back to older instructions; measurements record it.",
    "CUDACXX": "The CUDA compiler that builds the kernels, in place of the `nvcc` on the path.",
    "CUDA_HOME": "The folder of the CUDA toolkit.",
    "CXX": "The C++ compiler that builds the kernels.",
    "HF_ENDPOINT": (
        "The address of the hub, in place of `https://huggingface.co`; `mm-rec doctor` asks whether it answers."
    ),
    "LANG": "The locale, whose language help, errors and progress have if there is a translation.",
    "LC_ALL": "The same, which wins over the other two.",
    "LC_MESSAGES": "The same for messages alone, which wins over `LANG`.",
    "LOCAL_RANK": "The number of a process on its host; torchrun sets it.",
    "LOCAL_WORLD_SIZE": "The number of processes on a host; torchrun sets it.",
    "MKL_ENABLE_INSTRUCTIONS": "Holds Intel's MKL back to older instructions; measurements record it.",
    "MKL_NUM_THREADS": "The same for Intel's MKL alone.",
    "OMP_NUM_THREADS": "The threads of PyTorch and of the kernels. Where it is set, the number is not measured.",
    "ONEDNN_MAX_CPU_ISA": (
        "Holds oneDNN, which multiplies large matrices, back to older instructions; measurements record it."
    ),
    "PYTHONIOENCODING": "The encoding of what is printed; on Windows it is UTF-8 where this is not set.",
    "PYTHONPATH": "Is passed on to the process that parses documents, with the folder of the package before it.",
    "WORLD_SIZE": "The number of processes of a run; torchrun sets it.",
    "XDG_CACHE_HOME": "The folder of caches, in which the measured number of threads is kept; `~/.cache` without it.",
}
"""Variables of other programs that the package reads itself."""

INTRODUCTION = """# Environment variables

Settings of a run are flags, and no variable replaces one. Variables say what belongs to the machine, or what should
not be seen in the list of processes.
"""

_OWN = re.compile(r"\bMM_REC_[A-Z0-9_]*[A-Z0-9]\b")
_FOLDERS = ("mm_rec", "scripts", "runs", "tests", "benchmarks", ".ci")
_FILES = ("setup.py", "Makefile", "Containerfile")
_SHELL = ("", ".sh", ".sbatch", ".yaml")


def find_variables() -> dict[str, list[str]]:
    """Returns the variables that are read, with the files that read them."""
    found: dict[str, set[str]] = defaultdict(set)
    paths = [ROOT / name for name in _FILES]
    paths += [path for folder in _FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in paths:
        if path.parts[-2] not in ("docs_site", "docs"):  # those that describe variables or test the descriptions
            for name in _read_by(path):
                found[name].add(path.relative_to(ROOT).as_posix())
    return {name: sorted(files) for name, files in sorted(found.items())}


def _read_by(path: Path) -> Iterator[str]:
    """Yields the variables that a file reads: all of MM-Rec, and of others those that the package itself asks for."""
    if path.suffix == ".py":
        text = path.read_text(encoding="utf-8")
        is_package = path.is_relative_to(ROOT / "mm_rec")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _OWN.fullmatch(node.value):
                yield node.value
            elif is_package and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_VARIABLES"):
                yield from re.findall(r"'([A-Z_]+)'", ast.unparse(node.value))
        if is_package:
            yield from re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", text)
    elif path.suffix in (".cpp", ".h", ".cu", ".cuh"):
        yield from re.findall(r"getenv\(\"(\w+)\"\)", path.read_text(encoding="utf-8"))
    elif path.suffix in _SHELL and path.name != "baselines":
        yield from _OWN.findall(path.read_text(encoding="utf-8", errors="ignore"))


def make_page() -> str:
    """Returns the page in Markdown."""
    readers = find_variables()
    parts = [INTRODUCTION]
    titles = {"For use": USE, "For building and testing": DEVELOPMENT, "Of other programs": OTHERS}
    for title, variables in titles.items():
        rows = [[code(name), text, _lines(readers[name])] for name, text in variables.items()]
        parts.append(f"\n## {title}\n\n{table(['variable', 'what it does', 'read in'], rows)}")
    return "\n".join(parts)


def _lines(files: list[str]) -> str:
    """The files that read a variable, those of the package alone if there are some."""
    return "<br>".join(code(file) for file in ([one for one in files if one.startswith("mm_rec/")] or files))
