"""A conversation with a model.

A :class:`ChatSession` never reads a conversation twice: what was said is in the state, which has a fixed size and
goes into one file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.inference import session_file
from mm_rec.inference.generate import GeneratedText, generate_pieces, json_constraint, read_prompt
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.state import ModelState, flatten_state
from mm_rec.storage.lock import Lock
from mm_rec.text.conversation import Message, encode_conversation, encode_message
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["QUESTIONS", "ChatSession", "transcript"]

QUESTIONS = ("Hello! Who are you?", "What can you do for me?", "Write a short story about a cat.")
"""Questions that show how a model talks."""


@dataclass
class ChatSession:
    """A conversation with a model that can be saved between two turns and goes on bitwise as if never stopped.

    :meth:`start` and :meth:`load` make one.

    Attributes:
        model, tokenizer: the model that answers, and its tokenizer.
        sampling: how replies are drawn; may be replaced between two turns.
        domain: the expert that answers; None fuses all.
        system: the system prompt; empty for none.
        state: the model's state after all that was said; tensors of one row.
        generator: draws the random numbers of all replies.
        turns: how many replies were given.
    """

    model: MMRecModel
    tokenizer: Tokenizer
    sampling: Sampling
    domain: str | None
    system: str
    state: ModelState
    generator: torch.Generator
    turns: int = 0
    _identity: dict[str, Any] | None = None

    @classmethod
    def start(
        cls,
        model: MMRecModel,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling | None = None,
        domain: str | None = None,
        system: str = "",
        messages: Iterable[Message | Mapping[str, Any]] = (),
        memory: ModelState | None = None,
    ) -> ChatSession:
        """Starts a new conversation, or one in which ``messages`` were said already.

        With ``memory``, a state of one row that ``domain`` has made, it begins from what was read before.
        """
        sampling = sampling or Sampling()
        ids, _ = encode_conversation(tokenizer, [*([Message("system", system)] if system else []), *messages])
        state = memory
        if memory is not None:
            ids = ids[1:]  # BOS stands at the beginning of what was read before
        if state is None or ids:
            _, state = read_prompt(model, ids, domain, state)
        return cls(model, tokenizer, sampling, domain, system, state, torch.Generator().manual_seed(sampling.seed))

    @property
    def n_tokens(self) -> int:
        """The number of tokens so far, of both sides."""
        return int(self.state.position[0])

    @torch.inference_mode()
    def reply(self, text: str, *, json_schema: Mapping[str, Any] | None = None) -> Iterator[str]:
        """Says ``text`` as the user; yields the model's answer in pieces, never a part of a character.

        Nothing is said until the first piece is asked for.

        An answer ends at the end token, at a stop string, after ``max_new_tokens`` or when the caller closes the
        iterator. However it ended, the model sees it closed. The repetition penalty looks at this answer only.

        Args:
            text: what the user says.
            json_schema: let the answer be JSON that follows this schema.

        Raises:
            UserError: if the schema can't be followed.
        """
        tokenizer = self.tokenizer
        constraint = json_constraint(self.model, tokenizer, json_schema)
        question, _ = encode_message(tokenizer, Message("user", text))
        logits = self._read([*question, tokenizer.control_ids["<|assistant|>"]])
        answer = GeneratedText(
            tokenizer, self.model.config.vocab_size, self.sampling, self.generator, constraint=constraint
        )
        try:
            yield from generate_pieces(logits, self._read, answer, read_first=True)
        finally:
            self._read([tokenizer.end_id])
            self.turns += 1

    def answer(self, text: str, *, json_schema: Mapping[str, Any] | None = None) -> str:
        """Says ``text`` as the user and returns the model's whole answer; see :meth:`reply`."""
        return "".join(self.reply(text, json_schema=json_schema))

    def _read(self, ids: Sequence[int]) -> Tensor:
        """Reads ``ids`` and returns the logits (V,) after them."""
        logits, self.state = read_prompt(self.model, ids, self.domain, self.state)
        return logits

    def fork(self) -> ChatSession:
        """Returns a second conversation with the same memory, which goes on independently."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return dataclasses.replace(self, generator=generator)

    def save(self, path: str | os.PathLike[str], *, owned: Lock | None = None) -> None:
        """Writes the session to ``path``, one safetensors file whose size doesn't depend on what was said.

        Args:
            path: the file.
            owned: of this file, from ``session_file.own``; None owns it only while it is written.

        Raises:
            StorageError: if it can't be written; an earlier file of that name is then still whole.
            UserError: if another process owns the file.
        """
        tensors = flatten_state(self.state)
        tensors |= {"generator": self.generator.get_state(), "turns": torch.tensor(self.turns)}
        settings = {"domain": self.domain, "system": self.system, "sampling": dataclasses.asdict(self.sampling)}
        if self._identity is None:  # reads all weights, so once for all saves
            self._identity = _identity_of(self.model, self.tokenizer)
        if owned is not None:
            owned.require()
        with contextlib.nullcontext() if owned is not None else session_file.own(Path(path)):
            session_file.write(Path(path), tensors, self._identity | settings)

    @classmethod
    def load(
        cls, path: Path, model: MMRecModel, tokenizer: Tokenizer, *, sampling: Sampling | None = None
    ) -> ChatSession:
        """Continues the session in ``path``, with other settings if ``sampling`` is given.

        Raises:
            UserError: if the file is missing or damaged, or was made with another model, precision or tokenizer.
        """
        tensors, settings = session_file.read(path, session_file.most_bytes(model))
        identity = _identity_of(model, tokenizer)
        for name, value in identity.items():
            if settings.get(name) != value:
                raise UserError(
                    f"{path} was made with another {name}; continue it with that one or start a new session"
                )
        domain, system = settings.get("domain"), settings.get("system")
        if domain not in (*model.config.experts, None) or not isinstance(system, str):
            raise session_file.not_a_session(path)
        if sampling is None:
            try:
                sampling = Sampling.from_options(settings["sampling"])
            except (UserError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise session_file.not_a_session(path) from error
        state, generator, turns = session_file.restore(path, tensors, model, domain)
        return cls(model, tokenizer, sampling, domain, system, state, generator, turns, identity)


def transcript(session: ChatSession, questions: Iterable[str], between: Callable[[], None] = lambda: None) -> str:
    """Asks ``questions`` in order and returns all that was said; ``between`` is called between two pieces."""
    lines = []
    for question in questions:
        pieces = []
        for piece in session.reply(question):
            between()
            pieces.append(piece)
        lines += [f"user: {question}", f"assistant: {''.join(pieces)}"]
    return "\n".join(lines) + "\n"


def _identity_of(model: MMRecModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what a session has to share with a model to be continued by it, in the order in which it is compared."""
    return {
        "tokenizer": tokenizer.sha256,
        "precision": str(model.dtype).removeprefix("torch."),
        "model": session_file.fingerprint(model),
    }
