"""Ollama's protocol, for text: its chat and generate, so that its clients talk with the model that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from starlette.responses import JSONResponse, Response

from mm_rec.inference.json_constraint import ANY_OBJECT
from mm_rec.inference.sampling import Sampling
from mm_rec.serve.answer import respond
from mm_rec.serve.chat import Wish, answer_conversation, continue_text
from mm_rec.serve.errors import OLLAMA_ERRORS, ApiError
from mm_rec.serve.fields import INTEGRAL, UNKNOWN_IS_NULL, Messages, Only, StopStrings, Strict, Text
from mm_rec.serve.ollama_models import add_ollama_models, check_ollama_model, now
from mm_rec.serve.replies import Choice, Names, Usage, json_line
from mm_rec.serve.service import Service
from mm_rec.text.message import Message, without_nulls

__all__ = ["add_ollama"]

DEFAULTS = Sampling(temperature=0.8, top_k=40, top_p=0.9)
"""Those that Ollama documents, but for its penalty of repetitions: a request gets that if it asks for it."""

TEXT_ONLY = "this model reads text only; say it in the prompt"
NO_PENALTY = "use repeat_penalty, which counts all that was said"
NOT_DRAWN_SO = "tokens aren't drawn in this way here; use temperature, top_k, top_p or min_p"


Whole = Annotated[int, INTEGRAL]


class Options(Strict):
    """How tokens are drawn; settings of the machine are taken and not used."""

    num_predict: Annotated[int, Field(ge=-2), INTEGRAL] | None = Field(
        None, description="tokens to draw at most; below 0 as many as the server's limit"
    )
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_k: Annotated[int, Field(ge=0), INTEGRAL] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1), INTEGRAL] | None = Field(
        None, description="0 turns repeat_penalty off; otherwise it counts the whole text"
    )
    stop: StopStrings | None = None
    seed: Whole | None = None
    presence_penalty: Annotated[Any, Only(0, advice=NO_PENALTY)] = None
    frequency_penalty: Annotated[Any, Only(0, advice=NO_PENALTY)] = None
    penalize_newline: Annotated[Any, Only(True, advice="a penalty counts line breaks, too")] = None
    typical_p: Annotated[Any, Only(1, advice=NOT_DRAWN_SO)] = None
    tfs_z: Annotated[Any, Only(1, advice=NOT_DRAWN_SO)] = None
    mirostat: Annotated[Any, Only(0, advice=NOT_DRAWN_SO)] = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    num_ctx: Whole | None = None
    num_keep: Whole | None = None
    num_batch: Whole | None = None
    num_gpu: Whole | None = None
    num_thread: Whole | None = None
    main_gpu: Whole | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    embedding_only: bool | None = None

    def sampling_options(self) -> dict[str, Any]:
        """Returns what the request says about drawing."""
        penalty = None if self.repeat_last_n == 0 else self.repeat_penalty
        names = ("temperature", "top_k", "top_p", "min_p", "stop", "seed")
        return without_nulls({"repetition_penalty": penalty, **{name: getattr(self, name) for name in names}})


class OllamaRequest(Strict):
    """What requests for a text share."""

    model: str = Field(description="the name that /api/tags gives")
    stream: bool | None = Field(None, description="true if null")
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = Field(None, description="json, or a JSON schema to follow")
    logprobs: bool | None = Field(None, description="give log-probabilities")
    top_logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = Field(
        None, description="and those of so many likeliest tokens; needs logprobs"
    )
    keep_alive: float | str | None = Field(None, description="taken, not used: the model stays loaded")
    think: Annotated[Any, Only(False, advice="this model doesn't think before it answers; leave it out")] = None
    template: Annotated[Any, Only("", advice="the model has a template of its own; set raw for a text without")] = None


class OllamaChatRequest(OllamaRequest):
    """Body of POST /api/chat."""

    messages: Messages | Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="the conversation")
    tools: Annotated[Any, Only([], advice="this model calls no tools; ask for JSON with format")] = None


_RAW_WITH_SYSTEM: JsonDict = {
    "required": ["raw", "system"],
    "properties": {"raw": {"const": True}, "system": {"type": "string", "minLength": 1}},
}


class OllamaGenerateRequest(OllamaRequest):
    """Body of POST /api/generate."""

    model_config = ConfigDict(json_schema_extra={**UNKNOWN_IS_NULL, "not": _RAW_WITH_SYSTEM})

    prompt: Text | None = Field(None, description="what the user says or, with raw, the text to continue")
    system: Text | None = Field(None, description="the system message before it")
    raw: bool | None = Field(None, description="continue the prompt as it stands, outside of a conversation")
    suffix: Annotated[Any, Only("", advice="this model writes on from a text, not towards one; leave it out")] = None
    images: Annotated[Any, Only([], advice=TEXT_ONLY)] = None
    context: Annotated[Any, Only([], advice="send the conversation to /api/chat as messages")] = None


class OllamaReply(BaseModel):
    """Reply to POST /api/chat and /api/generate; a stream is many of them, one a line. Durations are nanoseconds."""

    model: str
    created_at: str
    message: dict[str, Any] | None = None
    response: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaForm:
    """Shapes a reply, whole or as lines of JSON.

    Args:
        model: its name.
        names: names of the tokens; None for no log-probabilities.
        text: gives the fields that hold a text.
    """

    media_type = "application/x-ndjson"

    def __init__(self, model: str, names: Names | None, text: Callable[[str], dict[str, Any]]) -> None:
        self._model = model
        self._names = names
        self._text = text
        self._finish: str | None = None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Returns the reply in one piece."""
        [choice] = choices
        return {**self._part(choice), **_end(choice.finish), **_figures(usage)}

    def opening(self, n_choices: int) -> Iterator[bytes]:
        """Yields nothing: nothing comes before the first piece."""
        yield from ()

    def piece(self, index: int, piece: Choice) -> Iterator[bytes]:
        """Yields the next piece of the text."""
        self._finish = piece.finish or self._finish
        if piece.text or (piece.scores and self._names):
            yield _line({**self._part(piece), "done": False})

    def closing(self, usage: Usage) -> Iterator[bytes]:
        """Yields the last line."""
        yield _line({**self._part(Choice()), **_end(self._finish), **_figures(usage)})

    def failure(self, error: ApiError) -> bytes:
        """Returns the error as the last line."""
        return _line(error.for_ollama())

    def loaded(self) -> dict[str, Any]:
        """Returns the reply to a request that asks for no text, by which clients load a model."""
        return {**self._part(Choice()), **_end("load")}

    def _part(self, choice: Choice) -> dict[str, Any]:
        part = {"model": self._model, "created_at": now(), **self._text(choice.text)}
        if self._names is not None and choice.scores:
            part["logprobs"] = [self._names.scored(score) for score in choice.scores]
        return part


def _end(reason: str | None) -> dict[str, Any]:
    return {"done": True, "done_reason": reason}


def _figures(usage: Usage) -> dict[str, int]:
    nanoseconds = 1_000_000_000
    return {
        "total_duration": int(usage.seconds * nanoseconds),
        "load_duration": 0,
        "prompt_eval_count": usage.read,
        "prompt_eval_duration": int(usage.read_seconds * nanoseconds),
        "eval_count": usage.drawn,
        "eval_duration": int((usage.seconds - usage.read_seconds) * nanoseconds),
    }


def _line(content: dict[str, Any]) -> bytes:
    return f"{json_line(content)}\n".encode()


def add_ollama(app: FastAPI, service: Service) -> None:
    """Adds the routes of Ollama's clients."""
    add_ollama_models(app, service)
    names = Names(service.tokenizer)
    lines = {"application/x-ndjson": {"schema": {"type": "object"}}}
    responses = {200: {"content": lines}, **OLLAMA_ERRORS}

    async def wish_of(body: OllamaRequest) -> Wish:
        check_ollama_model(service, body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true")
        options = body.options or Options.model_validate({})
        asked = -1 if options.num_predict is None else options.num_predict
        schema = {"json": ANY_OBJECT}.get(body.format) if isinstance(body.format, str) else body.format
        return Wish(
            service.sampling(options.sampling_options(), asked if asked >= 0 else service.max_tokens, DEFAULTS),
            top=(body.top_logprobs or 0) if body.logprobs else None,
            constraint=await service.constraint(schema, "format"),
        )

    @app.post("/api/chat", response_model=OllamaReply, responses=responses)
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        wish = await wish_of(body)
        form = OllamaForm(
            body.model,
            names if body.logprobs else None,
            lambda text: {"message": {"role": "assistant", "content": text}},
        )
        if not body.messages:
            return JSONResponse(form.loaded())
        answer = await answer_conversation(service, body.messages, form, wish)
        return await respond(request, answer, stream=body.stream is not False)

    @app.post("/api/generate", response_model=OllamaReply, responses=responses)
    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        """Answer a prompt or, with raw, continue it."""
        wish = await wish_of(body)
        form = OllamaForm(body.model, names if body.logprobs else None, lambda text: {"response": text})
        if body.raw and body.system:  # as Ollama does
            raise ApiError(
                400,
                "raw goes on with the prompt as it stands: leave system out, or write it into the prompt",
                param="system",
            )
        if not body.prompt:
            return JSONResponse(form.loaded())
        if body.raw:
            answer = await continue_text(service, body.prompt, form, wish)
        else:
            before = [Message("system", body.system)] if body.system else []
            answer = await answer_conversation(service, [*before, Message("user", body.prompt)], form, wish)
        return await respond(request, answer, stream=body.stream is not False)
