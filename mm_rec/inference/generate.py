"""Text from a model, as a stream of pieces that never splits a character.

A :class:`GeneratedText` says for one text which tokens may be drawn, what text they make and when it ends; the draw
loop of :func:`generate_pieces` serves :func:`generate` and chat sessions, and the server's engine runs many of these
texts at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_rec.inference import decode
from mm_rec.inference.json_constraint import JsonConstraint
from mm_rec.inference.sampling import Sampler, Sampling, next_tokens
from mm_rec.model import MMRecModel
from mm_rec.state import ModelState
from mm_rec.text.tokenizer import Tokenizer

__all__ = [
    "BETWEEN_DOCUMENTS", "PROMPT_CHUNK", "GeneratedText", "TextStream", "end_tokens", "generate", "generate_pieces",
    "json_constraint", "read_prompt",
]  # fmt: skip

PROMPT_CHUNK = 512
BETWEEN_DOCUMENTS = "\n\n"
"""What stands between two documents that are read one after the other, without a new start."""


class TextStream:
    """Turns tokens into text as they come, and ends the text at stop strings.

    Bytes of an unfinished character wait for the rest of it, and text that may yet become a stop string
    waits until it cannot. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> str:
        """Returns the text that ``token`` makes certain, perhaps none; sets ``stopped`` at a stop string."""
        return self._release(self._decoder.decode(self._bytes[token]))

    def finish(self) -> str:
        """Returns the text that was still held back."""
        text = self._release(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        wait = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - wait
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of ``text`` with which ``stop`` begins."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens that end a text: EOS, and the end of a message, as in ``generation_config.json``."""
    return frozenset({tokenizer.eos_id, tokenizer.end_id})


def json_constraint(model: MMRecModel, tokenizer: Tokenizer, schema: Mapping[str, Any] | None) -> JsonConstraint | None:
    """Returns the constraint of a text of ``model`` to JSON that follows ``schema``; None for none.

    Raises:
        UserError: if llguidance is not installed, or the schema can't be followed.
    """
    if schema is None:
        return None
    return JsonConstraint(tokenizer, model.config.vocab_size, end_tokens(tokenizer), schema)


class GeneratedText:
    """One text while its tokens are drawn.

    Control tokens are never drawn, but for those that end the text, and neither are the rows of the embedding for
    which the tokenizer has no token. With a constraint, only what it allows is drawn.

    Args:
        tokenizer: the model's.
        vocab_size: V, the number of logits.
        sampling: how to draw, how many tokens at most, and the stop strings.
        generator: of the CPU, for the draws.
        ends: tokens that end the text and are no part of it; None takes :func:`end_tokens`.
        seen: tokens that the repetition penalty counts from the start.
        constraint: what the text has to be; it is copied, so that several texts may start from it.

    Attributes:
        sampler: draws the tokens, for :func:`mm_rec.inference.sampling.next_tokens`.
        finish_reason: "stop" after an end token or a stop string, "length" after ``max_new_tokens``, else None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        sampling: Sampling,
        generator: torch.Generator,
        *,
        ends: Collection[int] | None = None,
        seen: Iterable[int] = (),
        constraint: JsonConstraint | None = None,
    ) -> None:
        self._ends = end_tokens(tokenizer) if ends is None else ends
        self._constraint = constraint and constraint.fork()
        banned = [token for token in tokenizer.control_ids.values() if token not in self._ends]
        self.sampler = Sampler(sampling, generator, [*banned, *range(tokenizer.vocab_size, vocab_size)], seen)
        if self._constraint is not None:
            self.sampler.ban(self._constraint.banned())
        self.finish_reason: str | None = None if sampling.max_new_tokens else "length"
        self._left = sampling.max_new_tokens
        self._stream = TextStream(tokenizer, sampling.stop)

    def push(self, token: int) -> str | None:
        """Takes the token that was drawn.

        Returns:
            The text that it makes certain, perhaps none; None if the token ends the text and is no part of it.

        Raises:
            UserError: if the constraint is too complex to follow.
        """
        if token in self._ends:
            self.finish_reason = "stop"
            return None
        self.sampler.seen.append(token)
        self._left -= 1
        piece = self._stream.push(token)
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif self._constraint is not None:
            self._follow(self._constraint, token)
        if self.finish_reason is None and self._left <= 0:
            self.finish_reason = "length"
        return piece

    def _follow(self, constraint: JsonConstraint, token: int) -> None:
        """Lets the constraint say what may come after ``token``."""
        constraint.push(token)
        if constraint.is_complete:
            self.finish_reason = "stop"
        else:
            self.sampler.ban(constraint.banned())

    def finish(self) -> str:
        """Returns the text that was still held back, in which a stop string may yet be complete."""
        piece = self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"
        return piece


@torch.inference_mode()
def read_prompt(
    model: MMRecModel,
    tokens: Sequence[int],
    domain: str | None,
    state: ModelState | None = None,
    *,
    donate: bool = False,
) -> tuple[Tensor, ModelState]:
    """Reads tokens in chunks, in constant memory.

    Args:
        model: on any device.
        tokens: at least one.
        domain: the expert to use; None fuses all.
        state: what was read before; None for nothing. It stays as it is unless donated.
        donate: ``state`` is not used again, so its memory may become that of the next one.

    Returns:
        The logits (V,) after the last token and the state of the one row.
    """
    if not tokens:
        raise ValueError("a prompt has at least one token")
    ids = torch.tensor([list(tokens)], device=model.embedding.weight.device)
    if state is None:
        state = model.initial_state(1, domain)
    # All but the last token need no logits, which are the larger part of the work.
    for start in range(0, len(tokens) - 1, PROMPT_CHUNK):
        chunk = ids[:, start : min(start + PROMPT_CHUNK, len(tokens) - 1)]
        no_loss = torch.zeros_like(chunk, dtype=torch.float32)
        _, state = model(chunk, state, domain, targets=chunk, weight=no_loss)
    logits, state = decode.step(model, ids[:, -1], state, domain, donate=donate)
    return logits[0], state


def generate_pieces(
    logits: Tensor, read: Callable[[Sequence[int]], Tensor], text: GeneratedText, *, read_first: bool = False
) -> Iterator[str]:
    """Draws tokens and reads each until the text ends; yields the pieces of the text.

    Args:
        logits: (V,), those after the prompt.
        read: reads more tokens and returns the logits (V,) after the last.
        text: the text to draw.
        read_first: read each token before its piece is yielded, the last one too, so that the model has read all that
            a caller has seen who stops anywhere. Otherwise a piece comes one read earlier.
    """
    while text.finish_reason is None:
        [token] = next_tokens(logits[None], [text.sampler])
        piece = text.push(token)
        if piece is None:
            break
        if read_first:
            logits = read([token])
        if piece:
            yield piece
        if not read_first and text.finish_reason is None:
            logits = read([token])
    if piece := text.finish():
        yield piece


@torch.inference_mode()
def generate(
    model: MMRecModel,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    domain: str | None,
    json_schema: Mapping[str, Any] | None = None,
    memory: ModelState | None = None,
) -> Iterator[str]:
    """Continues ``prompt``; yields pieces of text, never a part of a character.

    Generation ends at EOS, at the end of a message, at a stop string or after ``max_new_tokens``. Control tokens
    other than these are never drawn.

    Args:
        model: on any device.
        tokenizer: the one that the model was trained with.
        prompt: text to continue, a new document from its start; may be empty.
        sampling: how to draw.
        domain: the expert to use; None fuses all.
        json_schema: let the text be JSON that follows this schema.
        memory: the state of one row that ``domain`` has made of documents read before; None for none.

    Raises:
        UserError: if the schema can't be followed.
    """
    state = memory

    def read(tokens: Sequence[int]) -> Tensor:
        nonlocal state
        logits, state = read_prompt(model, tokens, domain, state, donate=state is not memory)
        return logits

    if memory is None:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    else:
        ids = tokenizer.encode(BETWEEN_DOCUMENTS + prompt)
    generator = torch.Generator().manual_seed(sampling.seed)
    constraint = json_constraint(model, tokenizer, json_schema)
    text = GeneratedText(tokenizer, model.config.vocab_size, sampling, generator, seen=ids, constraint=constraint)
    yield from generate_pieces(read(ids), read, text)
