"""What differs between systems is in :mod:`mm_rec.system`, and nothing that is written depends on the system."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mm_rec

PACKAGE = Path(mm_rec.__file__).parent

MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "msvcrt", "winreg", "_winapi", "winsound"}
ATTRIBUTES = {
    "sys": {"platform", "getwindowsversion"},
    "ctypes": {"windll", "WinDLL", "oledll"},
    "os": {"name", "uname", "fork", "killpg", "set_blocking", "register_at_fork", "mkfifo", "startfile"}
    | {"fsync", "replace", "rename", "pread", "pwrite", "statvfs", "chown", "getuid", "geteuid"}
    | {"getloadavg", "sched_getaffinity", "O_DIRECTORY", "O_NOFOLLOW", "O_BINARY", "O_TEMPORARY"},
    "signal": {"SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGPIPE", "SIGBREAK", "pthread_sigmask"},
    "mmap": {"MAP_PRIVATE", "MAP_SHARED", "MAP_ANONYMOUS", "MADV_HUGEPAGE", "PROT_READ"},
}
PLACES = ("/proc/", "/sys/fs")

EXCEPTIONS = ("system/", "cpp/")
"""The second runs while the package is installed, without the package: compilers depend on the system."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(EXCEPTIONS[0]):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def asks_of(tree: ast.Module) -> set[str]:
    """What a module asks of one system alone, or asks about the system."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} & MODULES if node.module else set()
            refused = ATTRIBUTES.get(node.module or "", set())
            found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name in refused}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in ATTRIBUTES.get(node.value.id, ()):
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "rename" and len(node.args) == 1:
                found.add("Path.rename")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {place for place in PLACES if node.value.startswith(place)}
    return found


def test_only_one_folder_asks_which_system_it_is() -> None:
    asking = {name: asks_of(tree) for name, tree in sources() if not name.startswith(EXCEPTIONS)}
    assert len(asking) > 150
    assert not {name: found for name, found in asking.items() if found}


def test_the_boundary_is_seen() -> None:
    code = "import fcntl\nfrom os import fork\nx = sys.platform, open('/proc/self/maps')\na.rename(b)\nos.fsync(1)"
    assert asks_of(ast.parse(code)) == {"fcntl", "os.fork", "sys.platform", "/proc/", "Path.rename", "os.fsync"}


def text_without_format(tree: ast.Module) -> Iterator[str]:
    """Calls that read or write text in the encoding, or with the ends of lines, of the system."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        writes = name == "write_text"
        if name == "open" and isinstance(node.func, ast.Name):
            mode = ast.literal_eval(node.args[1]) if len(node.args) > 1 else "r"
            if "b" in mode:
                continue
            writes = mode != "r"
        elif name not in ("write_text", "read_text") or "distribution(" in ast.unparse(node):  # of a package: UTF-8
            continue
        if "encoding" not in given or (writes and "newline" not in given):
            yield ast.unparse(node)


def test_text_on_the_disk_is_the_same_on_every_system() -> None:
    wrong = {name: found for name, tree in sources() if (found := list(text_without_format(tree)))}
    assert not wrong


def test_text_in_the_format_of_the_system_is_seen() -> None:
    code = "p.read_text()\np.write_text(x, encoding='utf-8')\nopen(p)\nopen(p, 'a', encoding='utf-8')\nopen(p, 'rb')"
    assert len(list(text_without_format(ast.parse(code)))) == 4
