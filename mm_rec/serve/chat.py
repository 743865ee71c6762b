"""Answers to conversations: how every protocol gets one, and the route of OpenAI's chat requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from fastapi import FastAPI, Request
from starlette.responses import Response

from mm_rec.inference.generate import end_tokens
from mm_rec.inference.json_constraint import JsonConstraint
from mm_rec.inference.sampling import Sampling
from mm_rec.serve import schemas
from mm_rec.serve.answer import Answer, respond
from mm_rec.serve.errors import STREAMED, ApiError
from mm_rec.serve.jobs import Job
from mm_rec.serve.replies import ChatFormat, Names, ReplyFormat
from mm_rec.serve.service import Service
from mm_rec.serve.sessions import Memory
from mm_rec.state import ModelState
from mm_rec.text.conversation import encode_conversation, encode_message
from mm_rec.text.message import Message
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["Wish", "add_chat", "answer_conversation", "continue_text"]


class Wish(NamedTuple):
    """How a conversation is to be answered.

    Attributes:
        sampling: how tokens are drawn.
        n: how many answers to draw.
        top: how many likeliest tokens to score beside those drawn; None gives no log-probabilities.
        constraint: what an answer has to be.
        session: name of the session to go on with; None for none.
    """

    sampling: Sampling
    n: int = 1
    top: int | None = None
    constraint: JsonConstraint | None = None
    session: str | None = None


async def answer_conversation(service: Service, messages: Sequence[Message], form: ReplyFormat, wish: Wish) -> Answer:
    """Begins to answer a conversation, or to go on with one whose memory was saved.

    Raises:
        ApiError: if it is too long, the server is full, or another request uses the session.
    """
    service.check_length([message.content for message in messages])
    with ExitStack() as stack:
        memory = None
        if wish.session is not None:
            stack.enter_context(service.sessions.turn(wish.session))
            memory = await asyncio.to_thread(service.sessions.load, wish.session)
        before = service.beginning if memory is None else memory.state
        job = Job(
            await asyncio.to_thread(_encode, service.tokenizer, messages, before is not None),
            wish.sampling,
            time.monotonic() + service.seconds,
            ends=end_tokens(service.tokenizer),
            n=wish.n,
            state=before,
            closing=() if wish.session is None else (service.tokenizer.end_id,),
            top_logprobs=wish.top,
            constraint=wish.constraint,
        )

        async def save_state(state: ModelState) -> None:
            after = Memory(state, 1 if memory is None else memory.turns + 1)
            assert wish.session is not None
            await asyncio.to_thread(service.sessions.save, wish.session, after)

        return Answer(service.engine, [job], form, save_state=save_state, resources=stack)


async def continue_text(service: Service, text: str, form: ReplyFormat, wish: Wish) -> Answer:
    """Begins to continue a text, which starts a document.

    Raises:
        ApiError: if it is too long, or the server is full.
    """
    service.check_length([text])
    ids = [service.tokenizer.bos_id, *await asyncio.to_thread(service.tokenizer.encode, text)]
    deadline = time.monotonic() + service.seconds
    job = Job(
        ids,
        wish.sampling,
        deadline,
        ends=end_tokens(service.tokenizer),
        penalise_prompt=True,
        top_logprobs=wish.top,
        constraint=wish.constraint,
    )
    return Answer(service.engine, [job], form)


def _encode(tokenizer: Tokenizer, messages: Sequence[Message], going_on: bool) -> list[int]:
    """Returns the ids of a conversation, or of what is new in it, up to the place where the answer begins."""
    if going_on:
        ids = [token for message in messages for token in encode_message(tokenizer, message)[0]]
    else:
        ids = encode_conversation(tokenizer, messages)[0]
    return [*ids, tokenizer.control_ids["<|assistant|>"]]


def add_chat(app: FastAPI, service: Service) -> None:
    """Adds the route of chat requests."""
    names = Names(service.tokenizer)

    @app.post("/v1/chat/completions", response_model=schemas.ChatReply, responses=STREAMED)
    async def chat(body: schemas.ChatRequest, request: Request) -> Response:
        """Answer a conversation, or go on with one whose memory was saved."""
        service.check_model(body.model)
        service.check_choices(body.n or 1)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if body.session is not None and (body.n or 1) > 1:
            raise ApiError(400, "a session has one answer: n must be 1", param="n")
        schema = None if body.response_format is None else body.response_format.schema_to_follow
        wish = Wish(
            service.sampling(
                body.sampling_options(), body.max_completion_tokens or body.max_tokens or service.max_tokens
            ),
            n=body.n or 1,
            top=(body.top_logprobs or 0) if body.logprobs else None,
            constraint=await service.constraint(schema, "response_format"),
            session=body.session,
        )
        form = ChatFormat(service.header("chatcmpl"), names, wish.top, include_usage=body.wants_usage)
        answer = await answer_conversation(service, body.messages, form, wish)
        return await respond(request, answer, stream=bool(body.stream))
