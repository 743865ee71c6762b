"""Makes replies and streams in OpenAI's shapes of what the engine drew."""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from mm_rec.serve.errors import ApiError
from mm_rec.serve.jobs import TokenScore
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["EVENT_STREAM", "ChatFormat", "Choice", "CompletionFormat", "Names", "ReplyFormat", "Usage", "json_line"]

EVENT_STREAM = "text/event-stream"
_DONE = b"data: [DONE]\n\n"


class Names:
    """Names tokens, each differently: control tokens by their names, parts of characters by their bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes = tokenizer.token_bytes
        self._control = {id_: name for name, id_ in tokenizer.control_ids.items()}

    def __getitem__(self, token: int) -> str:
        if token in self._control:
            return self._control[token]
        content = self.bytes[token]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def scored(self, score: TokenScore) -> dict[str, Any]:
        """Returns a token with its log-probability, and the likeliest ones in its place."""
        return {**self._named(score.token, score.logprob), "top_logprobs": [self._named(*top) for top in score.top]}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self[token], "logprob": logprob, "bytes": list(self.bytes[token])}


@dataclass
class Choice:
    """The text of one choice, or the next piece of it."""

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None


class Usage(NamedTuple):
    """What a reply took.

    Attributes:
        read: tokens of the prompts.
        drawn: tokens that were drawn.
        read_seconds: time until the first of them.
        seconds: time of the whole reply.
    """

    read: int
    drawn: int
    read_seconds: float
    seconds: float


class ReplyFormat(Protocol):
    """Shapes a reply, whole or as a stream of pieces."""

    media_type: str
    """Of a stream."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Returns the reply in one piece."""

    def opening(self, n_choices: int) -> Iterable[bytes]:
        """Returns what a stream begins with."""

    def piece(self, index: int, piece: Choice) -> Iterable[bytes]:
        """Returns the next piece of a choice."""

    def closing(self, usage: Usage) -> Iterable[bytes]:
        """Returns what a stream ends with."""

    def failure(self, error: ApiError) -> bytes:
        """Returns the end of a stream that can't go on."""


def json_line(content: dict[str, Any]) -> str:
    """Returns ``content`` as JSON in one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


class _OpenAIFormat(ABC):
    """What completions and chat have in common.

    Args:
        header: fields that the reply and every piece of it carry.
        names: names of the tokens.
        top: how many likeliest tokens to list; None for no log-probabilities.
        include_usage: end a stream with its usage.
    """

    media_type = EVENT_STREAM
    object: str
    chunk_object: str

    def __init__(self, header: dict[str, Any], names: Names, top: int | None, *, include_usage: bool = False) -> None:
        self._header = header
        self._names = names
        self._top = top
        self._include_usage = include_usage

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Returns the reply in one piece."""
        made = [self.choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._header, "object": self.object, "choices": made, "usage": _tokens(usage)}

    def opening(self, n_choices: int) -> Iterator[bytes]:
        """Yields the first piece of each choice, if there is one before its text."""
        for index in range(n_choices):
            if (first := self.first_choice(index)) is not None:
                yield self._chunk([first])

    def piece(self, index: int, piece: Choice) -> Iterator[bytes]:
        """Yields the next piece of a choice."""
        if piece.text or piece.scores or piece.finish:
            yield self._chunk([self.chunk_choice(index, piece)])

    def closing(self, usage: Usage) -> Iterator[bytes]:
        """Yields the usage, if it was asked for, and the mark of the end."""
        if self._include_usage:
            yield self._chunk([], _tokens(usage))
        yield _DONE

    def failure(self, error: ApiError) -> bytes:
        """Returns the error as an event, and the mark of the end."""
        return f"data: {json_line(error.body)}\n\n".encode() + _DONE

    @abstractmethod
    def first_choice(self, index: int) -> dict[str, Any] | None:
        """Returns what comes before the first piece of a choice."""

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Returns one choice."""

    @abstractmethod
    def chunk_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Returns the next piece of a choice."""

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        chunk = {**self._header, "object": self.chunk_object, "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage
        return f"data: {json_line(chunk)}\n\n".encode()


def _tokens(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.read,
        "completion_tokens": usage.drawn,
        "total_tokens": usage.read + usage.drawn,
    }


class CompletionFormat(_OpenAIFormat):
    """Shapes completions, whole or in pieces."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, header: dict[str, Any], names: Names, top: int | None, *, include_usage: bool = False) -> None:
        super().__init__(header, names, top, include_usage=include_usage)
        self._decoders: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}

    def first_choice(self, index: int) -> None:
        """Returns None: nothing comes before the first piece."""

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Returns one choice, or the next piece of it."""
        return {
            "index": index,
            "text": choice.text,
            "logprobs": None if self._top is None else self._logprobs(index, choice.scores),
            "finish_reason": choice.finish,
        }

    def chunk_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Returns the next piece of a choice, of the same shape."""
        return self.choice(index, choice)

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        names = self._names
        return {
            "tokens": [names[score.token] for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._top_of(score) for score in scores] if self._top else None,
            "text_offset": self._offsets(index, [score.token for score in scores]),
        }

    def _top_of(self, score: TokenScore) -> dict[str, float] | None:
        """Returns the likeliest tokens, and the one that was drawn even if it is none of them."""
        if score.logprob is None:
            return None
        return {self._names[token]: value for token, value in score.top} | {self._names[score.token]: score.logprob}

    def _offsets(self, index: int, tokens: Iterable[int]) -> list[int]:
        """Returns where in the text each token begins, counted on from the piece before."""
        decoder, at = self._decoders.get(index) or (codecs.getincrementaldecoder("utf-8")("replace"), 0)
        offsets = []
        for token in tokens:
            offsets.append(at)
            at += len(decoder.decode(self._names.bytes[token]))
        self._decoders[index] = (decoder, at)
        return offsets


class ChatFormat(_OpenAIFormat):
    """Shapes answers in a conversation, whole or in pieces."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_choice(self, index: int) -> dict[str, Any]:
        """Returns the first piece, which names the role."""
        return self._delta(index, {"role": "assistant", "content": ""}, Choice())

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Returns one answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish,
        }

    def chunk_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Returns the next piece of an answer."""
        return self._delta(index, {"content": choice.text} if choice.text else {}, choice)

    def _delta(self, index: int, delta: dict[str, str], choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice) if choice.scores else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self._top is None:
            return None
        return {"content": [self._names.scored(score) for score in choice.scores]}
