"""Continuous batching: one thread that reads prompts and draws tokens for all choices together.

The state of a choice is a row of fixed size, so the batch is the rows of its slots one under the other: a choice
joins by adding its row and leaves by taking it out, between any two tokens. Every slot has a list of tokens to read.
Long ones (prompts) are read in chunks between the steps; in a step each slot of the batch reads one token, and a slot
that has none left draws the next. What a choice gets depends on the others by rounding alone. Where experts are not
fused, the prompt decides which of them answers, and each has a batch of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.inference import decode
from mm_rec.inference.sampling import next_tokens
from mm_rec.model import MMRecModel
from mm_rec.serve.jobs import (
    EngineError,
    Job,
    JobHandle,
    Listener,
    NotANumberError,
    Output,
    OverdueError,
    PromptRead,
    QueueFullError,
    StoppedError,
    TokenScore,
    UnfollowableError,
)
from mm_rec.serve.slots import Batch, Slot, concatenate, new_slot, score_tokens, select_rows
from mm_rec.state import ModelState, flatten_state
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["Engine"]

_log = logging.getLogger("mm_rec.serve")

ALONE_CHUNK = 512
SHARED_CHUNK = 256
"""Tokens of prompts to read between two steps: while no choice is running, and while some wait for their next token."""

STEPPED_TOKENS = 8
"""The last tokens of a prompt, up to this many, are read in steps that are taken anyway, one token in each."""


class Engine:
    """Runs jobs on a model, in a thread of its own from :meth:`start` to :meth:`stop`.

    Args:
        model: on any device.
        tokenizer: that of the model.
        domain: the expert to use; None fuses all.
        choose: gives by its tokens the expert that answers a prompt before which nothing was read; None for ``domain``.
            Prompts whose own tokens are scored are read by ``domain`` in any case, so that scores can be compared.
        max_streams: slots at most, each for one choice.
        max_queue: jobs that may wait for slots.
    """

    def __init__(
        self,
        model: MMRecModel,
        tokenizer: Tokenizer,
        domain: str | None,
        *,
        choose: Callable[[Sequence[int]], str] | None = None,
        max_streams: int = 64,
        max_queue: int = 256,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.domain = domain
        self.choose = choose
        self.max_streams = max_streams
        self.max_queue = max_queue
        self._changed = threading.Condition()  # guards the next two
        self._waiting: deque[JobHandle] = deque()
        self._stopping = False
        self._reading: deque[tuple[Slot, ModelState]] = deque()
        self._ready: list[tuple[Slot, ModelState]] = []
        self._batches: dict[str | None, Batch] = {}
        self._thread: threading.Thread | None = None

    @property
    def _drawing(self) -> list[Slot]:
        """The slots of all batches."""
        return [slot for batch in list(self._batches.values()) for slot in batch.slots]

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return len(self._drawing) + sum(slot.handle.job.n for slot, _ in [*self._reading, *self._ready])

    @property
    def waiting(self) -> int:
        """Jobs that wait for slots."""
        return len(self._waiting)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the state of one choice."""
        with torch.inference_mode():
            return sum(tensor.nbytes for tensor in flatten_state(self.model.initial_state(1, self.domain)).values())

    def start(self) -> None:
        """Starts the thread."""
        if self._thread is not None:
            raise RuntimeError("the engine is running already")
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mm-rec-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the current token; jobs that are left get a StoppedError."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def submit(self, jobs: Sequence[Job], listeners: Sequence[Listener]) -> list[JobHandle]:
        """Queues jobs, all or none; each listener is called in the engine's thread with the events of its job.

        Raises:
            QueueFullError: if not all of them find room in the queue; an empty one takes any number.
            StoppedError: if the engine doesn't run.
        """
        handles = [JobHandle(job, listener) for job, listener in zip(jobs, listeners, strict=True)]
        with self._changed:
            if self._stopping or self._thread is None:
                raise StoppedError("the server is shutting down")
            waiting = sum(not handle.cancelled for handle in self._waiting)
            if waiting and waiting + len(handles) > self.max_queue:
                raise QueueFullError(f"{waiting} requests are waiting already; try again in a moment")
            self._waiting.extend(handles)
            self._changed.notify()
        return handles

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
                handle = self._waiting.popleft()
                handle.listener(StoppedError("the server is shutting down"))

    def _wait(self) -> bool:
        """Waits for work; returns False if the engine is to stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._reading or self._drawing):
                self._changed.wait()
            return not self._stopping

    def _turn(self) -> None:
        now = time.monotonic()
        self._leave(now)
        self._admit()
        if self._reading:
            self._read_chunk()
        self._join()
        for batch in list(self._batches.values()):
            if batch.slots:
                self._step(batch)

    def _leave(self, now: float) -> None:
        """Frees the slots of cancelled jobs and ends overdue ones."""
        for slot in self._drawing:
            if slot.handle.cancelled:
                slot.gone = True
            elif now > slot.handle.job.deadline and slot.finish_reason is None:
                slot.finish()
        for batch in self._batches.values():
            batch.compact()
        with self._changed:
            overdue = [handle for handle in self._waiting if now > handle.job.deadline and not handle.cancelled]
            self._waiting = deque(
                handle for handle in self._waiting if not handle.cancelled and now <= handle.job.deadline
            )
        for handle in overdue:
            handle.listener(OverdueError("the request's time was over before its turn came"))
        for slot, _ in self._reading:
            slot.gone = slot.handle.cancelled or now > slot.handle.job.deadline
            if slot.gone and not slot.handle.cancelled:
                slot.handle.listener(OverdueError("the request's time was over before its prompt was read"))
        if any(slot.gone for slot, _ in self._reading):
            self._reading = deque((slot, state) for slot, state in self._reading if not slot.gone)

    def _admit(self) -> None:
        """Gives slots to waiting jobs, first come, first served."""
        while True:
            with self._changed:
                if not self._waiting or self.running + self._waiting[0].job.n > self.max_streams:
                    return
                handle = self._waiting.popleft()
            try:
                state = handle.job.state or self._new_state(handle.job)
            except Exception:
                handle.listener(EngineError("the engine failed; the server's log says why"))
                raise
            self._read_on(self._new_slot(handle, 0), state)

    def _new_state(self, job: Job) -> ModelState:
        """The empty state of the expert that is to answer a job."""
        chosen = self.domain if self.choose is None or job.prompt_logprobs else self.choose(job.prompt)
        return self.model.initial_state(1, chosen)

    def _domain_of(self, state: ModelState) -> str | None:
        """The expert that a state belongs to; None for that of all, fused."""
        names = list(state.experts)
        return names[0] if len(names) < len(self.model.config.experts) else self.domain

    def _new_slot(self, handle: JobHandle, choice: int) -> Slot:
        return new_slot(handle, choice, self.tokenizer, self.model.config.vocab_size)

    def _read_on(self, slot: Slot, state: ModelState) -> None:
        """Queues a slot for the next chunk or, with one token left or a few while others run, for the batch."""
        scored = slot.handle.job.prompt_logprobs
        if len(slot.pending) > 1 + (STEPPED_TOKENS if self._drawing and not scored else 0):
            self._reading.append((slot, state))
            return
        if scored:
            slot.handle.listener(PromptRead(slot.prompt_scores))
        self._ready.append((slot, state))

    def _join(self) -> None:
        """Lets the slots that are ready join the batch of their expert, one for every choice of their jobs."""
        joining: dict[str | None, tuple[list[Slot], list[ModelState]]] = {}
        for slot, state in self._ready:
            slots = [slot, *(self._new_slot(slot.handle, choice) for choice in range(1, slot.handle.job.n))]
            for one in slots:
                one.pending = slot.pending.copy()
            of_expert, states = joining.setdefault(self._domain_of(state), ([], []))
            of_expert += slots
            states += [state] * len(slots)
        self._ready.clear()
        for domain, (slots, states) in joining.items():
            self._batches.setdefault(domain, Batch(domain)).join(slots, states)

    def _read_chunk(self) -> None:
        """Reads some prompts of one expert, all but their last token, in chunks of one length and without logits."""
        scored, domain = self._reading[0][0].handle.job.prompt_logprobs, self._domain_of(self._reading[0][1])
        room = SHARED_CHUNK if self._drawing or scored else ALONE_CHUNK
        chosen: list[tuple[Slot, ModelState]] = []
        longest = time_ = min(len(self._reading[0][0].pending) - 1, room)
        for slot, state in self._reading:  # the first one, and those that don't make its chunk much shorter
            shorter = min(time_, len(slot.pending) - 1)
            fits = shorter * (len(chosen) + 1) <= room and 2 * shorter >= longest
            alike = slot.handle.job.prompt_logprobs == scored and self._domain_of(state) == domain
            if fits and alike:
                chosen.append((slot, state))
                time_ = shorter
        slots = [slot for slot, _ in chosen]
        tokens = torch.tensor([slot.pending[:time_] for slot in slots], device=self.model.embedding.weight.device)
        before = concatenate([state for _, state in chosen])
        if scored:
            logits, after = self.model(tokens, before, domain)
            for slot, choice_logits in zip(slots, logits, strict=True):
                slot.prompt_scores += self._score(
                    choice_logits, slot.pending[1 : time_ + 1], slot.handle.job.top_logprobs
                )
        else:
            no_loss = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
            _, after = self.model(tokens, before, domain, targets=tokens, weight=no_loss)
        self._reading = deque((slot, state) for slot, state in self._reading if slot not in slots)
        for index, slot in enumerate(slots):
            del slot.pending[:time_]
            self._read_on(slot, select_rows(after, [index]))

    def _step(self, batch: Batch) -> None:
        """Reads one token in every slot of a batch, and draws where none is left to read."""
        assert batch.state is not None
        tokens = torch.tensor([slot.pending.pop(0) for slot in batch.slots], device=self.model.embedding.weight.device)
        logits, batch.state = decode.step(self.model, tokens, batch.state, batch.domain, donate=True)
        drawing = []
        for index, slot in enumerate(batch.slots):
            if slot.pending:
                continue
            if slot.finish_reason is not None:
                slot.end(select_rows(batch.state, [index]))
            elif slot.text.finish_reason is not None:  # there was nothing to draw
                slot.finish()
            else:
                drawing.append(index)
        if drawing:
            scores = logits if len(drawing) == len(batch.slots) else logits[drawing]
            self._draw([batch.slots[index] for index in drawing], scores.to("cpu", torch.float32))
        batch.compact()

    def _draw(self, slots: Sequence[Slot], logits: Tensor) -> None:
        """Draws the next token of each slot from its logits (B, V) and sends the text that it makes certain."""
        try:
            tokens = next_tokens(logits, [slot.text.sampler for slot in slots])
        except UserError:  # some rows are no numbers; nothing has been drawn yet
            self._fail_rows([slot for slot, row in zip(slots, logits, strict=True) if not row.amax().isfinite()])
            left = [index for index, slot in enumerate(slots) if not slot.gone]
            if left:
                self._draw([slots[index] for index in left], logits[left])
            return
        for slot, token, choice_logits in zip(slots, tokens, logits, strict=True):
            if slot.handle.cancelled:
                continue
            top = slot.handle.job.top_logprobs
            scores = () if top is None else tuple(self._score(choice_logits[None], [token], top))
            try:
                piece = slot.text.push(token)
            except UserError as error:
                self._give_up(slot.handle, error)
                continue
            if piece is not None:
                slot.pending = [token]
            slot.handle.listener(Output(slot.choice, piece or "", 1, scores))  # as many scores as tokens drawn
            if slot.text.finish_reason is not None:
                slot.finish()

    def _give_up(self, handle: JobHandle, error: UserError) -> None:
        """Ends a job whose constraint can't be followed; its slots are freed in the next turn."""
        handle.listener(UnfollowableError(str(error)))
        handle.cancel()

    def _score(self, logits: Tensor, tokens: Sequence[int], top: int | None) -> list[TokenScore]:
        return score_tokens(logits, tokens, top, self.tokenizer.vocab_size)

    def _fail_rows(self, slots: Sequence[Slot]) -> None:
        """Ends the jobs of slots whose logits are no numbers, as after a forged state; the others go on."""
        failed = {id(slot.handle): slot.handle for slot in slots}
        for slot in self._drawing:
            slot.gone = slot.gone or id(slot.handle) in failed
        for handle in failed.values():
            handle.listener(NotANumberError("the model gives no numbers after this"))

    def _fail_running(self, error: EngineError) -> None:
        handles = {
            id(slot.handle): slot.handle
            for slot in [*self._drawing, *(slot for slot, _ in [*self._reading, *self._ready])]
        }
        self._batches = {}
        self._reading.clear()
        self._ready.clear()
        for handle in handles.values():
            handle.listener(error)
