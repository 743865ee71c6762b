"""Reads YAML files that people wrote: settings of commands and of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mm_rec.errors import UserError
from mm_rec.regular_file import open_regular

__all__ = ["parse_yaml", "read_bounded", "read_yaml"]

MAX_BYTES = 200_000
MAX_VALUES = 10_000
MAX_DEPTH = 20
"""Far above those of any settings file."""

_LONGEST_REASON = 300


def read_yaml(path: Path) -> Any:
    """Returns the value of a YAML file; see :func:`parse_yaml`.

    Raises:
        UserError: if the file cannot be read, is no YAML, or is far larger than settings are.
    """
    return parse_yaml(read_bounded(path), path)


def read_bounded(path: Path) -> bytes:
    """Returns the content of a settings file.

    Raises:
        UserError: if the file cannot be read, or is far larger than settings are.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            "cannot read the settings file {path}: {reason}", path=path, reason=error.strerror or error
        ) from error
    if len(content) > MAX_BYTES:
        raise UserError(
            "{path} has more than {kilobytes} kB, which is no settings file", path=path, kilobytes=MAX_BYTES // 1000
        )
    return content


def parse_yaml(content: bytes, path: Path) -> Any:
    """Returns the value in the ``content`` of the YAML file ``path``.

    A few lines of YAML can stand for billions of values (each name twice what the one before it is), or nest beyond any
    depth, so the file is looked at before values are made of it.

    Raises:
        UserError: if the content is no YAML, or far larger than settings are.
    """
    try:
        loader = yaml.SafeLoader(content.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, MAX_VALUES, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UserError("{path} is nested too deeply for a settings file", path=path) from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "{path} is not valid YAML: {reason}", path=path, reason=reason[:_LONGEST_REASON] or type(error).__name__
        ) from error


def _count(node: yaml.Node, left: int, depth: int) -> int:
    """Returns how many of ``left`` values remain beside those of ``node``; what a name repeats counts each time."""
    left -= 1
    if left < 0 or depth > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_VALUES:,} values, or more than {MAX_DEPTH} levels")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            left = _count(value, _count(key, left, depth + 1), depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            left = _count(value, left, depth + 1)
    return left
