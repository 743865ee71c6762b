"""Options of a command: one frozen dataclass gives its flags, the keys of its YAML file, and their checks.

Defaults come first, then the file, then the flags. Unknown keys are errors. A settings class is a frozen dataclass
whose fields are annotated with :class:`Option`.
"""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mm_rec.errors import UserError
from mm_rec.stages import STAGES
from mm_rec.storage.yaml_file import read_yaml
from mm_rec.translation import Translatable

__all__ = ["Option", "add_arguments", "from_arguments", "from_values", "with_default"]

T = TypeVar("T")

MAX_INT = 2**63 - 1
"""Most that a whole number can be: larger ones fit into no tensor."""

_LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Option:
    """What a setting is for and which values it takes.

    ``section`` marks one that only the file has, ``shared`` one that cannot differ between the stages of a command.
    """

    help: str
    minimum: float | None = None
    maximum: float = float("inf")
    choices: tuple[str, ...] | None = None
    section: bool = False
    shared: bool = False


def _fields(cls: type) -> dict[str, tuple[Any, Option]]:
    """Name, type and :class:`Option` of every setting."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Annotated}


def add_arguments(
    parser: argparse.ArgumentParser,
    cls: type,
    defaults: Mapping[str, Any] | None = None,
    without: Container[str] = (),
) -> None:
    """Add ``--config`` and a flag for every field of a settings class.

    Flags that are not given leave no trace in the namespace, so that :func:`from_arguments` can tell.

    Args:
        parser: to add to.
        cls: the settings class.
        defaults: those of this command where they differ from the class's, for the help text.
        without: settings that mean nothing to this command.
    """
    group = parser.add_argument_group("settings")
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the settings below")
    for name, (hint, option) in _fields(cls).items():
        default = (defaults or {}).get(name, getattr(cls, name, None))
        if option.section or name in without:
            continue
        if _kind(hint) is dict:
            group.add_argument(
                f"--{name}",
                action="append",
                default=argparse.SUPPRESS,
                metavar="NAME=PATH",
                help=Translatable(option.help),
            )
            continue
        if hint is bool:
            group.add_argument(
                f"--{name}", action="store_true", default=argparse.SUPPRESS, help=Translatable(option.help)
            )
            continue
        group.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            choices=option.choices,
            metavar=None if option.choices else _kind(hint).__name__.upper(),
            help=Translatable(option.help) if default is None else with_default(option.help, default),
        )


def with_default(help: str, default: object) -> Translatable:
    """Returns the help of an option with its default value."""
    return Translatable("{help} (default {default})", help=Translatable(help), default=default)


def from_arguments(cls: type[T], arguments: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> T:
    """Settings from parsed arguments: defaults, then the file of ``--config``, then the flags.

    Raises:
        UserError: for an unreadable file, an unknown key or a value that does not fit.
    """
    fields = _fields(cls)
    flags = _checked({name: value for name, value in vars(arguments).items() if name in fields}, fields, "--")
    path: Path | None = getattr(arguments, "config", None)
    values = dict(defaults or {})
    if path is not None:
        values |= _checked(_read_yaml(path), fields, f"{path}: ")
    for name, (_, option) in fields.items():
        if option.section and name in values:
            values[name] = {
                stage: {key: value for key, value in section.items() if key not in flags}
                for stage, section in values[name].items()
            }
    return cls(**(values | flags))


def from_values(cls: type[T], values: Mapping[str, Any]) -> T:
    """Settings from Python values, checked as those of a file are; strings and paths are alike, sections are dicts.

    Raises:
        UserError: for an unknown name or a value that does not fit.
    """
    return cls(**_checked(values, _fields(cls), ""))


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            "{path} must hold settings as `name: value` lines, not a {kind}", path=path, kind=type(content).__name__
        )
    return content


def _checked(values: Mapping[str, Any], fields: Mapping[str, tuple[Any, Option]], origin: str) -> dict[str, Any]:
    """Settings by name, each converted to its type; ``origin`` says in errors where they come from."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{origin}{name}"
        if name not in fields:
            raise UserError("unknown setting {where}{hint}", where=where, hint=_suggestion(str(name), fields))
        hint, option = fields[name]
        checked[name] = _section(where, value, fields) if option.section else _convert(where, value, hint, option)
    return checked


def _section(where: str, value: Any, fields: Mapping[str, tuple[Any, Option]]) -> dict[str, dict[str, Any]]:
    """Settings of single stages, as ``stages: {stage2: {max_steps: 100}}`` in the file."""
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise UserError("{where} must hold the settings of each stage under its name", where=where)
    unknown = [name for name in value if name not in STAGES]
    if unknown:
        raise UserError(
            "unknown stage {where}.{name}{hint}",
            where=where,
            name=unknown[0],
            hint=_suggestion(str(unknown[0]), STAGES),
        )
    for name, one in value.items():
        for key in one:
            if key in fields and fields[key][1].shared:
                raise UserError(
                    "{where}.{name}.{key} cannot differ between stages; set {key} outside of {where}",
                    where=where,
                    name=name,
                    key=key,
                )
    plain = {name: entry for name, entry in fields.items() if not entry[1].section and name != "stage"}
    return {name: _checked(one, plain, f"{where}.{name}.") for name, one in value.items()}


def _suggestion(name: str, known: Iterable[str]) -> Translatable:
    close = difflib.get_close_matches(name, list(known), 1)
    if close:
        return Translatable("; did you mean {name}?", name=close[0])
    return Translatable("; there are {names}", names=", ".join(sorted(known)))


def _kind(hint: Any) -> type:
    """The one type of an annotation such as ``int`` or ``int | None``."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind: type = next(one for one in kinds if one is not types.NoneType)
    return typing.get_origin(kind) or kind


def _convert(where: str, value: Any, hint: Any, option: Option) -> Any:
    """``value`` as the type of its setting; a value that does not fit is an error that says what does."""
    kind = _kind(hint)
    if kind is dict:
        return _named_paths(where, value)
    if value is None and isinstance(hint, types.UnionType):
        return None
    try:
        if (kind is bool) != isinstance(value, bool) or isinstance(value, list | dict) or value is None:
            raise ValueError
        converted = value if kind is bool else kind(str(value))
        if kind is Path and "\0" in str(value):
            raise ValueError
    except ValueError:
        wanted = {
            int: Translatable("a whole number"),
            float: Translatable("a number"),
            bool: Translatable("true or false"),
            Path: Translatable("a path"),
        }.get(kind, Translatable("text"))
        raise UserError(
            "{where} must be {wanted}, got {value}", where=where, wanted=wanted, value=_shown(value)
        ) from None
    if option.minimum is not None and not option.minimum <= converted < float("inf"):
        raise UserError(
            "{where} must be at least {minimum} and finite, got {value}",
            where=where,
            minimum=option.minimum,
            value=_shown(value),
        )
    most = min(option.maximum, MAX_INT) if kind is int else option.maximum
    if kind in (int, float) and converted > most:
        raise UserError("{where} must be at most {most}, got {value}", where=where, most=most, value=_shown(value))
    if option.choices and converted not in option.choices:
        raise UserError(
            "{where} must be one of {choices}, got {value}",
            where=where,
            choices=", ".join(option.choices),
            value=_shown(value),
        )
    return converted


def _named_paths(where: str, value: Any) -> dict[str, Path]:
    """Paths by name: a list of ``NAME=PATH`` as flags give it, or a mapping as in a file."""
    if isinstance(value, list):
        pairs = [str(one).partition("=") for one in value]
        if any(not name or not path for name, _, path in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
            raise UserError("{where} must be NAME=PATH, each name once, got {value}", where=where, value=_shown(value))
        return {name: Path(path) for name, _, path in pairs}
    if not isinstance(value, dict) or not all(isinstance(one, str | Path) and one for one in value.values()):
        raise UserError("{where} must hold a path under each name, got {value}", where=where, value=_shown(value))
    return {str(name): Path(path) for name, path in value.items()}


def _shown(value: Any) -> str:
    """A value for an error message, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of so many digits
        return Translatable("a number of thousands of digits")
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
