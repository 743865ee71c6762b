"""Excerpts of the source in a page: a line ``{{ excerpt FILE START }}`` becomes the code that begins with START there.

START is the beginning of a line of the file, without its indentation. Of C++ an excerpt is a function, from its
template line to the brace that closes it; of Python the statement or definition with all that is indented below it. A
page whose excerpt is gone cannot be built.
"""

from __future__ import annotations

import re
import textwrap

from docs_site import ROOT

__all__ = ["find", "insert"]

_LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".sh": "bash"}
_LINE = re.compile(r"^\{\{ excerpt (\S+) (.+) \}\}$", re.MULTILINE)


def insert(markdown: str) -> str:
    """Returns a page with its excerpts.

    Raises:
        ValueError: if there is no such file, or no line of it begins so.
    """

    def replace(found: re.Match[str]) -> str:
        path, start = found[1], found[2]
        language = _LANGUAGES[path[path.rindex(".") :]]
        return f'```{language} title="{path}"\n{find(path, start)}\n```'

    return _LINE.sub(replace, markdown)


def find(path: str, start: str) -> str:
    """Returns the code of a file that begins with ``start``, without its common indentation.

    Raises:
        ValueError: if there is no such file, or no line of it begins so.
    """
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no file {path} to take an excerpt of")
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    firsts = [at for at, line in enumerate(lines) if line.lstrip().startswith(start)]
    if not firsts:
        raise ValueError(f"no line of {path} begins with {start!r}; name the code as it stands there now")
    first = firsts[0]
    if _LANGUAGES[path[path.rindex(".") :]] == "cpp":
        while lines[first - 1].startswith(("template", "__global__")):
            first -= 1
        last = next(at for at in range(first, len(lines)) if lines[at].startswith("}"))
    else:
        last = _last_of_statement(lines, first)
    return textwrap.dedent("\n".join(lines[first : last + 1]))


def _last_of_statement(lines: list[str], first: int) -> int:
    """The last line of the Python statement that begins in a line, with its block and its closing bracket."""
    indentation = len(lines[first]) - len(lines[first].lstrip())
    last = first
    for at in range(first + 1, len(lines)):
        line = lines[at].strip()
        if line and len(lines[at]) - len(lines[at].lstrip()) <= indentation:
            return at if line[0] in ")]}" else last
        if line:
            last = at
    return last
