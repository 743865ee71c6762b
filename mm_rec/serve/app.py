"""The routes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, Response

from mm_rec import __version__
from mm_rec.inference.generate import end_tokens
from mm_rec.inference.sampling import Sampling
from mm_rec.serve import schemas
from mm_rec.serve.answer import Answer, respond
from mm_rec.serve.connections import Connections
from mm_rec.serve.engine import Engine
from mm_rec.serve.errors import ApiError, ErrorReply, add_handlers
from mm_rec.serve.gate import Gate, Limits
from mm_rec.serve.jobs import Job
from mm_rec.serve.replies import ChatFormat, CompletionFormat, Names
from mm_rec.serve.sessions import Memory, SessionStore
from mm_rec.state import ModelState
from mm_rec.text.conversation import Message, encode_conversation, encode_message
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["Service", "create_app"]

DEFAULT_COMPLETION_TOKENS = 16
MAX_SCORED_TOKENS = 32_768
"""Of prompts whose log-probabilities are asked for: each becomes some hundred bytes of the reply."""

_Responses = dict[int | str, dict[str, Any]]

_ERRORS: _Responses = {
    "4XX": {"model": ErrorReply, "description": "The request is not served; the message says why."},
    503: {"model": ErrorReply, "description": "The server is busy; Retry-After says when to try again."},
}

_EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string", "description": "a piece of the reply as JSON, or [DONE]"}},
            "required": ["data"],
        }
    }
}


@dataclass(frozen=True)
class Service:
    """The model that is served, and the limits of one request.

    Attributes:
        name: the name by which requests ask for the model.
        engine: the engine that runs it.
        sessions: the store of conversations.
        fingerprint: hash of the model's weights, which tells it from others.
        max_prompt_bytes: bytes of text in a request at most, checked before it is tokenized; also the most token ids.
        max_tokens: tokens of one choice at most.
        seconds: time limit of one request.
    """

    name: str
    engine: Engine
    sessions: SessionStore
    fingerprint: str
    max_prompt_bytes: int = 262_144
    max_tokens: int = 2048
    seconds: float = 600.0

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.engine.tokenizer

    def header(self) -> dict[str, str]:
        """Returns the fields of a reply that say which model made it."""
        return {"model": self.name, "system_fingerprint": f"mm_{self.fingerprint[:12]}"}

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 unless ``name`` is served."""
        if name != self.name:
            message = f"there is no model {name[:80]!r}; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_length(self, texts: Sequence[str]) -> None:
        """Raises ApiError 400 if the texts are too long to be cut into tokens."""
        n_bytes = sum(len(text.encode()) for text in texts)
        if n_bytes > self.max_prompt_bytes:
            raise ApiError(
                400,
                f"the request has {n_bytes} bytes of text, this server reads {self.max_prompt_bytes} at most",
                code="context_length_exceeded",
            )

    def check_choices(self, n: int) -> None:
        """Raises ApiError 400 if there are not as many slots as ``n`` choices take."""
        if n > self.engine.max_streams:
            raise ApiError(400, f"n is at most {self.engine.max_streams} on this server", param="n")

    def sampling(self, body: schemas.SamplingFields, max_tokens: int) -> Sampling:
        """Returns the sampling settings that ``body`` asks for."""
        return Sampling(
            max_new_tokens=min(max_tokens, self.max_tokens),
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        )


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    limits: Limits | None = None,
    connections: Connections | None = None,
) -> FastAPI:
    """The application; its lifespan runs the engine and, at its end, closes the sessions.

    Args:
        service: what is served.
        api_key: the key that requests to /v1 have to bring; None for none.
        limits: limits of requests; the defaults of :class:`Limits` if None.
        connections: those of the :class:`mm_rec.serve.server.Server` that serves it; None where there are none.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)
            service.sessions.close()

    # The usual documentation pages load their scripts from elsewhere.
    app = FastAPI(title="MM-Rec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_handlers(app)
    app.add_middleware(Gate, limits=limits or Limits(), connections=connections or Connections(0), api_key=api_key)
    _add_page(app)
    _add_models(app, service)
    _add_completions(app, service)
    _add_chat(app, service)
    _add_sessions(app, service)
    return app


def _add_page(app: FastAPI) -> None:
    page = resources.files("mm_rec.serve").joinpath("chat_page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _content_policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=headers)


def _add_models(app: FastAPI, service: Service) -> None:
    card = schemas.ModelCard(id=service.name, created=int(time.time()))
    memory_bytes = service.engine.memory_bytes

    @app.get("/health")
    async def health() -> schemas.Health:
        """How busy the server is; answers without a key."""
        engine = service.engine
        return schemas.Health(
            model=service.name,
            running=engine.running,
            waiting=engine.waiting,
            slots=engine.max_streams,
            memory_bytes=memory_bytes,
        )

    @app.get("/v1/models", responses=_ERRORS)
    async def list_models() -> schemas.ModelList:
        """The model that is served."""
        return schemas.ModelList(data=[card])

    @app.get("/v1/models/{model}", responses=_ERRORS)
    async def get_model(model: str) -> schemas.ModelCard:
        """The model that is served, by its name."""
        service.check_model(model)
        return card


def _add_completions(app: FastAPI, service: Service) -> None:
    tokenizer, names = service.tokenizer, Names(service.tokenizer)
    responses: _Responses = {200: {"content": _EVENTS}, **_ERRORS}

    @app.post("/v1/completions", response_model=schemas.CompletionReply, responses=responses)
    async def complete(body: schemas.CompletionRequest, request: Request) -> Response:
        """Continue one or many texts."""
        service.check_model(body.model)
        service.check_choices(body.n or 1)
        texts, prompts = await _read_prompts(service, body.prompt, echo=bool(body.echo))
        scored = bool(body.echo) and body.logprobs is not None
        if scored and sum(map(len, prompts)) > MAX_SCORED_TOKENS:
            raise ApiError(400, f"echo with logprobs takes {MAX_SCORED_TOKENS} tokens at most", param="prompt")
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = service.sampling(body, max_tokens)
        deadline = time.monotonic() + service.seconds
        jobs = [
            Job(
                prompt,
                sampling,
                deadline,
                ends=end_tokens(tokenizer),
                n=body.n or 1,
                penalise_prompt=True,
                top_logprobs=body.logprobs,
                prompt_logprobs=scored,
            )
            for prompt in prompts
        ]
        form = CompletionFormat(names, body.logprobs)
        answer = Answer(service.engine, jobs, form, service.header(), echo=texts if body.echo else None)
        return await respond(request, answer, stream=bool(body.stream), include_usage=_wants_usage(body))


async def _read_prompts(
    service: Service, prompt: str | list[int] | list[str] | list[list[int]], *, echo: bool
) -> tuple[list[str], list[list[int]]]:
    """Returns texts and ids of the prompts. A text gets BOS first; ids stay as they are and get a text only to echo."""
    tokenizer = service.tokenizer
    many: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    if isinstance(many[0], str):
        service.check_length(many)
        encoded = await asyncio.to_thread(tokenizer.encode_batch, many)
        return many, [[tokenizer.bos_id, *ids] for ids in encoded]
    if sum(map(len, many)) > service.max_prompt_bytes:
        raise ApiError(
            400,
            f"the request has more than {service.max_prompt_bytes} tokens",
            param="prompt",
            code="context_length_exceeded",
        )
    if max(map(max, many)) >= tokenizer.vocab_size:
        raise ApiError(400, f"token ids are below {tokenizer.vocab_size}", param="prompt", code="invalid_token_id")
    return [tokenizer.decode(ids) for ids in many] if echo else [], many


def _add_chat(app: FastAPI, service: Service) -> None:
    tokenizer, names = service.tokenizer, Names(service.tokenizer)
    responses: _Responses = {200: {"content": _EVENTS}, **_ERRORS}

    @app.post("/v1/chat/completions", response_model=schemas.ChatReply, responses=responses)
    async def chat(body: schemas.ChatRequest, request: Request) -> Response:
        """Answer a conversation, or go on with one whose memory was saved."""
        service.check_model(body.model)
        service.check_choices(body.n or 1)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if body.session is not None and (body.n or 1) > 1:
            raise ApiError(400, "a session has one answer: n must be 1", param="n")
        messages = [_as_message(message) for message in body.messages]
        service.check_length([message.content for message in messages])
        sampling = service.sampling(body, body.max_completion_tokens or body.max_tokens or service.max_tokens)
        with ExitStack() as stack:
            memory = None
            if body.session is not None:
                stack.enter_context(service.sessions.turn(body.session))
                memory = await asyncio.to_thread(service.sessions.load, body.session)
            top = (body.top_logprobs or 0) if body.logprobs else None
            job = Job(
                await asyncio.to_thread(_encode, tokenizer, messages, memory is not None),
                sampling,
                time.monotonic() + service.seconds,
                ends=end_tokens(tokenizer),
                n=body.n or 1,
                state=None if memory is None else memory.state,
                closing=() if body.session is None else (tokenizer.end_id,),
                top_logprobs=top,
            )

            async def save_state(state: ModelState) -> None:
                after = Memory(state, 1 if memory is None else memory.turns + 1)
                assert body.session is not None
                await asyncio.to_thread(service.sessions.save, body.session, after)

            form = ChatFormat(names, top)
            answer = Answer(service.engine, [job], form, service.header(), save_state=save_state, resources=stack)
        return await respond(request, answer, stream=bool(body.stream), include_usage=_wants_usage(body))


def _as_message(message: schemas.ChatMessage) -> Message:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return Message("system" if message.role == "developer" else message.role, text)


def _encode(tokenizer: Tokenizer, messages: Sequence[Message], going_on: bool) -> list[int]:
    """Returns the ids of a conversation, or of what is new in it, up to the place where the answer begins."""
    if going_on:
        ids = [token for message in messages for token in encode_message(tokenizer, message)[0]]
    else:
        ids = encode_conversation(tokenizer, messages)[0]
    return [*ids, tokenizer.control_ids["<|assistant|>"]]


def _add_sessions(app: FastAPI, service: Service) -> None:
    @app.get("/v1/sessions/{session}", responses=_ERRORS)
    async def get_session(session: schemas.SessionName) -> schemas.SessionInfo:
        """How long a conversation is and what its memory takes."""
        with service.sessions.turn(session):
            memory = await asyncio.to_thread(service.sessions.load, session)
            if memory is None:
                raise _no_session(session)
            n_bytes = service.sessions.size(session)
            return schemas.SessionInfo(id=session, turns=memory.turns, tokens=memory.tokens, bytes=n_bytes)

    @app.delete("/v1/sessions/{session}", responses=_ERRORS)
    async def delete_session(session: schemas.SessionName) -> schemas.Removed:
        """Forget a conversation."""
        with service.sessions.turn(session):
            if not await asyncio.to_thread(service.sessions.remove, session):
                raise _no_session(session)
            return schemas.Removed(id=session)


def _no_session(name: str) -> ApiError:
    return ApiError(404, f"there is no session {name}", param="session", code="session_not_found")


def _wants_usage(body: schemas.SamplingFields) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _content_policy(page: str) -> str:
    """Returns a Content-Security-Policy that allows the style and script written in the page, and requests to here."""

    def digests(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts
        )

    return (
        f"default-src 'none'; style-src {digests('style')}; script-src {digests('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
