"""The jobs that the engine runs and the events that it sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mm_rec.inference.json_constraint import JsonConstraint
from mm_rec.inference.sampling import Sampling
from mm_rec.state import ModelState

__all__ = [
    "EngineError",
    "Event",
    "Job",
    "JobHandle",
    "Listener",
    "NotANumberError",
    "Output",
    "OverdueError",
    "PromptRead",
    "QueueFullError",
    "StoppedError",
    "TokenScore",
    "UnfollowableError",
]


class EngineError(Exception):
    """A job that did not come to its end."""


class QueueFullError(EngineError):
    """Too many jobs wait already."""


class OverdueError(EngineError):
    """The job's time was over before its prompt was read."""


class NotANumberError(EngineError):
    """The model's logits are NaN or infinite: its weights, or the state before the prompt, are damaged."""


class StoppedError(EngineError):
    """The engine was stopped."""


class UnfollowableError(EngineError):
    """The job's constraint is too complex to follow."""


@dataclass(frozen=True)
class Job:
    """A prompt to read and the choices to draw after it.

    Attributes:
        prompt: token ids, at least one.
        sampling: how to draw; choice i is drawn with seed + i.
        deadline: on the clock of ``time.monotonic``; a text ends with what was drawn until then.
        ends: tokens that end the text and are no part of it.
        n: how many choices to draw; the prompt is read once.
        state: the state before the prompt, one row; None for an empty one.
        closing: tokens to read after the text. If there are any, the last output brings the state after them.
        penalise_prompt: the repetition penalty counts the tokens of the prompt, too.
        top_logprobs: how many likeliest tokens to score beside the one drawn; None gives no log-probabilities.
        prompt_logprobs: give the log-probabilities of the prompt's tokens, too.
        constraint: what each text has to be.
    """

    prompt: Sequence[int]
    sampling: Sampling
    deadline: float
    ends: frozenset[int]
    n: int = 1
    state: ModelState | None = None
    closing: tuple[int, ...] = ()
    penalise_prompt: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: JsonConstraint | None = None


class TokenScore(NamedTuple):
    """A token, its log-probability (None where nothing came before), and the likeliest tokens with theirs."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class PromptRead(NamedTuple):
    """The prompt's scores, if they were asked for; comes before every output of the job."""

    scores: list[TokenScore]


class Output(NamedTuple):
    """A piece of the text of one choice.

    Attributes:
        choice: which choice of the job, from 0.
        text: may be empty while characters or stop strings are undecided.
        drawn: how many tokens it took.
        scores: those of these tokens, if asked for.
        finish: "stop" or "length" with the last output of a choice, else None.
        state: state of one row, with the last output of a job with ``closing``.
    """

    choice: int
    text: str = ""
    drawn: int = 0
    scores: tuple[TokenScore, ...] = ()
    finish: str | None = None
    state: ModelState | None = None

    def joined(self, later: Output) -> Output:
        """Returns this piece and the next one of the same choice as one."""
        text, drawn, scores = self.text + later.text, self.drawn + later.drawn, self.scores + later.scores
        return Output(self.choice, text, drawn, scores, later.finish, later.state)


Event = PromptRead | Output | EngineError
Listener = Callable[[Event], None]


class JobHandle:
    """A job in the engine. :meth:`cancel` frees its slots before the next token; no event comes after that."""

    def __init__(self, job: Job, listener: Listener) -> None:
        self.job = job
        self.listener = listener
        self.cancelled = False

    def cancel(self) -> None:
        """Drops the job; has no effect on one that has ended."""
        self.cancelled = True
