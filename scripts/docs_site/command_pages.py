"""The page of all commands, made from their parsers."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from docs_site.markdown import code, table
from mm_rec.cli import COMMANDS
from mm_rec.program import Parser

__all__ = ["make_page", "options_of", "parser_of"]

_DEFAULT = re.compile(r"\s*\(default:? ((?:[^()]|\([^()]*\))*)\)$")

INTRODUCTION = """# Commands

Each command explains itself with `--help`; this page holds the same, made from the parsers of the commands. A value
that is written in CAPITALS is one that you choose. Options of *settings* can also stand in the YAML file of
`--config`, as `name: value`; [Settings](settings.md) has their limits.
"""


class _ParserFoundError(Exception):
    """Raised in place of parsing; holds the parser."""


def parser_of(name: str) -> argparse.ArgumentParser:
    """Returns the parser of a command. Its ``main`` makes the parser, so that is run up to where it would parse."""

    def stop(parser: Parser, *_: Any, **__: Any) -> NoReturn:
        raise _ParserFoundError(parser)

    module = importlib.import_module(COMMANDS[name].module)
    with mock.patch.object(Parser, "parse_args", stop):
        try:
            module.main([], prog=f"mm-rec {name}")
        except _ParserFoundError as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise AssertionError(f"mm-rec {name} does not parse its arguments with mm_rec.program.Parser")


def options_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Yields the options of a parser with the name of their group, --help left out."""
    for group in parser._action_groups:
        for action in group._group_actions:
            if not isinstance(action, argparse._HelpAction):
                yield group.title or "options", action


def make_page() -> str:
    """Returns the page in Markdown."""
    pages = [INTRODUCTION]
    for name, command in COMMANDS.items():
        parser = parser_of(name)
        rows: dict[str, list[list[str]]] = {}
        for group, action in options_of(parser):
            rows.setdefault(group, []).append(_row(action))
        tables = [f"\n**{group}**\n\n{table(['option', 'meaning', 'default'], rows[group])}" for group in rows]
        pages.append(
            f"\n## mm-rec {name}\n\n{_sentence(command.summary)}\n\n{_text(parser.description)}\n"
            f"{''.join(tables)}\n{_as_code(parser.epilog)}"
        )
    return "\n".join(pages)


def _row(action: argparse.Action) -> list[str]:
    meaning, default = action.help or "", _default(action)
    if found := _DEFAULT.search(meaning):
        default, meaning = default or found[1], meaning[: found.start()]
    names = action.option_strings or [str(action.metavar or action.dest)]
    takes = "" if action.nargs == 0 else f" {_value(action)}"
    if action.required:
        meaning += " (required)"
    return [code(", ".join(names) + takes if action.option_strings else names[0]), _plain(meaning), code(default)]


def _value(action: argparse.Action) -> str:
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper()) + (" ..." if action.nargs in ("+", "*") else "")


def _default(action: argparse.Action) -> str:
    value = action.default
    if value in (None, argparse.SUPPRESS, []) or isinstance(value, bool):
        return ""
    if isinstance(value, list):
        return " ".join("x".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value)
    return value.as_posix() if isinstance(value, Path) else str(value)


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*").replace("%%", "%")


def _text(description: str | None) -> str:
    return (description or "").strip()


def _sentence(summary: str) -> str:
    return f"*{summary[:1].upper()}{summary[1:]}.*"


def _as_code(epilog: str | None) -> str:
    return f"```text\n{epilog.strip()}\n```\n" if epilog and epilog.strip() else ""
