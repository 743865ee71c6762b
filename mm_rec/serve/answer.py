"""Carries the events of one request from the engine's thread to the event loop, and makes its reply of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mm_rec.serve.engine import Engine
from mm_rec.serve.errors import ApiError
from mm_rec.serve.jobs import (
    EngineError,
    Event,
    Job,
    NotANumberError,
    Output,
    OverdueError,
    PromptRead,
    QueueFullError,
    StoppedError,
    TokenScore,
    UnfollowableError,
)
from mm_rec.serve.replies import Choice, ReplyFormat, Usage
from mm_rec.state import ModelState

__all__ = ["Answer", "respond"]

_PIECE_SECONDS = 0.02
_SILENCE_SECONDS = 60.0
"""Longest time after the deadline without a word from the engine; it ends overdue jobs by itself."""


_Inbox = asyncio.Queue[tuple[int, Event]]


class _Outbox:
    """Brings events from the engine's thread to an event loop, those of some milliseconds in one call.

    What a choice gets in that time becomes one piece: waking a task and sending a piece costs a good part of a step
    of the model, and nobody reads faster. Ends and errors go at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._events: deque[tuple[_Inbox, int, Event]] = deque()
        self._called = False
        self._last = 0.0

    def put(self, inbox: _Inbox, job: int, event: Event) -> None:
        """Puts ``(job, event)`` into ``inbox`` soon; may be called from any thread."""
        self._events.append((inbox, job, event))
        loop, urgent = self._loop(), not isinstance(event, Output) or event.finish is not None
        if loop is None or (self._called and not urgent):
            return
        self._called = True
        left = 0.0 if urgent else self._last + _PIECE_SECONDS - time.monotonic()
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would read this
            if left > 0:
                loop.call_soon_threadsafe(loop.call_later, left, self._deliver)
            else:
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the events are taken: one that comes later calls again
        self._last = time.monotonic()
        merged: dict[tuple[_Inbox, int, int | None], Event] = {}
        while self._events:
            inbox, job, event = self._events.popleft()
            key = (inbox, job, event.choice if isinstance(event, Output) else None)
            before = merged.get(key)
            merged[key] = before.joined(event) if isinstance(before, Output) and isinstance(event, Output) else event
        for (inbox, job, _), event in merged.items():
            inbox.put_nowait((job, event))


_outboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Outbox] = weakref.WeakKeyDictionary()


class Answer:
    """The choices of one request as they come.

    Args:
        engine: that runs the jobs.
        jobs: one for each prompt.
        form: shape of the reply.
        echo: texts of the prompts, if they are to be given back.
        save_state: called with the state after the text, if the job asks for it, before the reply ends.
        resources: closed when the request is over, however it ended; taken over unless this raises.

    Raises:
        ApiError: 503 if the engine takes no more.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        form: ReplyFormat,
        *,
        echo: Sequence[str] | None = None,
        save_state: Callable[[ModelState], Awaitable[None]] | None = None,
        resources: contextlib.ExitStack | None = None,
    ) -> None:
        self._jobs = jobs
        self.form = form
        self._echo = echo
        self._save_state = save_state
        self._saving: asyncio.Future[None] | None = None
        self._drawn = 0
        self._begun = self._first = time.monotonic()
        self._events: _Inbox = asyncio.Queue()
        loop = asyncio.get_running_loop()
        outbox = _outboxes.setdefault(loop, _Outbox(loop))
        try:
            self._handles = engine.submit(
                jobs, [functools.partial(outbox.put, self._events, index) for index in range(len(jobs))]
            )
        except (QueueFullError, StoppedError) as error:
            raise ApiError.busy(str(error)) from error
        self._resources = (resources or contextlib.ExitStack()).pop_all()

    def close(self) -> None:
        """Closes the request's resources and drops the jobs that have not ended."""
        for handle in self._handles:
            handle.cancel()
        if self._saving is None or self._saving.done():
            self._resources.close()
        else:  # a request that is cancelled can't wait for the save, but the next one has to
            self._saving.add_done_callback(lambda _: self._resources.close())

    async def whole(self) -> dict[str, Any]:
        """Returns the reply in one piece."""
        choices: dict[int, Choice] = {}
        async for index, piece in self._pieces():
            choice = choices.setdefault(index, Choice())
            choice.text += piece.text
            choice.scores += piece.scores
            choice.finish = piece.finish
        return self.form.whole([choices[index] for index in sorted(choices)], self._usage())

    async def stream(self) -> AsyncIterator[bytes]:
        """Yields the reply in pieces; an error on the way is one, too."""
        try:
            for part in self.form.opening(sum(job.n for job in self._jobs)):
                yield part
            async for index, piece in self._pieces():
                for part in self.form.piece(index, piece):
                    yield part
            for part in self.form.closing(self._usage()):
                yield part
        except ApiError as error:
            yield self.form.failure(error)

    async def _pieces(self) -> AsyncIterator[tuple[int, Choice]]:
        """Yields the next piece of a choice with its index; the choices of all prompts are numbered in one row."""
        running = sum(job.n for job in self._jobs)
        first = [sum(job.n for job in self._jobs[:index]) for index in range(len(self._jobs))]
        prompts: dict[int, list[TokenScore]] = {}
        begun: set[int] = set()
        while running:
            job, event = await self._next()
            if isinstance(event, EngineError):
                raise self._as_api_error(event)
            if isinstance(event, PromptRead):
                prompts[job] = event.scores
                continue
            index = first[job] + event.choice
            if self._echo is not None and index not in begun:
                begun.add(index)
                yield index, Choice(self._echo[job], prompts.get(job, []))
            if event.state is not None and self._save_state is not None:
                self._saving = asyncio.ensure_future(self._save_state(event.state))
                await asyncio.shield(self._saving)
            if not self._drawn:
                self._first = time.monotonic()
            self._drawn += event.drawn
            running -= event.finish is not None
            if not running:
                self.close()  # the session is free before the client knows that its answer is complete
            yield index, Choice(event.text, list(event.scores), event.finish)

    async def _next(self) -> tuple[int, Event]:
        left = max(job.deadline for job in self._jobs) - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0) + _SILENCE_SECONDS):
                return await self._events.get()
        except TimeoutError:
            raise ApiError(500, "the engine does not answer", code="internal_error") from None

    def _as_api_error(self, error: EngineError) -> ApiError:
        if isinstance(error, OverdueError | StoppedError):
            return ApiError.busy(str(error))
        if isinstance(error, UnfollowableError):
            return ApiError(400, str(error), code="json_schema_too_complex")
        if isinstance(error, NotANumberError) and any(job.state is not None for job in self._jobs):
            return ApiError(409, f"{error}; start a new session", param="session", code="session_unusable")
        return ApiError(500, str(error), code="internal_error")

    def _usage(self) -> Usage:
        read = sum(len(job.prompt) for job in self._jobs)
        return Usage(read, self._drawn, self._first - self._begun, time.monotonic() - self._begun)


async def respond(request: Request, answer: Answer, *, stream: bool) -> Response:
    """Returns the reply to a request, which is dropped if the client goes away."""
    if stream:
        return _AnswerStream(answer)
    try:
        reply = await _while_connected(request, answer.whole())
    finally:
        answer.close()
    return Response(status_code=499) if reply is None else JSONResponse(reply)


class _AnswerStream(StreamingResponse):
    """An answer in pieces that ends when the client goes away."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            answer.stream(),
            media_type=answer.form.media_type,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _while_connected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the result of ``work``; if the client goes away first, cancels it and returns None."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
