"""Runs the notebooks of the documentation and writes what their cells print into them.

    python scripts/docs_site/run_notebook.py docs/notebooks/*.ipynb

A test runs them as well and compares what is printed, numbers apart.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["run", "write_outputs"]


def run(sources: list[str]) -> list[str]:
    """Runs cells one after the other in one name space and returns what each prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for source in sources:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(source, "<cell>", "exec"), names)
        printed.append(output.getvalue())
    return printed


def write_outputs(path: Path) -> None:
    """Runs a notebook and writes the outputs into it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(cells, run(["".join(cell["source"]) for cell in cells]), strict=True), 1):
        cell["execution_count"] = number
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [stream] if text else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_outputs(Path(argument))
