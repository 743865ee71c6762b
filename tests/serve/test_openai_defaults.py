"""OpenAI's own client and its defaults: messages given back, null and neutral fields, refusals, JSON."""

import json
import typing
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest
from fastapi.testclient import TestClient
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from mm_rec.inference import json_constraint
from mm_rec.serve.service import Service

HI = {"role": "user", "content": "Hi"}
SHORT = {"model": "tiny", "max_tokens": 6, "seed": 5}


class Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: typing.Literal["ışık", "漢字"]
    sure: bool


SCHEMA = Answer.model_json_schema()


@pytest.fixture
def openai_client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


# --- conversations that go on -----------------------------------------------------------------------------------------


FILLED = dict.fromkeys(
    ("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "reasoning_content", "some_new_field")
)
GIVE_BACK: list[Callable[[Any], Any]] = [
    lambda message: message,
    lambda message: message.model_dump(),
    lambda message: message.to_dict(),
    lambda message: {**FILLED, "role": message.role, "content": message.content},
]


def test_a_message_is_the_next_turn_however_it_is_given_back(openai_client: openai.OpenAI) -> None:
    texts = set()
    for give in GIVE_BACK:
        messages: list[Any] = [HI]
        for _ in range(3):
            reply = openai_client.chat.completions.create(**SHORT, messages=messages)
            messages += [give(reply.choices[0].message), {"role": "user", "content": "And now?"}]
        texts.add(reply.choices[0].message.content)
    assert len(texts) == 1


# --- null and neutral fields ------------------------------------------------------------------------------------------


def parameters(shape: Any) -> list[str]:
    return [name for name in typing.get_type_hints(shape) if name not in ("model", "messages", "prompt", "input")]


@pytest.mark.parametrize(
    ("path", "shape", "body"),
    [
        ("completions", completion_create_params.CompletionCreateParamsNonStreaming, {"prompt": "a"}),
        ("chat/completions", chat_create_params.CompletionCreateParamsNonStreaming, {"messages": [HI]}),
        ("responses", response_create_params.ResponseCreateParamsNonStreaming, {"input": "Hi"}),
    ],
)
def test_every_parameter_may_be_null(client: TestClient, path: str, shape: Any, body: dict[str, Any]) -> None:
    names = parameters(shape)
    assert len(names) > 14
    reply = client.post(f"/v1/{path}", json={"model": "tiny", **dict.fromkeys(names), "a_new_one": None, **body})
    assert reply.status_code == 200, reply.text


NEUTRAL = {
    "completions": {
        "prompt": "a", "suffix": "", "best_of": 1, "logprobs": None, "echo": False, "logit_bias": {}, "stop": [],
        "presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "stream": False, "user": "u1",
    },
    "chat/completions": {
        "messages": [{**HI, "tool_calls": [], "annotations": [], "refusal": ""}], "tools": [], "tool_choice": "none",
        "functions": [], "function_call": "auto", "top_logprobs": 0, "logprobs": False, "store": False,
        "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium", "service_tier": "auto",
        "safety_identifier": "u1", "prompt_cache_key": "k1", "prompt_cache_retention": "24h", "metadata": {},
        "response_format": {"type": "text", "json_schema": None}, "parallel_tool_calls": True, "logit_bias": {},
        "presence_penalty": 0, "frequency_penalty": 0, "stream_options": None,
    },
    "responses": {
        "input": [{**HI, "type": "message"}], "tools": [], "tool_choice": "auto", "reasoning": {"effort": None},
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "auto", "background": False,
        "include": [], "top_logprobs": 0, "stream_options": {"include_obfuscation": False}, "store": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("path", NEUTRAL)
def test_neutral_values_change_nothing(client: TestClient, path: str) -> None:
    def said(body: dict[str, Any]) -> Any:
        length = {"max_output_tokens" if path == "responses" else "max_tokens": 12}
        reply = client.post(f"/v1/{path}", json={"model": "tiny", "seed": 1, **length, **body})
        assert reply.status_code == 200, reply.text
        content = reply.json()
        return content["output"][0]["content"] if path == "responses" else content["choices"]

    plain = {name: value for name, value in NEUTRAL[path].items() if name in ("prompt", "messages", "input")}
    assert said(NEUTRAL[path]) == said(plain)
    assert said({**plain, "top_p": 0, "seed": 2}) == said({**plain, "temperature": 0})


@pytest.mark.parametrize(
    ("path", "fields", "param", "advice"),
    [
        ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "calls no tools"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice", "ask for JSON with response_format"),
        ("chat/completions", {"functions": [{"name": "f"}]}, "functions", "calls no tools"),
        ("chat/completions", {"response_format": {"type": "grammar"}}, "response_format.type", "'json_object' or"),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities", "writes text only"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort", "use none"),
        ("chat/completions", {"web_search_options": {}}, "web_search_options", "put what it should read into"),
        ("chat/completions", {"logit_bias": {"5": 1}}, "logit_bias", "leave it out"),
        ("completions", {"suffix": "end"}, "suffix", "leave it out"),
        ("completions", {"presence_penalty": 0.5}, "presence_penalty", "use repetition_penalty"),
        ("completions", {"presence_penalty": False}, "presence_penalty", "use repetition_penalty"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ("responses", {"tools": [{"type": "web_search"}]}, "tools", "calls no tools"),
        ("responses", {"reasoning": {"effort": "low"}}, "reasoning.effort", "leave it out"),
        ("responses", {"background": True}, "background", "leave it out"),
    ],
)  # fmt: skip
def test_what_is_not_supported_says_what_to_do(
    client: TestClient, path: str, fields: dict[str, Any], param: str, advice: str
) -> None:
    body = {"completions": {"prompt": "a"}, "chat/completions": {"messages": [HI]}, "responses": {"input": "Hi"}}[path]
    reply = client.post(f"/v1/{path}", json={"model": "tiny", **body, **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert advice in error["message"]
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("completions", {"prompt": 5}, "prompt: it must be a text, a list of texts, or token ids"),
        ("completions", {"prompt": []}, "prompt: it must not be empty"),
        ("completions", {"prompt": "a", "stop": 5}, "stop: it must be a string or a list of strings"),
        ("completions", {"prompt": "a", "n": True}, "n: it must be a whole number"),
        ("completions", {"prompt": "a", "temperature": 3}, "temperature: it must be at most 2"),
        ("completions", {}, "prompt: it is missing"),
        ("completions", {"prompt": "a", "foo": 1}, "foo: it is not a parameter of this server; leave it out"),
        ("chat/completions", {"messages": ["hi"]}, "messages.0: a message is not an object with role and content"),
        ("chat/completions", {"messages": [HI], "session": "A b"}, "session: it must be 1 to 64 of a-z, 0-9, - and _"),
        ("responses", {"input": 5}, "input: it must be a text or a list of messages"),
        ("responses", {"input": [{"type": "reasoning", "id": "r"}]}, "input.0.type: of the items of a conversation"),
        ("../api/chat", {"format": 5}, "format: it must be json or a JSON schema"),
        ("../api/chat", {"keep_alive": []}, "keep_alive: it must be a number or a string"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_way(client: TestClient, path: str, fields: dict[str, Any], message: str) -> None:
    error = client.post(f"/v1/{path}", json={"model": "tiny", **fields}).json()["error"]
    assert (error["message"] if isinstance(error, dict) else error).startswith(message)


def test_an_image_is_refused_in_words(openai_client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    content = [{"type": "text", "text": "What's in this image?"}, image]
    with pytest.raises(openai.BadRequestError, match="reads text only; say it in words") as error:
        openai_client.chat.completions.create(**SHORT, messages=[{"role": "user", "content": content}])
    assert error.value.param == "messages.0.content.1.type"


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_mode(openai_client: openai.OpenAI) -> None:
    reply = openai_client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Answer in JSON."}, HI],
        response_format={"type": "json_object"}, max_tokens=1500, temperature=2, seed=1,
    )  # fmt: skip
    assert reply.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)


def test_structured_outputs(openai_client: openai.OpenAI) -> None:
    completion = openai_client.chat.completions.parse(model="tiny", messages=[HI], response_format=Answer, n=3)
    assert all(choice.message.parsed.kind in ("ışık", "漢字") for choice in completion.choices)
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    chunks = openai_client.chat.completions.create(model="tiny", messages=[HI], response_format=form, stream=True)
    Answer.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_json_in_a_session(openai_client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    for _ in range(2):
        reply = openai_client.chat.completions.create(
            model="tiny", messages=[HI], response_format=form, extra_body={"session": "talk"}
        )
        Answer.model_validate_json(reply.choices[0].message.content or "")


def test_a_schema_that_cannot_be_followed(openai_client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "set", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=r"can't be followed .*uniqueItems") as error:
        openai_client.chat.completions.create(model="tiny", messages=[HI], response_format=form)
    assert error.value.code == "json_schema_not_supported"


def test_a_schema_that_grows_too_complex(
    service: Service,
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    monkeypatch.setattr(json_constraint, "MAX_LEXER_STATES", 200)
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "^([ab]*a[ab]{18}){6}$"}}}
    body = {"model": "tiny", "messages": [HI], "response_format": form, "n": 2, "max_tokens": 2000, "temperature": 2}
    reply = client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "json_schema_too_complex")
    wait_until(lambda: service.engine.running == 0)
    client.post("/v1/chat/completions", json={**SHORT, "messages": [HI]}).raise_for_status()
