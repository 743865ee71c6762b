"""Lets mkdocstrings read the docstrings of this project: roles become code, indented examples become Python code."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

__all__ = ["DocstringsExtension", "to_markdown"]

_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([^`]+)`")
_DOCTEST = re.compile(r"^Example:(?=\n\s+>>>)", re.MULTILINE)
_EXAMPLE = re.compile(r"^(\w[\w ]*)::\n\n((?:(?:    .*)?\n)+|(?:    .*(?:\n|$))+)", re.MULTILINE)


def to_markdown(docstring: str) -> str:
    """Returns a docstring in Markdown.

    >>> to_markdown("Loads as :func:`load` does.")
    'Loads as `load` does.'
    """

    def fence(found: re.Match[str]) -> str:
        return f"*{found[1]}*\n\n```python\n{textwrap.dedent(found[2]).strip()}\n```\n"

    docstring = _DOCTEST.sub("Examples:", docstring)
    return _EXAMPLE.sub(fence, _ROLE.sub(r"`\1`", docstring).rstrip() + "\n").rstrip()


class DocstringsExtension(griffe.Extension):  # type: ignore[misc]
    """Changes the docstring of every object that is shown, before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
