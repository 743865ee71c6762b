"""The application: its routes and what stands before them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_rec import __version__
from mm_rec.inference.generate import end_tokens
from mm_rec.serve import schemas
from mm_rec.serve.answer import Answer, respond
from mm_rec.serve.chat import add_chat
from mm_rec.serve.connections import Connections
from mm_rec.serve.errors import ERRORS, STREAMED, ApiError, add_handlers
from mm_rec.serve.fields import SessionName
from mm_rec.serve.gate import Gate, Limits
from mm_rec.serve.jobs import Job
from mm_rec.serve.ollama import add_ollama
from mm_rec.serve.replies import CompletionFormat, Names
from mm_rec.serve.responses import add_responses
from mm_rec.serve.service import Service

__all__ = ["create_app"]

DEFAULT_COMPLETION_TOKENS = 16
MAX_SCORED_TOKENS = 32_768
"""Of prompts whose log-probabilities are asked for: each becomes some hundred bytes of the reply."""


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    limits: Limits | None = None,
    connections: Connections | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The application; its lifespan runs the engine and, at its end, closes the sessions.

    Args:
        service: what is served.
        api_key: the key that requests to /v1 and /api have to bring; None for none.
        limits: limits of requests; the defaults of :class:`Limits` if None.
        connections: those of the :class:`mm_rec.serve.server.Server` that serves it; None where there are none.
        cors_origins: the web pages elsewhere that may use the server, as ``https://example.org``, or ``*`` for all.
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
    app.add_middleware(_HeadAsGet)
    app.add_middleware(Gate, limits=limits or Limits(), connections=connections or Connections(0), api_key=api_key)
    if cors_origins:  # stands before the gate: a browser asks without a key first, and pages read refusals, too
        methods, headers = ("GET", "POST", "DELETE"), ("*",)
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=methods, allow_headers=headers)
    _add_page(app)
    _add_models(app, service)
    _add_completions(app, service)
    add_chat(app, service)
    add_responses(app, service)
    add_ollama(app, service)
    _add_sessions(app, service)
    return app


class _HeadAsGet:
    """ASGI middleware that answers HEAD with what GET has, but for the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


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
            learned_to_chat=service.learned_to_chat,
        )

    @app.get("/v1/models", responses=ERRORS)
    async def list_models() -> schemas.ModelList:
        """The model that is served."""
        return schemas.ModelList(data=[card])

    @app.get("/v1/models/{model}", responses=ERRORS)
    async def get_model(model: str) -> schemas.ModelCard:
        """The model that is served, by its name."""
        service.check_model(model)
        return card


def _add_completions(app: FastAPI, service: Service) -> None:
    tokenizer, names = service.tokenizer, Names(service.tokenizer)

    @app.post("/v1/completions", response_model=schemas.CompletionReply, responses=STREAMED)
    async def complete(body: schemas.CompletionRequest, request: Request) -> Response:
        """Continue one or many texts."""
        service.check_model(body.model)
        service.check_choices(body.n or 1)
        texts, prompts = await _read_prompts(service, body.prompt, echo=bool(body.echo))
        scored = bool(body.echo) and body.logprobs is not None
        if scored and sum(map(len, prompts)) > MAX_SCORED_TOKENS:
            raise ApiError(400, f"echo with logprobs takes {MAX_SCORED_TOKENS} tokens at most", param="prompt")
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = service.sampling(body.sampling_options(), max_tokens)
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
        form = CompletionFormat(service.header("cmpl"), names, body.logprobs, include_usage=body.wants_usage)
        answer = Answer(service.engine, jobs, form, echo=texts if body.echo else None)
        return await respond(request, answer, stream=bool(body.stream))


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


def _add_sessions(app: FastAPI, service: Service) -> None:
    @app.get("/v1/sessions/{session}", responses=ERRORS)
    async def get_session(session: SessionName) -> schemas.SessionInfo:
        """How long a conversation is and what its memory takes."""
        with service.sessions.turn(session):
            memory = await asyncio.to_thread(service.sessions.load, session)
            if memory is None:
                raise _no_session(session)
            n_bytes = service.sessions.size(session)
            return schemas.SessionInfo(id=session, turns=memory.turns, tokens=memory.tokens, bytes=n_bytes)

    @app.delete("/v1/sessions/{session}", responses=ERRORS)
    async def delete_session(session: SessionName) -> schemas.Removed:
        """Forget a conversation."""
        with service.sessions.turn(session):
            if not await asyncio.to_thread(service.sessions.remove, session):
                raise _no_session(session)
            return schemas.Removed(id=session)


def _no_session(name: str) -> ApiError:
    return ApiError(404, f"there is no session {name}", param="session", code="session_not_found")


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
