"""The tree of the package: what imports what, in the order of layers that ARCHITECTURE.md lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mm_rec

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(mm_rec.__file__).parent  # of the checkout or, where a wheel is tested, of the installation
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """The modules of the package that a module imports, inside functions too; not what only a type checker sees.

    A string that is the name of a module counts, since ``importlib`` takes it.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names if alias.name in MODULES}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports name the whole path"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if name in MODULES:
                self.found.add(name)
            elif node.module in MODULES:
                self.found.add(node.module)

    def visit_Constant(self, node: ast.Constant) -> None:
        if node.value in MODULES and node.value != "mm_rec":
            self.found.add(node.value)


def imports_of(name: str) -> set[str]:
    visitor = Imports()
    visitor.visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return visitor.found - {name}


GRAPH = {name: imports_of(name) for name in MODULES if name != "mm_rec"}
"""What each module imports. The package itself imports nothing: it looks its names up when they are used."""


def layers() -> list[list[str]]:
    """The layers of ARCHITECTURE.md, the highest first."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"```layers\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [line.split() for line in block[1].splitlines()]


def entry(name: str) -> str:
    """The file or folder directly in the package that a module belongs to."""
    return name.split(".")[1] if "." in name else "__init__"


def edges() -> Iterator[tuple[str, str]]:
    for name, imported in GRAPH.items():
        for other in sorted(imported):
            yield name, other


def test_the_layers_name_every_entry_once() -> None:
    named = sorted(one for line in layers() for one in line)
    assert named == sorted({entry(name) for name in MODULES} - {"__init__"})


def test_nothing_imports_upwards() -> None:
    height = {one: -index for index, line in enumerate(layers()) for one in line}
    height["__init__"] = -len(layers())  # the package itself, for its version
    wrong = [
        f"{name} imports {other}"
        for name, other in edges()
        if entry(name) != entry(other) and height[entry(name)] <= height[entry(other)]
    ]
    assert not wrong


def test_there_is_no_cycle_even_by_late_imports() -> None:
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_folder_imports_back_and_forth_with_another() -> None:
    folders = {name: name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0] for name in MODULES}
    below = {(folders[name], folders[other]) for name, other in edges() if entry(name) == entry(other)}
    both = [(a, b) for a, b in below if a < b and (b, a) in below and not b.startswith(f"{a}.")]
    assert not both


def test_the_top_is_short_and_no_folder_is_almost_empty() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 30, sorted(path.name for path in entries)
    for folder in {path.parent for path in MODULES.values()} - {PACKAGE}:
        sources = [path for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES and path.name != "__init__.py"]
        assert len(sources) >= 3, folder


def test_no_module_only_passes_names_on() -> None:
    """The entries of packages (``__init__.py``) may; a module under an old name may not."""
    only_imports = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    passing_on = []
    for name, path in MODULES.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        from_here = any(isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mm_rec") for node in body)
        if path.name != "__init__.py" and from_here and all(isinstance(node, only_imports) for node in body):
            passing_on.append(name)
    assert not passing_on


def test_the_package_imports_nothing_of_its_own() -> None:
    found = [
        node
        for node in ast.parse(MODULES["mm_rec"].read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert all(isinstance(node, ast.ImportFrom) and node.module in ("__future__", "typing") for node in found)


def test_modules_take_from_each_other_what_is_offered() -> None:
    offered: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                offered[name] = set(ast.literal_eval(node.value))
    wrong = [
        f"{name} takes {alias.name} of {node.module}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module in offered
        for alias in node.names
        if f"{node.module}.{alias.name}" not in MODULES and alias.name not in offered[node.module]
    ]
    assert not wrong


def test_the_ops_have_two_entries() -> None:
    entries = {"mm_rec.ops", "mm_rec.ops.inference", "mm_rec.ops.reference"}  # the last as an attribute of the first
    wrong = [
        f"{name} imports {other}"
        for name, other in edges()
        if entry(name) != "ops" and entry(other) == "ops" and other not in entries
    ]
    assert not wrong
