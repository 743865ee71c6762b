"""What a request and a reply look like: OpenAI's fields, a few of our own, nothing that is silently ignored.

A field that would change the text but isn't supported is an error unless it holds its neutral value. Fields that
cannot change it (``user``, ``metadata``) are taken and not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

__all__ = [
    "ChatMessage",
    "ChatReply",
    "ChatRequest",
    "CompletionReply",
    "CompletionRequest",
    "Health",
    "ModelCard",
    "ModelList",
    "Removed",
    "SamplingFields",
    "SessionInfo",
    "SessionName",
    "TextPart",
]

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_MESSAGES = 1024
MAX_FIELDS = 64


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "the text has half of a surrogate pair, which is no character") from None
    return text


def _as_integers(value: Any) -> Any:
    """Numbers of JSON have no kinds: 2.0 is an integer."""
    if isinstance(value, list):
        return [_as_integers(one) if isinstance(one, float) else one for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


INTEGRAL = BeforeValidator(_as_integers)
Text = Annotated[str, AfterValidator(_check_unicode)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True), INTEGRAL]
StopString = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_unicode)]
SessionName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class Strict(BaseModel):
    """Takes JSON values for what they are: "1" is no number, and unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, values: Any) -> Any:
        # Every unknown field would become an error of its own, each far larger than the field.
        if isinstance(values, dict) and len(values) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", "there are too many fields")
        return values


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="end the stream with a chunk that has the usage")
    include_obfuscation: bool | None = Field(None, description="taken, not used")


class SamplingFields(Strict):
    """What both kinds of requests share."""

    model: str = Field(description="the name that /v1/models gives")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 takes the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="keep the likeliest tokens with this mass"
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
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = Field(
        None, description="the text ends before any of these"
    )
    seed: Annotated[int, INTEGRAL] | None = Field(None, description="the same gives the same text, up to rounding")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = Field(
        None, description="texts to draw of one prompt"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="taken, not used")
    presence_penalty: Zero | None = Field(None, description="not supported: 0")
    frequency_penalty: Zero | None = Field(None, description="not supported: 0; see repetition_penalty")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="not supported")


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
    best_of: Annotated[int, Field(ge=1, le=1), INTEGRAL] | None = Field(None, description="not supported: 1")
    suffix: None = Field(None, description="not supported: null")


class TextPart(Strict):
    """A part of a message; there are only texts."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer means system")
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    name: str | None = Field(None, description="taken, not shown to the model")
    refusal: None = None


class ResponseFormat(Strict):
    """Format of the reply."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="the conversation, or, with a session, what is new in it"
    )
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
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description="taken, not used")
    response_format: ResponseFormat | None = None
    tools: Nothing | None = Field(None, description="not supported: empty")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="taken, not used: there are no tools")


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
    is a little more.
    """

    status: Literal["ok"] = "ok"
    model: str
    running: int
    waiting: int
    slots: int
    memory_bytes: int
