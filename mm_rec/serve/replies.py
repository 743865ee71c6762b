"""Makes replies and streams in OpenAI's shapes of what the engine drew."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm_rec.serve.jobs import TokenScore
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["ChatFormat", "Choice", "CompletionFormat", "Names"]


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


@dataclass
class Choice:
    """The text of one choice, or the next piece of it."""

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None


class CompletionFormat:
    """Shapes completions, whole or in pieces.

    Args:
        names: names of the tokens.
        top: how many likeliest tokens to list; None for no log-probabilities.
    """

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, names: Names, top: int | None) -> None:
        self._names = names
        self._top = top
        self._decoders: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}

    def opening(self, index: int) -> None:
        """Returns None: nothing comes before the first piece."""

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Returns one choice, or the next piece of it."""
        return {
            "index": index,
            "text": choice.text,
            "logprobs": None if self._top is None else self._logprobs(index, choice.scores),
            "finish_reason": choice.finish,
        }

    chunk_choice = choice

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


class ChatFormat:
    """Shapes answers in a conversation, whole or in pieces.

    Args:
        names: names of the tokens.
        top: how many likeliest tokens to list; None for no log-probabilities.
    """

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, names: Names, top: int | None) -> None:
        self._names = names
        self._top = top

    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first piece, which names the role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, Choice())

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
        return self._chunk(index, {"content": choice.text} if choice.text else {}, choice)

    def _chunk(self, index: int, delta: dict[str, str], choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice) if choice.scores else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self._top is None:
            return None
        return {
            "content": [
                {**self._token(score.token, score.logprob), "top_logprobs": [self._token(*top) for top in score.top]}
                for score in choice.scores
            ]
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._names[token], "logprob": logprob, "bytes": list(self._names.bytes[token])}
