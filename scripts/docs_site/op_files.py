"""The table of ops: where each is defined, registered, and computed on each device, found in the sources."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from docs_site import ROOT
from docs_site.markdown import code, table

__all__ = ["OpFiles", "find_ops", "make_page"]

OPS, CPU_SOURCES, CUDA_SOURCES = ROOT / "mm_rec/ops", ROOT / "mm_rec/cpp/src", ROOT / "mm_rec/cpp/cuda"

SHARED = {f"cpp/src/{name}.h" for name in ("export", "parallel", "scratch", "vec")}
"""Headers that all kernels use."""

INTRODUCTION = """---
hide: [toc]
---

# Ops and their files

An op is defined in `mm_rec/ops/reference.py`, registered with PyTorch in a module of `mm_rec/ops`, and computed by
kernels in C++ and CUDA that a Python module of the back end calls. The table is made from the sources when the site
is built. An op with an empty column has no kernel of its own on that device: its parts run in its place, or PyTorch
does. [How to write a kernel](../kernels.md) follows one op through all of these files.
"""


@dataclass(frozen=True)
class OpFiles:
    """The files of one op, relative to the root.

    Attributes:
        name: of the op, as it is registered.
        module: that registers it.
        cpu, cuda: the Python modules of the back ends that call its kernels.
        cpu_sources, cuda_sources: the files that hold the native functions which those call.
    """

    name: str
    module: str
    cpu: tuple[str, ...]
    cpu_sources: tuple[str, ...]
    cuda: tuple[str, ...]
    cuda_sources: tuple[str, ...]


def find_ops() -> list[OpFiles]:
    """Returns the registered ops, and those of the optimizer; a backward pass counts to its op."""
    found = []
    for path in sorted(OPS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"define\(\s*f?\"(\w+)\(", text)
        for expected in re.findall(r"^expect\((.*)\)", text, re.MULTILINE):
            names += re.findall(r"\"(\w+)\"", expected)
        for name in names:
            if not name.endswith("_backward"):
                found.append(
                    OpFiles(name, _relative(path), *_BackEnd.of("cpu").files(name), *_BackEnd.of("cuda").files(name))
                )
    return found


class _BackEnd:
    """The modules of ``mm_rec/ops/cpu`` or ``mm_rec/ops/cuda``, and which native functions each function calls."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.functions: dict[str, tuple[Path, ast.FunctionDef]] = {}
        self.kernels: set[str] = set()
        for path in sorted((OPS / device).glob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and path.stem not in ("__init__", "load_library"):
                    self.functions[node.name] = path, node
                elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KERNELS":
                    self.kernels.update(_names(node.value))
        start = (OPS / device / "__init__.py").read_text(encoding="utf-8")
        for chosen in re.findall(r"kernels \|= \{(.*)\}", start):  # those that only some processors have
            self.kernels.update(re.findall(r"\"(\w+)\":", chosen))

    @staticmethod
    @cache
    def of(device: str) -> _BackEnd:
        return _BackEnd(device)

    def files(self, op: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the Python modules of an op's kernels, and the files of the native functions that they call."""
        kernels = [name for name in (op, f"{op}_backward") if name in self.kernels]
        modules = {_relative(self.functions[name][0]) for name in kernels}
        natives: set[str] = set()
        seen: set[str] = set()
        waiting = list(kernels)
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                path, node = self.functions[name]
                natives |= self._natives(path, node)
                waiting += [one for one in _names(node) if one in self.functions]
        sources = {file for native in natives for file in _sources(self.device, native)}
        return tuple(sorted(modules)), tuple(sorted(sources))

    def _natives(self, path: Path, node: ast.FunctionDef) -> set[str]:
        """The native functions that a function calls itself."""
        text = ast.unparse(node)
        if self.device == "cuda":
            return set(re.findall(r"'(\w+)'", text))
        found = set(re.findall(r"\bcall\.(\w+)\(", text))
        for chosen in re.findall(rf"\b{path.stem}\.use\((.*)\)", (OPS / "cpu/__init__.py").read_text(encoding="utf-8")):
            if re.search(r"\b(_product|_polar_factors)\b", text):  # the kernel that `use` chose for this processor
                found |= set(re.findall(r"call\.(\w+)", chosen))
        return found


def _names(node: ast.AST) -> list[str]:
    """The names that a function uses, also as attributes of a module."""
    return [one.id for one in ast.walk(node) if isinstance(one, ast.Name)] + [
        one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)
    ]


@cache
def _sources(device: str, native: str) -> tuple[str, ...]:
    """The files that hold a native function; none if there is no such function."""
    if device == "cuda":
        return _files_with(CUDA_SOURCES, "*.cu", rf"\bmm_rec_cuda_{native}\(")
    text = "\n".join(path.read_text(encoding="utf-8") for path in CPU_SOURCES.glob("*.cpp"))
    exported = re.search(rf"^MM_EXPORT\([^)]*\b{native}\)(.*?)^}}", text, re.MULTILINE | re.DOTALL)
    called = set(re.findall(r"\b(\w+)\(", exported[1])) if exported else {native}
    found = {file for name in called for file in _files_with(CPU_SOURCES, "*.h", _definition(name))}
    return tuple(sorted(found - SHARED)) or _files_with(CPU_SOURCES, "*.cpp", rf"\b{native}\b")


def _definition(name: str) -> str:
    return rf"^(?:static|inline|MM_INLINE)\b[^;=(]*\b{name}\("


@cache
def _files_with(folder: Path, names: str, pattern: str) -> tuple[str, ...]:
    paths = sorted(folder.glob(names))
    return tuple(_relative(one) for one in paths if re.search(pattern, one.read_text(encoding="utf-8"), re.MULTILINE))


def _relative(path: Path) -> str:
    return path.relative_to(ROOT / "mm_rec").as_posix()


def make_page() -> str:
    """Returns the page in Markdown."""
    head = ["op", "registered in", "CPU", "CUDA"]
    rows = [
        [code(one.name), code(one.module), _lines(one.cpu + one.cpu_sources), _lines(one.cuda + one.cuda_sources)]
        for one in find_ops()
    ]
    return INTRODUCTION + "\nPaths are those inside `mm_rec/`.\n\n" + table(head, rows)


def _lines(files: tuple[str, ...]) -> str:
    return "<br>".join(map(code, files))
