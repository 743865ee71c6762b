"""The page of file formats, made from ``mm_rec/formats.py``: numbers, and the comments beside them."""

from __future__ import annotations

import ast

from docs_site import ROOT
from docs_site.markdown import code, table
from mm_rec import formats

__all__ = ["descriptions", "make_page"]

INTRODUCTION = """# File formats

Everything that MM-Rec writes and reads again has the number of its format inside. A file of another number is never
read as something else: the command ends in one line that says what still works. There is no pickle in any of them, so
reading a file runs no code.
"""


def descriptions() -> dict[str, str]:
    """Returns the comment above each entry of ``VERSIONS``; entries without one of their own share the last."""
    source = (ROOT / "mm_rec" / "formats.py").read_text(encoding="utf-8")
    [table] = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSIONS"
    ]
    assert isinstance(table, ast.Dict)
    lines = source.splitlines()
    found: dict[str, str] = {}
    comment = ""
    for key in table.keys:
        assert isinstance(key, ast.Constant)
        above: list[str] = []
        at = key.lineno - 2
        while lines[at].strip().startswith("#"):
            above.insert(0, lines[at].strip("# "))
            at -= 1
        comment = " ".join(above) or comment
        found[str(key.value)] = comment
    return found


def make_page() -> str:
    """Returns the page in Markdown."""
    what = descriptions()
    rows = [
        [kind, what[kind], str(version), formats._STILL_WORKS.get(kind, "")]
        for kind, version in formats.VERSIONS.items()
    ]
    head = ["format", "what it is", "number", "what still works with files of another number"]
    where = f"\nThe number stands under the key {code(formats.KEY)}.\n"
    return INTRODUCTION + "\n" + table(head, rows) + where
