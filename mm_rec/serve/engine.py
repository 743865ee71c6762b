"""Continuous batching: one thread that reads prompts and draws tokens for all streams together.

The state of a stream is a row of fixed size, so a batch is its rows one under the other: a stream joins by adding
its row and leaves by taking it out, between any two tokens. Every row has a list of tokens to read. Long ones
(prompts) are read in chunks between the steps; in a step each row of the batch reads one token, and a row that has
none left draws the next. What a stream gets depends on the others by rounding alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm_rec import decode
from mm_rec.generate import TextStream
from mm_rec.model import MMRecModel
from mm_rec.sampling import Draws, next_tokens
from mm_rec.serve.jobs import (
    EngineError,
    Job,
    Listener,
    Output,
    OverdueError,
    PromptRead,
    QueueFullError,
    StoppedError,
    Ticket,
    TokenScore,
)
from mm_rec.state import ModelState, flatten_state, map_state
from mm_rec.tokenizer import Tokenizer

__all__ = ["Engine"]

_log = logging.getLogger("mm_rec.serve")

ALONE_CHUNK = 512
SHARED_CHUNK = 256
"""Tokens of prompts to read between two steps: without running streams, and with them, which wait meanwhile."""

STEPPED_TOKENS = 8
"""Rests of prompts up to this long are read in steps that are taken anyway, a token in each."""


@dataclass(eq=False)
class _Row:
    """One stream: ``pending`` are the tokens that it has still to read."""

    ticket: Ticket
    choice: int
    pending: list[int]
    draws: Draws
    text: TextStream
    drawn: int = 0
    finish: str | None = None
    gone: bool = False
    prompt_scores: list[TokenScore] = field(default_factory=list)


class Engine:
    """Runs jobs on a model, in a thread of its own from :meth:`start` to :meth:`stop`.

    Args:
        model: on any device.
        tokenizer: that of the model.
        domain: the expert to use; None fuses all.
        max_streams: rows of the batch at most.
        max_queue: jobs that may wait for a row.
    """

    def __init__(
        self,
        model: MMRecModel,
        tokenizer: Tokenizer,
        domain: str | None,
        *,
        max_streams: int = 64,
        max_queue: int = 256,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.domain = domain
        self.max_streams = max_streams
        self.max_queue = max_queue
        self._control = frozenset(tokenizer.control_ids.values())
        self._padding = range(tokenizer.vocab_size, model.config.vocab_size)
        self._changed = threading.Condition()  # guards the next two
        self._waiting: deque[Ticket] = deque()
        self._stopping = False
        self._reading: deque[tuple[_Row, ModelState]] = deque()
        self._ready: list[tuple[_Row, ModelState]] = []
        self._batch: list[_Row] = []
        self._state: ModelState | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> int:
        """Rows that are taken."""
        return len(self._batch) + sum(row.ticket.job.n for row, _ in [*self._reading, *self._ready])

    @property
    def waiting(self) -> int:
        """Jobs that wait for a row."""
        return len(self._waiting)

    @property
    def memory_bytes(self) -> int:
        """Size of what the model remembers of one stream."""
        with torch.inference_mode():
            return sum(tensor.nbytes for tensor in flatten_state(self.model.initial_state(1, self.domain)).values())

    def start(self) -> None:
        """Start the thread."""
        if self._thread is not None:
            raise RuntimeError("the engine is running already")
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mm-rec-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the token it is at; jobs that are left get a StoppedError."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def submit(self, jobs: Sequence[Job], listeners: Sequence[Listener]) -> list[Ticket]:
        """Queue jobs, all or none; each listener is called in the engine's thread with the events of its job.

        Raises:
            QueueFullError: if not all of them find room in the queue; an empty one takes any number.
            StoppedError: if the engine doesn't run.
        """
        tickets = [Ticket(job, listener) for job, listener in zip(jobs, listeners, strict=True)]
        with self._changed:
            if self._stopping or self._thread is None:
                raise StoppedError("the server is shutting down")
            waiting = sum(not ticket.cancelled for ticket in self._waiting)
            if waiting and waiting + len(tickets) > self.max_queue:
                raise QueueFullError(f"{waiting} requests are waiting already; try again in a moment")
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception:
                    _log.exception("a step of the engine failed")
                    self._fail_running(EngineError("the engine failed; the server's log says why"))
        self._fail_running(StoppedError("the server is shutting down"))
        with self._changed:
            while self._waiting:
                ticket = self._waiting.popleft()
                ticket.listener(StoppedError("the server is shutting down"))

    def _wait(self) -> bool:
        """Wait for work; False if the engine is to stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._reading or self._batch):
                self._changed.wait()
            return not self._stopping

    def _turn(self) -> None:
        now = time.monotonic()
        self._leave(now)
        self._admit()
        if self._reading:
            self._read_chunk()
        self._join()
        if self._batch:
            self._step()

    def _leave(self, now: float) -> None:
        """Let go what was cancelled and end what is overdue."""
        for row in self._batch:
            if row.ticket.cancelled:
                row.gone = True
            elif now > row.ticket.job.deadline and row.finish is None:
                self._finish(row, "length")
        self._compact()
        with self._changed:
            overdue = [ticket for ticket in self._waiting if now > ticket.job.deadline and not ticket.cancelled]
            self._waiting = deque(
                ticket for ticket in self._waiting if not ticket.cancelled and now <= ticket.job.deadline
            )
        for ticket in overdue:
            ticket.listener(OverdueError("the request's time was over before its turn came"))
        for row, _ in self._reading:
            row.gone = row.ticket.cancelled or now > row.ticket.job.deadline
            if row.gone and not row.ticket.cancelled:
                row.ticket.listener(OverdueError("the request's time was over before its prompt was read"))
        if any(row.gone for row, _ in self._reading):
            self._reading = deque((row, state) for row, state in self._reading if not row.gone)

    def _admit(self) -> None:
        """Give rows to waiting jobs, first come, first served."""
        while True:
            with self._changed:
                if not self._waiting or self.running + self._waiting[0].job.n > self.max_streams:
                    return
                ticket = self._waiting.popleft()
            state = ticket.job.state or self.model.initial_state(1, self.domain)
            self._read_on(self._new_row(ticket, 0), state)

    def _new_row(self, ticket: Ticket, choice: int) -> _Row:
        job = ticket.job
        return _Row(
            ticket=ticket,
            choice=choice,
            pending=list(job.prompt),
            draws=Draws(
                job.sampling,
                torch.Generator().manual_seed((job.sampling.seed + choice) % 2**64),
                barred=[*sorted(self._control - job.ends), *self._padding],
                seen=job.prompt if job.penalise_prompt else (),
            ),
            text=TextStream(self.tokenizer, job.sampling.stop),
            prompt_scores=[TokenScore(job.prompt[0], None, ())],
        )

    def _read_on(self, row: _Row, state: ModelState) -> None:
        """Line a row up for the next chunk or, with one token left or few beside running streams, for the batch."""
        scored = row.ticket.job.prompt_logprobs
        if len(row.pending) > 1 + (STEPPED_TOKENS if self._batch and not scored else 0):
            self._reading.append((row, state))
            return
        if scored:
            row.ticket.listener(PromptRead(row.prompt_scores))
        self._ready.append((row, state))

    def _join(self) -> None:
        """Let the rows that are ready join the batch, one for every text to draw."""
        if not self._ready:
            return
        states = [] if self._state is None else [self._state]
        for row, state in self._ready:
            rows = [row, *(self._new_row(row.ticket, choice) for choice in range(1, row.ticket.job.n))]
            for one in rows:
                one.pending = row.pending.copy()
            self._batch += rows
            states += [state] * len(rows)
        self._state = _concatenate(states)
        self._ready.clear()

    def _read_chunk(self) -> None:
        """Read some of the prompts, all but their last token, in chunks of one length and without logits."""
        scored = self._reading[0][0].ticket.job.prompt_logprobs
        room = SHARED_CHUNK if self._batch or scored else ALONE_CHUNK
        chosen: list[tuple[_Row, ModelState]] = []
        longest = time_ = min(len(self._reading[0][0].pending) - 1, room)
        for row, state in self._reading:  # the first one, and those that don't make its chunk much shorter
            shorter = min(time_, len(row.pending) - 1)
            fits = shorter * (len(chosen) + 1) <= room and 2 * shorter >= longest
            if fits and row.ticket.job.prompt_logprobs == scored:
                chosen.append((row, state))
                time_ = shorter
        rows = [row for row, _ in chosen]
        tokens = torch.tensor([row.pending[:time_] for row in rows], device=self.model.embedding.weight.device)
        before = _concatenate([state for _, state in chosen])
        if scored:
            logits, after = self.model(tokens, before, self.domain)
            for row, row_logits in zip(rows, logits, strict=True):
                row.prompt_scores += self._score(row_logits, row.pending[1 : time_ + 1], row.ticket.job.top_logprobs)
        else:
            no_loss = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
            _, after = self.model(tokens, before, self.domain, targets=tokens, weight=no_loss)
        self._reading = deque((row, state) for row, state in self._reading if row not in rows)
        for index, row in enumerate(rows):
            del row.pending[:time_]
            self._read_on(row, _select(after, [index]))

    def _step(self) -> None:
        """One token for every row of the batch."""
        assert self._state is not None
        tokens = torch.tensor([row.pending.pop(0) for row in self._batch], device=self.model.embedding.weight.device)
        logits, self._state = decode.step(self.model, tokens, self._state, self.domain, donate=True)
        drawing = []
        for index, row in enumerate(self._batch):
            if row.pending:
                continue
            if row.finish is not None:
                self._end(row, _select(self._state, [index]))
            elif row.drawn >= row.ticket.job.sampling.max_new_tokens:
                self._finish(row, "length")
            else:
                drawing.append(index)
        if drawing:
            scores = logits if len(drawing) == len(self._batch) else logits[drawing]
            self._draw([self._batch[index] for index in drawing], scores.to("cpu", torch.float32))
        self._compact()

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Draw the next token of each row from its logits (B, V) and give out what it makes certain of the text."""
        tokens = next_tokens(logits, [row.draws for row in rows])
        for row, token, row_logits in zip(rows, tokens, logits, strict=True):
            job = row.ticket.job
            row.drawn += 1
            top = job.top_logprobs
            scores = () if top is None else tuple(self._score(row_logits[None], [token], top))
            if token in job.ends:
                row.ticket.listener(Output(row.choice, drawn=1, scores=scores))  # as many scores as tokens drawn
                self._finish(row, "stop")
                continue
            row.pending = [token]
            row.draws.seen.append(token)
            row.ticket.listener(Output(row.choice, row.text.push(token), 1, scores))
            if row.text.stopped:
                self._finish(row, "stop")
            elif row.drawn == job.sampling.max_new_tokens:
                self._finish(row, "length")

    def _score(self, logits: Tensor, tokens: Sequence[int], top: int | None) -> list[TokenScore]:
        """Log-probabilities of ``tokens`` (T) and of the likeliest ones under ``logits`` (T, V)."""
        scores = logits.to("cpu", torch.float32).log_softmax(-1)
        own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        values, ids = scores[:, : self.tokenizer.vocab_size].topk(min(top or 0, self.tokenizer.vocab_size))
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
        return [TokenScore(*one) for one in zip(tokens, own, tops, strict=True)]

    def _finish(self, row: _Row, reason: str) -> None:
        """The row draws no more; it ends now, or once it has read its closing tokens."""
        text = row.text.finish()
        if row.text.stopped:
            reason = "stop"
        row.finish = reason
        if row.ticket.job.closing:
            row.ticket.listener(Output(row.choice, text))
            row.pending += row.ticket.job.closing
        else:
            row.ticket.listener(Output(row.choice, text, finish=reason))
            row.gone = True

    def _end(self, row: _Row, state: ModelState) -> None:
        """The row has read its closing tokens."""
        row.ticket.listener(Output(row.choice, finish=row.finish, state=state))
        row.gone = True

    def _compact(self) -> None:
        """Take the rows that are gone out of the batch."""
        keep = [index for index, row in enumerate(self._batch) if not row.gone]
        if len(keep) == len(self._batch):
            return
        assert self._state is not None
        self._state = _select(self._state, keep) if keep else None
        self._batch = [self._batch[index] for index in keep]

    def _fail_running(self, error: EngineError) -> None:
        tickets = {
            id(row.ticket): row.ticket for row in [*self._batch, *(row for row, _ in [*self._reading, *self._ready])]
        }
        self._batch, self._state = [], None
        self._reading.clear()
        self._ready.clear()
        for ticket in tickets.values():
            ticket.listener(error)


def _concatenate(states: Sequence[ModelState]) -> ModelState:
    """The rows of several states in one."""
    columns = zip(*(flatten_state(state).values() for state in states), strict=True)
    return map_state(states[0], lambda _: torch.cat(next(columns)))


def _select(state: ModelState, rows: Sequence[int]) -> ModelState:
    """A copy of some rows."""
    return map_state(state, lambda tensor: tensor[list(rows)])
