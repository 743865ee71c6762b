"""Text from a model: a stream of pieces that never splits a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mm_rec import decode
from mm_rec.model import MMRecModel
from mm_rec.sampling import Sampling, next_token
from mm_rec.state import ModelState
from mm_rec.tokenizer import Tokenizer

__all__ = ["TextStream", "generate", "read_prompt"]

PROMPT_CHUNK = 512


class TextStream:
    """Turns tokens into text as they come, and ends it at stop strings.

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
        """The text that ``token`` makes certain, perhaps none; sets ``stopped`` at a stop string."""
        return self._release(self._decoder.decode(self._bytes[token]))

    def finish(self) -> str:
        """What was still held back."""
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
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


@torch.inference_mode()
def read_prompt(
    model: MMRecModel, tokens: Sequence[int], domain: str | None, state: ModelState | None = None
) -> tuple[Tensor, ModelState]:
    """Read tokens in chunks, in constant memory.

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
    logits, state = decode.step(model, ids[:, -1], state, domain)
    return logits[0], state


@torch.inference_mode()
def generate(
    model: MMRecModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling, domain: str | None
) -> Iterator[str]:
    """Continue ``prompt``; yields pieces of text, never a part of a character.

    Generation ends at EOS, at a stop string or after ``max_new_tokens``. Control tokens other than EOS are
    never drawn.

    Args:
        model: on any device.
        tokenizer: the one that the model was trained with.
        prompt: text to continue, a new document from its start; may be empty.
        sampling: how to draw.
        domain: the expert to use; None fuses all.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    seen = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ends = (tokenizer.eos_id, tokenizer.end_id)  # as the folder's generation_config.json has it
    barred = [i for i in tokenizer.control_ids.values() if i not in ends]
    stream = TextStream(tokenizer, sampling.stop)
    logits, state = read_prompt(model, seen, domain)
    for _ in range(sampling.max_new_tokens):
        logits = logits.float()
        logits[barred] = -torch.inf
        logits[tokenizer.vocab_size :] = -torch.inf
        token = next_token(logits, sampling, generator, seen)
        if token in ends:
            break
        seen.append(token)
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
        rows, state = decode.step(model, torch.tensor([token], device=logits.device), state, domain, donate=True)
        logits = rows[0]
    if piece := stream.finish():
        yield piece
