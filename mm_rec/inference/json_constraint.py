"""Which tokens may come next so that a text is JSON that follows a schema.

The library `llguidance` follows the grammar of the schema and knows after every token which bytes may come next; it is
in the extra ``json``. Schemas are read as they are given: nothing that they refer to is fetched.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_rec.errors import MissingPackageError, UserError
from mm_rec.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

__all__ = ["ANY_OBJECT", "JsonConstraint"]

ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""The schema of any JSON object."""

# A model that has not learned to end a line would otherwise write white space for ever.
WHITE_SPACE = r"( |\n {0,16})?"

MAX_LEXER_STATES = 20_000
"""A state takes up to 2 kB, so that a schema takes 40 MB at most; usual ones have some hundred states."""

MAX_SCHEMA = 100_000
MAX_TEXT = 1000
"""Characters of a pattern, a name or a text that has to come; llguidance takes a time that grows with their square."""
MAX_MULTIPLE = 100_000
MAX_DIGITS = 12

_DESCRIBING = ("description", "title", "$comment", "default")
_TOO_COMPLEX = "the JSON schema is too complex to follow; make its patterns and choices simpler"


class JsonConstraint:
    """The text of one JSON value, as far as it is written.

    Args:
        tokenizer: the model's.
        vocab_size: V, the number of logits.
        ends: tokens that end a text.
        schema: a JSON schema as an object, of which :data:`ANY_OBJECT` is the plainest.

    Raises:
        UserError: if llguidance is not installed, or the schema can't be followed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int], schema: Mapping[str, Any]) -> None:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ModuleNotFoundError:
            raise MissingPackageError("JSON by a schema", "llguidance") from None
        try:
            content = json.dumps(dict(schema))
            if len(content) > MAX_SCHEMA:
                raise UserError(
                    "a JSON schema may have {most} characters, and this one has {count}",
                    most=MAX_SCHEMA,
                    count=len(content),
                )
            _check_texts(schema)
            _check_multiples(schema)
            grammar = LLMatcher.grammar_from_json_schema(content, overrides={"whitespace_pattern": WHITE_SPACE})
        except (ValueError, RecursionError) as error:
            raise UserError("this is no JSON schema: {error}", error=_one_line(error)) from None
        vocabulary = _vocabulary(tokenizer, tuple(sorted(ends)))
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            raise UserError("this JSON schema can't be followed ({reason}); leave that part of it out", reason=reason)
        self._n_tokens = tokenizer.vocab_size
        self._n_rows = vocab_size
        self.banned()  # what is too complex at its first token is refused here

    @property
    def is_complete(self) -> bool:
        """Whether the value is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def fork(self) -> JsonConstraint:
        """Returns a second text that has the same beginning and goes on independently."""
        other = object.__new__(JsonConstraint)
        other._matcher = self._matcher.deep_copy()
        other._n_tokens, other._n_rows = self._n_tokens, self._n_rows
        return other

    def banned(self) -> array[int]:
        """Returns the tokens that can't come next.

        Raises:
            UserError: if the schema is too complex to tell.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(self._n_rows, np.uint8)  # the last rows have no token
        allowed[: self._n_tokens] = np.unpackbits(bits, count=self._n_tokens, bitorder="little")
        return array("q", np.flatnonzero(allowed == 0).astype(np.int64).tobytes())

    def push(self, token: int) -> None:
        """Takes the token that comes next.

        Raises:
            UserError: if the schema is too complex to tell what it means.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(_TOO_COMPLEX)


def _check_texts(value: Any, *, literal: bool = False) -> None:
    """Refuses texts in a schema for which llguidance would compute for minutes; what only describes may be long.

    Raises:
        UserError: if there is one of more than :data:`MAX_TEXT` characters.
    """
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(
            "a text in a JSON schema may have {most} characters, and {value!r}... has {count}",
            most=MAX_TEXT,
            value=value[:20],
            count=len(value),
        )
    if isinstance(value, list):
        for one in value:
            _check_texts(one, literal=literal)
    if isinstance(value, Mapping):
        for name, one in value.items():
            if literal or name not in _DESCRIBING or not isinstance(one, str):
                _check_texts(name)
                _check_texts(one, literal=literal or name in ("const", "enum"))


def _check_multiples(schema: Mapping[str, Any]) -> None:
    """Refuses multiples for which llguidance would compute for minutes: it has a state for every remainder.

    Raises:
        UserError: if the numbers in ``multipleOf`` have a common multiple above :data:`MAX_MULTIPLE`.
    """
    numbers = [Decimal(str(number)) for number in _multiples(schema)]
    digits = max((-int(number.as_tuple().exponent) for number in numbers), default=0)
    if digits > MAX_DIGITS or any(abs(number) > MAX_MULTIPLE for number in numbers):
        common = MAX_MULTIPLE + 1
    else:
        common = math.lcm(*(int(number.scaleb(max(digits, 0))) for number in numbers))
    if common > MAX_MULTIPLE:
        raise UserError("the JSON schema has multiples that are too large together; use smaller ones in multipleOf")


def _multiples(value: Any) -> Iterator[float]:
    """Yields the numbers in ``multipleOf`` anywhere in a schema."""
    if isinstance(value, Mapping):
        number = value.get("multipleOf")
        if (
            isinstance(number, int | float)
            and type(number) is not bool
            and number == number
            and abs(number) != math.inf
        ):
            yield number
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _multiples(one)


class _Words:
    """The tokens of a tokenizer as llguidance asks for them."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = tokenizer.token_bytes
        self.special_token_ids = sorted(tokenizer.control_ids.values())
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, ends: tuple[int, ...]) -> llguidance.LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer(_Words(tokenizer), eos_token=list(ends), slices=LLTokenizer.json_slices())


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]
