"""The types of fields in requests: strict, with null as absence, and with words of our own for what isn't supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mm_rec.text.message import ROLE_NAMES, TEXT_PARTS, UNREADABLE, Message, MessageError, read_message, without_nulls

__all__ = [
    "FEW", "INTEGRAL", "MAX_CHOICES", "MAX_MESSAGES", "UNKNOWN_IS_NULL", "Messages", "Metadata", "Only",
    "ResponseMessages", "SessionName", "StopStrings", "Strict", "Text", "TokenIds", "unusable",
]  # fmt: skip

MAX_CHOICES = 16
MAX_MESSAGES = 1024
MAX_FIELDS = 64

EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
"""JSON values that say nothing; None comes first."""


def unusable(problem: str, *path: str | int) -> PydanticCustomError:
    """Returns the error of a field, or of the place ``path`` in it, in words that are shown as they are."""
    return PydanticCustomError("unusable", "{problem}", {"problem": problem, "path": path})


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise unusable("the text has half of a surrogate pair, which is no character") from None
    return text


def _as_integers(value: Any) -> Any:
    """Numbers of JSON have no kinds: 2.0 is an integer."""
    if isinstance(value, list):
        return [_as_integers(one) if isinstance(one, float) else one for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


UNKNOWN_IS_NULL: JsonDict = {"additionalProperties": {"type": "null"}}
"""What the description of a request says of fields that it does not name."""


class Strict(BaseModel):
    """Takes JSON values for what they are: "1" is no number, null is absence, and unknown fields are errors."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra=UNKNOWN_IS_NULL,
    )

    @model_validator(mode="before")
    @classmethod
    def _fields_that_are_there(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # Every unknown field would become an error of its own, each far larger than the field.
        if len(values) > MAX_FIELDS:
            raise unusable(f"there are more than {MAX_FIELDS} fields")
        return {name: value for name, value in values.items() if value is not None}


class Only:
    """The type of a field that isn't supported: it may hold values that change nothing.

    Args:
        values: these values, beside null.
        advice: what to do instead of asking for more.
    """

    def __init__(self, *values: Any, advice: str) -> None:
        self._values = values
        self._advice = advice

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lets pydantic check a value."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """Returns the description in ``/openapi.json``."""
        return {"enum": [*self._values, None], "description": f"not supported: {self._advice}"}

    def _check(self, value: Any) -> Any:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self._values):
            raise PydanticCustomError("unsupported", "{problem}", {"problem": self._advice})
        return value


class _MessageShape:
    """The type of a message, which :func:`mm_rec.text.message.read_message` reads.

    Args:
        also: further fields that are taken and not used, with their JSON types.
    """

    def __init__(self, **also: str) -> None:
        self._also = {"name": "string", "annotations": "array", **also}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lets pydantic read a message."""
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """Returns the description in ``/openapi.json``."""
        lists = {"annotations": {"type": ["array", "null"]}, "logprobs": {"type": ["array", "null"]}}
        part = {
            "type": "object",
            "properties": {"type": {"enum": [*TEXT_PARTS]}, "text": {"type": "string"}, **lists},
            "required": ["type", "text"],
            "additionalProperties": {"type": "null"},
        }
        parts = {"type": "array", "items": part, "minItems": 1, "maxItems": MAX_MESSAGES}
        return {
            "type": "object",
            "properties": {
                "role": {"enum": [*ROLE_NAMES], "description": "developer means system"},
                "content": {"anyOf": [{"type": "string"}, parts]},
                **{name: {"enum": [*EMPTY], "description": "not supported: empty"} for name in UNREADABLE},
                **{
                    name: {"enum": ["message", None]} if name == "type" else {"type": [kind, "null"]}
                    for name, kind in self._also.items()
                },
            },
            "required": ["role", "content"],
            "additionalProperties": {"type": "null"},
        }

    def _read(self, value: Any) -> Message:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "message"):
            raise unusable(f"of the items of a conversation this server reads messages only, not {kind!r:.80}", "type")
        try:
            message = read_message(value)
        except MessageError as error:
            raise unusable(str(error), *error.path) from None
        self._check_fields(value, {"role", "content", *UNREADABLE}, self._also)
        if isinstance(value["content"], list):
            if len(value["content"]) > MAX_MESSAGES:
                raise unusable(f"a message has {MAX_MESSAGES} parts at most", "content")
            for index, part in enumerate(value["content"]):
                lists = {"annotations": "array", "logprobs": "array"}
                self._check_fields(part, {"type", "text"}, lists, "content", index)
        return message

    def _check_fields(
        self, value: Mapping[str, Any], read: set[str], taken: Mapping[str, str], *path: str | int
    ) -> None:
        for name, one in without_nulls(value).items():
            if name not in read and name not in taken:
                problem = "a message has a field that is not a parameter of this server"
                raise PydanticCustomError("extra_forbidden", "{problem}", {"problem": problem, "path": (*path, name)})
            if name in taken and not isinstance(one, str if taken[name] == "string" else list):
                raise unusable(f"this field of a message must be a {taken[name]}", *path, name)


INTEGRAL = BeforeValidator(_as_integers)
FEW = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
Text = Annotated[str, AfterValidator(_check_unicode)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True), INTEGRAL]
StopString = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_unicode)]
StopStrings = StopString | Annotated[list[StopString], Field(max_length=16)]
SessionName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Metadata = Annotated[dict[str, str], Field(max_length=16)]
Messages = Annotated[list[Annotated[Message, _MessageShape()]], FEW]
ResponseMessages = Annotated[list[Annotated[Message, _MessageShape(type="string", id="string", status="string")]], FEW]
