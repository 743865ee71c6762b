"""The places of a batch: the choice drawn in each, its tokens and their scores, and the rows of their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm_rec.inference.generate import GeneratedText
from mm_rec.serve.jobs import JobHandle, Output, TokenScore
from mm_rec.state import ModelState, flatten_state, map_state
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["Batch", "Slot", "concatenate", "new_slot", "score_tokens", "select_rows"]


@dataclass(eq=False)
class Slot:
    """One place of the batch, with the choice that is drawn in it.

    Attributes:
        handle: of the job that the choice belongs to.
        choice: which text of the job, from 0.
        pending: tokens that are still to be read.
        text: the text that is drawn.
        finish_reason: why the text ended; None while it goes on.
        gone: the slot is to be freed.
        prompt_scores: of the prompt's tokens, if they were asked for.
    """

    handle: JobHandle
    choice: int
    pending: list[int]
    text: GeneratedText
    finish_reason: str | None = None
    gone: bool = False
    prompt_scores: list[TokenScore] = field(default_factory=list)

    def finish(self) -> None:
        """Ends the text, now or once its closing tokens are read."""
        rest = self.text.finish()
        self.finish_reason = self.text.finish_reason or "length"  # None: its time is over
        closing = self.handle.job.closing
        if closing:
            self.handle.listener(Output(self.choice, rest))
            self.pending += closing
        else:
            self.handle.listener(Output(self.choice, rest, finish=self.finish_reason))
            self.gone = True

    def end(self, state: ModelState) -> None:
        """Sends the state after the closing tokens and frees the slot."""
        self.handle.listener(Output(self.choice, finish=self.finish_reason, state=state))
        self.gone = True


def new_slot(handle: JobHandle, choice: int, tokenizer: Tokenizer, n_logits: int) -> Slot:
    """Returns a slot for a choice of a job, before its prompt is read."""
    job = handle.job
    return Slot(
        handle=handle,
        choice=choice,
        pending=list(job.prompt),
        text=GeneratedText(
            tokenizer,
            n_logits,
            job.sampling,
            torch.Generator().manual_seed((job.sampling.seed + choice) % 2**64),
            ends=job.ends,
            seen=job.prompt if job.penalise_prompt else (),
            constraint=job.constraint,
        ),
        prompt_scores=[TokenScore(job.prompt[0], None, ())],
    )


def score_tokens(logits: Tensor, tokens: Sequence[int], top: int | None, vocab_size: int) -> list[TokenScore]:
    """Returns the log-probabilities of ``tokens`` (T) and of the likeliest ones under ``logits`` (T, V)."""
    scores = logits.to("cpu", torch.float32).log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    values, ids = scores[:, :vocab_size].topk(min(top or 0, vocab_size))
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenScore(*one) for one in zip(tokens, own, tops, strict=True)]


@dataclass
class Batch:
    """The slots that one expert, or all fused, draw together, and their state.

    Attributes:
        domain: the expert; None fuses all.
        slots: in the order of the rows.
        state: a row for each slot; None without slots.
    """

    domain: str | None
    slots: list[Slot] = field(default_factory=list)
    state: ModelState | None = None

    def join(self, slots: Sequence[Slot], states: Sequence[ModelState]) -> None:
        """Adds slots with their states, a row or more each."""
        self.slots += slots
        self.state = concatenate([*([] if self.state is None else [self.state]), *states])

    def compact(self) -> None:
        """Takes the slots that are gone out of the batch."""
        keep = [index for index, slot in enumerate(self.slots) if not slot.gone]
        if len(keep) == len(self.slots):
            return
        assert self.state is not None
        self.state = select_rows(self.state, keep) if keep else None
        self.slots = [self.slots[index] for index in keep]


def concatenate(states: Sequence[ModelState]) -> ModelState:
    """Returns one state with the rows of several."""
    columns = zip(*(flatten_state(state).values() for state in states), strict=True)
    return map_state(states[0], lambda _: torch.cat(next(columns)))


def select_rows(state: ModelState, rows: Sequence[int]) -> ModelState:
    """Returns a copy of some rows."""
    return map_state(state, lambda tensor: tensor[list(rows)])
