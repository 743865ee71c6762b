"""A notebook as a page: its text, its code, and what the code printed when the notebook was last run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["code_cells", "make_page", "read_notebook"]


def read_notebook(path: Path) -> list[dict[str, Any]]:
    """Returns the cells of a notebook."""
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def code_cells(path: Path) -> list[tuple[str, str]]:
    """Returns source and printed text of each code cell."""
    return [
        ("".join(cell["source"]), "".join("".join(output["text"]) for output in cell["outputs"]))
        for cell in read_notebook(path)
        if cell["cell_type"] == "code"
    ]


def make_page(path: Path) -> str:
    """Returns the notebook in Markdown."""
    parts = []
    for cell in read_notebook(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        if printed := "".join("".join(output["text"]) for output in cell["outputs"]):
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
