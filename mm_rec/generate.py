"""Text from a model: sampling, and a stream of pieces that never splits a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.model import MMRecModel
from mm_rec.state import ModelState
from mm_rec.tokenizer import Tokenizer

__all__ = ["Sampling", "TextStream", "generate", "next_token", "read_prompt"]

PROMPT_CHUNK = 512
FIRST_LIKELIEST = 256
MIN_TEMPERATURE = 1e-6
"""Below it float32 overflows; the likeliest token is then all there is anyway."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order in which they stand here.

    Attributes:
        max_new_tokens: to draw at most.
        repetition_penalty: logits of tokens that occurred are divided by it if positive, else multiplied
            (CTRL, arXiv 1909.05858); 1 changes nothing.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability (arXiv 1904.09751).
        min_p: keep tokens at least this share as likely as the likeliest (arXiv 2407.01082).
        stop: text ends before the first of these strings.
        seed: the same seed gives the same text.
    """

    max_new_tokens: int = 200
    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens must be at least 0": self.max_new_tokens >= 0,
            "repetition_penalty must be above 0": 0 < self.repetition_penalty < float("inf"),
            "temperature must be at least 0": 0 <= self.temperature < float("inf"),
            "top_k must be at least 0": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be at least 0 and at most 1": 0 <= self.min_p <= 1,
            "stop strings must not be empty": all(self.stop),
            "seed must be a number of at most 64 bits": -(2**63) <= self.seed < 2**64,
        }
        for message, holds in checks.items():
            if not holds:
                raise UserError(message)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """Draw one token.

    Args:
        logits: (V,) any floating type, any device; -inf for what must not come.
        sampling: how to draw.
        generator: of the CPU; a draw with a temperature above 0 takes one number from it.
        seen: tokens to penalise.
    """
    scores = logits.detach().to("cpu", torch.float32).clone()
    if sampling.repetition_penalty != 1 and seen:
        index = torch.tensor(sorted(set(seen)))
        old = scores[index]
        scores[index] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    ids, probability = _kept((scores - scores.max()) / max(sampling.temperature, MIN_TEMPERATURE), sampling)
    cumulative = probability.double().cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(ids[min(int(torch.searchsorted(cumulative, draw, right=True)), len(ids) - 1)])


def _kept(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that the filters of ``sampling`` keep and their probabilities; scores (V,) are float32."""
    if not sampling.top_k and sampling.top_p == 1:  # nothing asks for an order
        probability = scores.softmax(0)
        keep = (probability >= sampling.min_p * probability.max()) & (probability > 0)
        return keep.nonzero()[:, 0], probability[keep]
    count = min(sampling.top_k or len(scores), len(scores))
    # A few tokens usually have all the probability that top_p asks for, and sorting a whole vocabulary takes longer
    # than a step of a small model.
    size = count if sampling.top_k else min(FIRST_LIKELIEST, count)
    while True:
        ordered, ids = _largest(scores, size)
        probability = (ordered - (ordered if sampling.top_k else scores).logsumexp(0)).exp()
        keep = (probability >= sampling.min_p * probability[0]) & (probability > 0)
        if sampling.top_p < 1:  # a token stays if those before it don't reach top_p yet
            keep &= probability.cumsum(0) - probability < sampling.top_p
        keep[0] = True
        if size == count or not keep[-1]:
            return ids[keep], probability[keep]
        size = min(8 * size, count)


def _largest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first ``size`` values of a stable descending sort of ``scores``, and their places."""
    candidates = (scores >= scores.topk(size).values[-1]).nonzero()[:, 0]
    ordered, order = scores[candidates].sort(descending=True, stable=True)
    return ordered[:size], candidates[order[:size]]


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
    logits, state = model.step(ids[:, -1], state, domain)
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
        rows, state = model.step(torch.tensor([token], device=logits.device), state, domain)
        logits = rows[0]
    if piece := stream.finish():
        yield piece
