"""What is served: the model, the limits of one request, and what every route asks of them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mm_rec.errors import UserError
from mm_rec.inference.generate import json_constraint
from mm_rec.inference.json_constraint import JsonConstraint
from mm_rec.inference.sampling import Sampling, SamplingOptions
from mm_rec.serve.engine import Engine
from mm_rec.serve.errors import ApiError
from mm_rec.serve.sessions import SessionStore
from mm_rec.state import ModelState
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["AS_OPENAI", "Service"]

AS_OPENAI = Sampling(temperature=1.0, top_p=1.0)
"""The settings of a request of OpenAI's that has none."""


@dataclass(frozen=True)
class Service:
    """The model that is served, and the limits of one request.

    Attributes:
        name: the name by which requests ask for the model.
        engine: the engine that runs it.
        sessions: the store of conversations.
        fingerprint: hash of the model's weights, which tells it from others.
        max_prompt_bytes: bytes of text in a request at most, checked before it is tokenized; also the most token ids.
        max_tokens: tokens of one choice at most.
        seconds: time limit of one request.
        learned_to_chat: whether the model was taught to answer in conversations; None if that is not known.
        beginning: the state of one row that new conversations begin from; None for an empty one.
    """

    name: str
    engine: Engine
    sessions: SessionStore
    fingerprint: str
    max_prompt_bytes: int = 262_144
    max_tokens: int = 2048
    seconds: float = 600.0
    learned_to_chat: bool | None = None
    beginning: ModelState | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.engine.tokenizer

    def header(self, prefix: str) -> dict[str, Any]:
        """Returns the fields of one of OpenAI's replies that say which it is, and which model made it."""
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": f"mm_{self.fingerprint[:12]}",
        }

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 unless ``name`` is served."""
        if name != self.name:
            message = f"there is no model {name[:80]!r}; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_length(self, texts: Sequence[str]) -> None:
        """Raises ApiError 400 if the texts are too long to be cut into tokens."""
        n_bytes = sum(len(text.encode()) for text in texts)
        if n_bytes > self.max_prompt_bytes:
            raise ApiError(
                400,
                f"the request has {n_bytes} bytes of text, this server reads {self.max_prompt_bytes} at most",
                code="context_length_exceeded",
            )

    def check_choices(self, n: int) -> None:
        """Raises ApiError 400 if there are not as many slots as ``n`` choices take."""
        if n > self.engine.max_streams:
            raise ApiError(400, f"n is at most {self.engine.max_streams} on this server", param="n")

    def sampling(self, options: Mapping[str, Any], max_tokens: int, base: Sampling = AS_OPENAI) -> Sampling:
        """Returns the settings of a request: what it asks for, else ``base``, and a seed of its own if it has none."""
        seed = options.get("seed", secrets.randbits(63)) % 2**63
        given = {**options, "seed": seed, "max_new_tokens": min(max_tokens, self.max_tokens)}
        return Sampling.from_options(cast(SamplingOptions, given), base)

    async def constraint(self, schema: Mapping[str, Any] | None, param: str) -> JsonConstraint | None:
        """Returns the constraint of a text to JSON that follows ``schema``; None for none.

        Raises:
            ApiError: 400 if the schema, which is the field ``param`` of the request, can't be followed.
        """
        try:
            return await asyncio.to_thread(json_constraint, self.engine.model, self.tokenizer, schema)
        except UserError as error:
            raise ApiError(400, str(error), param=param, code="json_schema_not_supported") from error
