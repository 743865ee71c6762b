"""What of the package's text is to be translated, read from its sources, and the catalogues brought up to it.

    python tests/translation/extract_messages.py

adds what is new to every catalogue, with an empty translation to fill in, and drops what is no longer there. A text of
several lines that has changed keeps the translations of its other lines, and the mark ``#, fuzzy`` to be taken off.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mm_rec.translation import catalogue

PACKAGE = catalogue.FOLDER.parent

PLACES = {
    "Translatable": 0,
    "translate": 0,
    "Option": 0,
    "_size": 0,
    "LeftOutError": 0,
    "MessageError": 0,
    "event": 0,
    "report": 2,
    "NativeUnavailableError": 0,
    "with_default": 0,
    "add_argument_group": 0,
    "error": 0,  # of a parser
    "say": 1,
    "tell": 0,
    "on_event": 0,
    "message": 0,
    "check_memory": 2,
    "Finding": 1,
    "wrong_argument": 0,
    "Command": 1,
}  # fmt: skip
"""Functions that take a text for people, and the place of it among their arguments; errors come on top of these."""

KEYWORDS = ("help", "summary", "note", "licence")
"""Arguments by name that are texts for people wherever they stand."""

KEYWORDS_OF = {"Parser": ("description", "epilog"), "main": ("description",), "Source": ("size",)}
"""The same for some functions only."""

FUZZY = "#, fuzzy"
"""Marks a translation that has to be looked at."""

FOREIGN = "# argparse and the system"
"""The heading, in a catalogue, of messages that are not written in this package."""


class Text(NamedTuple):
    """The argument of a call that is a text for people."""

    module: str
    line: int
    node: ast.expr


def parse_modules() -> dict[str, ast.Module]:
    """Returns the syntax tree of each module, by its path in the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


MODULES = parse_modules()


def name_of(node: ast.expr) -> str:
    """Returns the last part of a name such as ``errors.UserError``; nothing for another expression."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def user_errors() -> set[str]:
    """Returns the names of UserError and the classes derived from it."""
    classes = [node for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {"UserError"}
    while more := {one.name for one in classes if found & set(map(name_of, one.bases))} - found:
        found |= more
    return found


def texts() -> Iterator[Text]:
    """Every argument that is a text for people, whatever expression it is."""
    places = PLACES | dict.fromkeys(user_errors(), 0)
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = name_of(node.func)
            place = places.get(name)
            if name == "error" and not (isinstance(node.func, ast.Attribute) and name_of(node.func.value) == "parser"):
                place = None  # of a logger
            if place is not None and place < len(node.args):
                yield Text(module, node.lineno, node.args[place])
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS or keyword.arg in KEYWORDS_OF.get(name, ()):
                    yield Text(module, node.lineno, keyword.value)


def literals(node: ast.expr) -> Iterator[str]:
    """The strings that an expression may be: one, or one of a choice."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from literals(node.body)
        yield from literals(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from literals(value)


def constants(tree: ast.Module) -> dict[str, str]:
    """Returns the strings that a module gives names to, and its docstring as ``__doc__``."""
    found = {"__doc__": ast.get_docstring(tree, clean=False) or ""}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found[name_of(node.targets[0])] = node.value.value
    return found


def messages() -> dict[str, str]:
    """Returns every text to translate, with the module that it first stands in."""
    found: dict[str, str] = {}
    names = {module: constants(tree) for module, tree in MODULES.items()}
    everywhere = {name: text for one in names.values() for name, text in one.items() if name.isupper()}
    for text in texts():
        if text.module.startswith("translation/"):
            continue  # its calls pass on what others wrote
        known = everywhere | names[text.module]
        named = isinstance(text.node, ast.Name) and known.get(text.node.id)
        for one in [named] if named else literals(text.node):
            if re.search(r"[^\W\d_]", re.sub(r"{.*?}", "", one)):  # more than fields and signs
                found.setdefault(one, text.module)
    for module, tree in MODULES.items():
        if any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree)):
            found.setdefault(names[module]["__doc__"], module)
    return found


def read_catalogues() -> dict[Path, dict[str, str]]:
    """Returns the entries of each catalogue."""
    paths = sorted(catalogue.FOLDER.glob("*.po"))
    return {path: catalogue.read_entries(path.read_text(encoding="utf-8")) for path in paths}


def update(path: Path, entries: dict[str, str]) -> int:
    """Write a catalogue anew: all messages by module, translated where they were; returns how many need a translator.

    What has changed in a text of several lines is marked as fuzzy, as gettext does, with the lines that it had before.
    """
    content = path.read_text(encoding="utf-8")
    head, _, rest = content.partition("\n\n")
    foreign = rest[rest.index(FOREIGN) :]
    found, blocks, open_ones = messages(), [head], 0
    by_line = {
        line: translated
        for text, translation in entries.items()
        if text.count("\n") == translation.count("\n")
        for line, translated in zip(text.split("\n"), translation.split("\n"), strict=True)
    }
    for module in sorted(set(found.values())):
        lines = []
        for text in (text for text in found if found[text] == module):
            translation = entries.get(text, "")
            fuzzy = f"{FUZZY}\nmsgid {quoted(text)}\n" in content
            if not translation and any(line in by_line for line in text.split("\n") if line.strip()):
                translation, fuzzy = "\n".join(by_line.get(line, line) for line in text.split("\n")), True
            open_ones += fuzzy or not translation
            mark = f"{FUZZY}\n" if fuzzy else ""
            lines.append(f"{mark}msgid {quoted(text)}\nmsgstr {quoted(translation)}")
        blocks.append(f"# mm_rec/{module}\n" + "\n\n".join(lines))
    path.write_text("\n\n".join([*blocks, foreign]), encoding="utf-8", newline="\n")
    return open_ones


def quoted(text: str) -> str:
    """Returns a string as gettext writes it: a line of the file for each of its lines."""
    lines = text.splitlines(keepends=True) or [""]
    return "\n".join(json.dumps(line, ensure_ascii=False) for line in (["", *lines] if len(lines) > 1 else lines))


if __name__ == "__main__":
    for path, entries in read_catalogues().items():
        print(f"{path.name}: {update(path, entries)} messages to translate")
