"""OpenAI's Responses, for text: what a request and a reply look like, and the route."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from mm_rec.inference.json_constraint import ANY_OBJECT
from mm_rec.serve.answer import respond
from mm_rec.serve.chat import Wish, answer_conversation
from mm_rec.serve.errors import STREAMED, ApiError
from mm_rec.serve.fields import INTEGRAL, Metadata, Only, ResponseMessages, Strict, Text
from mm_rec.serve.replies import EVENT_STREAM, Choice, Usage, json_line
from mm_rec.serve.schemas import NO_TOOLS, DrawingFields, JsonFormat
from mm_rec.serve.service import Service
from mm_rec.text.message import Message

__all__ = ["add_responses"]

NOT_STORED = "this server stores no responses; send the whole conversation as input"
NO_REASONING = "this model doesn't reason before it answers; leave it out"


class TextFormat(JsonFormat):
    """Format of the text."""

    type: Literal["text", "json_object", "json_schema"]

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema that the text is to follow; None for any text."""
        if self.type == "text":
            return None
        return (self.schema_ if self.type == "json_schema" else None) or ANY_OBJECT


class TextConfig(Strict):
    """What the text is to be like."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Only("medium", advice="limit the length with max_output_tokens")] = None


class Reasoning(Strict):
    """What a model does before it answers; this one does nothing."""

    effort: Annotated[Any, Only("none", advice=NO_REASONING)] = None
    summary: Annotated[Any, Only(advice=NO_REASONING)] = None
    generate_summary: Annotated[Any, Only(advice=NO_REASONING)] = None


class ResponseStreamOptions(Strict):
    """Options of a stream."""

    include_obfuscation: bool | None = Field(None, description="taken, not used")


class ResponseRequest(DrawingFields):
    """Body of POST /v1/responses."""

    input: Text | ResponseMessages = Field(description="what the user says, or the conversation")
    instructions: Text | None = Field(None, description="what a system message would say, before the input")
    max_output_tokens: Annotated[int, Field(ge=1), INTEGRAL] | None = Field(
        None, description="tokens to draw at most; the server has a limit of its own"
    )
    text: TextConfig | None = None
    metadata: Metadata | None = Field(None, description="given back")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="taken, not used: no input is too long")
    parallel_tool_calls: bool | None = Field(None, description="taken, not used: there are no tools")
    max_tool_calls: Annotated[int, Field(ge=0), INTEGRAL] | None = Field(None, description="taken, not used")
    stream_options: ResponseStreamOptions | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[Any, Only([], advice=NO_TOOLS)] = None
    tool_choice: Annotated[Any, Only("none", "auto", advice=NO_TOOLS)] = None
    previous_response_id: Annotated[Any, Only(advice=NOT_STORED)] = None
    conversation: Annotated[Any, Only(advice=NOT_STORED)] = None
    prompt: Annotated[Any, Only(advice="this server stores no prompts; send its text as instructions")] = None
    background: Annotated[Any, Only(False, advice="this server answers at once; leave it out")] = None
    include: Annotated[Any, Only([], advice="there is nothing to include; leave it out")] = None
    top_logprobs: Annotated[Any, Only(0, advice="ask /v1/chat/completions for log-probabilities")] = None


class OutputText(BaseModel):
    """A text of the model."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """A message of the model."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ResponseReply(BaseModel):
    """Reply to POST /v1/responses; some further fields repeat the request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    output: list[OutputMessage]
    usage: dict[str, Any] | None


class ResponseForm:
    """Shapes a response, whole or as a stream of events.

    Args:
        request: what is replied to.
        header: fields that say which reply it is, and which model made it.
    """

    media_type = EVENT_STREAM

    def __init__(self, request: ResponseRequest, header: dict[str, Any]) -> None:
        self._request = request
        self._header = header
        self._id = str(header["id"]).replace("resp-", "resp_")
        self._item = self._id.replace("resp_", "msg_")
        self._number = 0
        self._text = ""
        self._finish: str | None = None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Returns the reply in one piece."""
        return self._response(_status(choices[0].finish), choices[0].text, usage)

    def opening(self, n_choices: int) -> Iterator[bytes]:
        """Yields the events before the first piece."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._part("added", "")

    def piece(self, index: int, piece: Choice) -> Iterator[bytes]:
        """Yields the next piece of the text."""
        self._text += piece.text
        self._finish = piece.finish or self._finish
        if piece.text:
            yield self._event("response.output_text.delta", **self._place(), delta=piece.text, logprobs=[])

    def closing(self, usage: Usage) -> Iterator[bytes]:
        """Yields the events after the last piece."""
        status = _status(self._finish)
        yield self._event("response.output_text.done", **self._place(), text=self._text, logprobs=[])
        yield self._part("done", self._text)
        item = self._message(status, [_output_text(self._text)])
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{status}", response=self._response(status, self._text, usage))

    def failure(self, error: ApiError) -> bytes:
        """Returns the event of a response that failed."""
        return self._event("response.failed", response={**self._response("failed"), "error": _error(error)})

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json_line(content)}\n\n".encode()

    def _part(self, kind: str, text: str) -> bytes:
        return self._event(f"response.content_part.{kind}", **self._place(), part=_output_text(text))

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, text: str | None = None, usage: Usage | None = None) -> dict[str, Any]:
        request = self._request
        text_format = request.text and request.text.format
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._header["created"],
            "model": self._header["model"],
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [] if text is None else [self._message(status, [_output_text(text)])],
            "usage": usage and _tokens(usage),
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "text": {
                "format": text_format.model_dump(by_alias=True, exclude_none=True) if text_format else {"type": "text"}
            },
            "tool_choice": request.tool_choice or "none",
            "tools": [],
            "truncation": request.truncation or "disabled",
        }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(finish: str | None) -> str:
    return "incomplete" if finish == "length" else "completed"


def _error(error: ApiError) -> dict[str, str]:
    return {"code": "server_error", "message": str(error)}


def _tokens(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.read,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.drawn,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.read + usage.drawn,
    }


def add_responses(app: FastAPI, service: Service) -> None:
    """Adds the route of responses."""

    @app.post("/v1/responses", response_model=ResponseReply, responses=STREAMED)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer a text or a conversation."""
        service.check_model(body.model)
        text_format = None if body.text is None else body.text.format
        wish = Wish(
            service.sampling(body.sampling_options(), body.max_output_tokens or service.max_tokens),
            constraint=await service.constraint(
                None if text_format is None else text_format.schema_to_follow, "text.format"
            ),
        )
        before = [Message("system", body.instructions)] if body.instructions else []
        said = [Message("user", body.input)] if isinstance(body.input, str) else body.input
        form = ResponseForm(body, service.header("resp"))
        answer = await answer_conversation(service, [*before, *said], form, wish)
        return await respond(request, answer, stream=bool(body.stream))
