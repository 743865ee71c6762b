"""What a request and a reply look like in OpenAI's protocol, with a few fields of our own and nothing silently ignored.

A field that would change the text but isn't supported is an error unless it holds its neutral value. Fields that
cannot change it (``user``, ``metadata``) are taken and not used. A field that is null counts as one that isn't there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from mm_rec.inference.json_constraint import ANY_OBJECT
from mm_rec.serve.fields import (
    INTEGRAL,
    MAX_CHOICES,
    Messages,
    Metadata,
    Only,
    SessionName,
    StopStrings,
    Strict,
    Text,
    TokenIds,
)
from mm_rec.text.message import without_nulls

__all__ = [
    "NO_TOOLS",
    "AssistantMessage",
    "ChatReply",
    "ChatRequest",
    "CompletionReply",
    "CompletionRequest",
    "DrawingFields",
    "Health",
    "JsonFormat",
    "ModelCard",
    "ModelList",
    "Removed",
    "ResponseFormat",
    "SamplingFields",
    "SessionInfo",
]

MAX_PROMPTS = 128
DRAWING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed")
NO_TOOLS = "this model calls no tools; leave them out, or ask for JSON with response_format and call them yourself"
PENALTY = "use repetition_penalty, which divides by how likely what was said is"


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="end the stream with a chunk that has the usage")
    include_obfuscation: bool | None = Field(None, description="taken, not used")


class DrawingFields(Strict):
    """What all kinds of requests share: the model, and how tokens are drawn."""

    model: str = Field(description="the name that /v1/models gives")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 takes the likeliest token")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="keep the likeliest tokens with this mass, at least one"
    )
    top_k: Annotated[int, Field(ge=0), INTEGRAL] | None = Field(
        None, description="keep the k likeliest; 0 keeps all (ours)"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="keep tokens at least this share as likely as the likeliest (ours)"
    )
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = Field(
        None, description="above 1 avoids what was said (ours)"
    )
    stop: StopStrings | None = Field(None, description="the text ends before any of these")
    seed: Annotated[int, INTEGRAL] | None = Field(None, description="the same gives the same text, up to rounding")
    stream: bool | None = None
    user: str | None = Field(None, description="taken, not used")
    store: bool | None = Field(None, description="taken, not used: nothing is stored")
    service_tier: str | None = Field(None, description="taken, not used")
    safety_identifier: str | None = Field(None, description="taken, not used")
    prompt_cache_key: str | None = Field(None, description="taken, not used")
    prompt_cache_retention: str | None = Field(None, description="taken, not used")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="taken, not used")

    def sampling_options(self) -> dict[str, Any]:
        """Returns what the request says about drawing."""
        return without_nulls({name: getattr(self, name) for name in DRAWING})


class SamplingFields(DrawingFields):
    """What completions and chat requests share."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = Field(
        None, description="texts to draw of one prompt"
    )
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Any, Only(0, advice=PENALTY)] = None
    frequency_penalty: Annotated[Any, Only(0, advice=PENALTY)] = None
    logit_bias: Annotated[Any, Only({}, advice="tokens can't be made likelier one by one; leave it out")] = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description="text, which starts a document, or token ids, which are read as they are; one or many")
    max_tokens: Annotated[int, Field(ge=0), INTEGRAL] | None = Field(
        None, description="tokens to draw at most, 16 if null; the server has a limit of its own"
    )
    logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = Field(
        None, description="give log-probabilities, and those of so many likeliest tokens"
    )
    echo: bool | None = Field(None, description="give the prompt back before the text")
    best_of: Annotated[Any, Only(1, advice="ask for several texts with n and choose among them yourself")] = None
    suffix: Annotated[Any, Only("", advice="this model writes on from a text, not towards one; leave it out")] = None


class JsonFormat(Strict):
    """A JSON schema that a text is to follow."""

    name: str | None = Field(None, description="taken, not used")
    description: str | None = Field(None, description="taken, not used")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="of any object if null")
    strict: bool | None = Field(None, description="taken, not used: the schema is always followed")


class ResponseFormat(Strict):
    """Format of the reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonFormat | None = Field(None, description="for the type json_schema")

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema that the text is to follow; None for any text."""
        if self.type == "text":
            return None
        return (self.json_schema and self.json_schema.schema_) or ANY_OBJECT


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Messages = Field(description="the conversation, or, with a session, what is new in it")
    session: SessionName | None = Field(
        None, description="continue the conversation of this name from its saved memory; begins one if there is none"
    )
    max_tokens: Annotated[int, Field(ge=1), INTEGRAL] | None = Field(
        None, description="tokens to draw at most; the server has a limit of its own"
    )
    max_completion_tokens: Annotated[int, Field(ge=1), INTEGRAL] | None = Field(
        None, description="newer name of max_tokens"
    )
    logprobs: bool | None = Field(None, description="give log-probabilities")
    top_logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = Field(
        None, description="and those of so many likeliest tokens; needs logprobs"
    )
    metadata: Metadata | None = Field(None, description="taken, not used")
    response_format: ResponseFormat | None = None
    tools: Annotated[Any, Only([], advice=NO_TOOLS)] = None
    tool_choice: Annotated[Any, Only("none", "auto", advice=NO_TOOLS)] = None
    functions: Annotated[Any, Only([], advice=NO_TOOLS)] = None
    function_call: Annotated[Any, Only("none", "auto", advice=NO_TOOLS)] = None
    parallel_tool_calls: bool | None = Field(None, description="taken, not used: there are no tools")
    modalities: Annotated[Any, Only(["text"], advice="this model writes text only; leave it out")] = None
    audio: Annotated[Any, Only(advice="this model writes text only; leave it out")] = None
    prediction: Annotated[Any, Only(advice="this server doesn't use predictions; leave it out")] = None
    reasoning_effort: Annotated[Any, Only("none", advice="this model doesn't reason before it answers; use none")] = (
        None
    )
    verbosity: Annotated[Any, Only("medium", advice="limit the length with max_tokens, or ask for it in words")] = None
    web_search_options: Annotated[
        Any, Only(advice="this model can't search; put what it should read into a message")
    ] = None
    moderation: Annotated[Any, Only(advice="this server moderates nothing; leave it out")] = None


class Usage(BaseModel):
    """Tokens that were read and drawn; with a session only what was new is read."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the older shape; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Reply(BaseModel):
    """What all replies have."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None


class CompletionReply(Reply):
    """Reply to a completion; a stream has many of the same shape."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TokenLogprob(BaseModel):
    """A token and how likely it was; ``bytes`` are those of its UTF-8 text, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token that was drawn, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the newer shape."""

    content: list[ChosenLogprob]


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatReply(Reply):
    """Reply to a chat request that is not a stream."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mm-rec"] = "mm-rec"


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class SessionInfo(BaseModel):
    """A conversation in memory: how long it was and what it takes, which doesn't depend on how long it was."""

    id: str
    object: Literal["session"] = "session"
    turns: int
    tokens: int
    bytes: int


class Removed(BaseModel):
    """A session that is no more."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True


class Health(BaseModel):
    """How busy the server is.

    ``memory_bytes`` is what the model remembers of one stream, whatever its length; ``file_bytes`` in sessions
    is a little more. ``learned_to_chat`` is null if it is not known.
    """

    status: Literal["ok"] = "ok"
    model: str
    running: int
    waiting: int
    slots: int
    memory_bytes: int
    learned_to_chat: bool | None = None
