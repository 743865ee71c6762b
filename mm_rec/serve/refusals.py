"""Says in words of our own what is wrong with a request, of the faults that pydantic finds in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["first_place", "say"]

MAX_REPORTED = 3
MAX_NAME = 80

# By the type of a fault; what stands in braces comes with it.
_WORDS = {
    "missing": "it is missing",
    "string_type": "it must be a string",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "finite_number": "it must be a finite number",
    "bool_type": "it must be true or false",
    "list_type": "it must be a list",
    "dict_type": "it must be an object",
    "model_type": "it must be an object",
    "model_attributes_type": "it must be an object",
    "literal_error": "it must be {expected}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than_equal": "it must be at most {le:g}",
    "too_short": "it must not be empty",
    "too_long": "it must have {max_length} entries or fewer",
    "string_too_short": "it must not be empty",
    "string_too_long": "it must have {max_length} characters or fewer",
    "extra_forbidden": "it is not a parameter of this server; leave it out",
    "unsupported": "{problem}",
    "unusable": "{problem}",
}

# Of fields that take more than one type or have a shape of their own, in place of what is said of one type.
_WANTED = {
    "session": "it must be 1 to 64 of a-z, 0-9, - and _, a letter or digit first",
    "keep_alive": "it must be a number or a string",
    "prompt": "it must be a text, a list of texts, or token ids as one or several lists",
    "stop": "it must be a string or a list of strings",
    "input": "it must be a text or a list of messages",
    "format": "it must be json or a JSON schema",
}

_OF_SHAPE = ("literal_error", "string_pattern_mismatch")
_TYPES = ("str", "float", "int", "bool")

Fault = Mapping[str, Any]


def say(faults: Sequence[Fault]) -> str:
    """Returns what is wrong, each field named once, in one line."""
    best = _best(faults)
    lines = [_describe(fault) for fault in best[:MAX_REPORTED]]
    return "; ".join(lines) + (f"; and {len(best) - MAX_REPORTED} more" if len(best) > MAX_REPORTED else "")


def first_place(faults: Sequence[Fault]) -> tuple[str | None, str | None]:
    """Returns the field that is wrong first, as ``messages.0.role``, and a code for programs."""
    fault = _best(faults)[0]
    codes = {
        "extra_forbidden": "unknown_parameter",
        "missing": "missing_required_parameter",
        "unsupported": "unsupported_parameter",
    }
    return ".".join(_path(fault)) or None, codes.get(fault["type"])


def _best(faults: Sequence[Fault]) -> list[Fault]:
    """Returns one fault of each field.

    Of a field that may be of several types, every type complains; the best complaint is not about the type, or else
    got furthest.
    """
    best: dict[str, Fault] = {}
    for fault in faults:
        name = str(fault["loc"][1:2])
        if name not in best or _rank(fault) > _rank(best[name]):
            best[name] = fault
    return list(best.values())


def _rank(fault: Fault) -> tuple[bool, int]:
    return not fault["type"].endswith("_type"), len(_path(fault))


def _describe(fault: Fault) -> str:
    path, kind = _path(fault), fault["type"]
    if kind == "extra_forbidden" and not path:
        return "a field has a name that is not a parameter of this server"
    if kind == "missing" and not path:
        return "the request has no body; send a JSON object"
    words = _WORDS.get(kind, "this server does not take its value")
    if (kind.endswith("_type") or kind in _OF_SHAPE) and path and path[-1] in _WANTED:
        words = _WANTED[path[-1]]
    said = words.format_map(fault.get("ctx", {}))
    return f"{'.'.join(path)}: {said}" if path else f"the request: {said}"


def _path(fault: Fault) -> list[str]:
    """``["messages", "0", "role"]`` of a fault in ("body", "messages", 0, "role"), without the names of types."""
    location: Sequence[str | int] = [*fault["loc"][1:], *fault.get("ctx", {}).get("path", ())]
    shown = (part for part in location if isinstance(part, int) or (part.isidentifier() and part not in _TYPES))
    return [str(part)[:MAX_NAME] for part in shown]
