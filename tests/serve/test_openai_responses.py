"""OpenAI's own client and its Responses: whole, as events, as conversations, in a shape."""

import json
import typing
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import ResponseOutputMessage

from mm_rec.inference import decode
from mm_rec.serve.service import Service
from mm_rec.text.conversation import encode_conversation


class Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: typing.Literal["ışık", "漢字"]
    sure: bool


@pytest.fixture
def openai_client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response(openai_client: openai.OpenAI, service: Service) -> None:
    fields = {"model": "tiny", "instructions": "Be brief.", "max_output_tokens": 8, "extra_body": {"seed": 4}}
    response = openai_client.responses.create(**fields, input="Why?")
    [item] = response.output
    assert isinstance(item, ResponseOutputMessage)
    assert response.output_text == item.content[0].text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    talk = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert response.usage.input_tokens == len(encode_conversation(service.tokenizer, talk)[0]) + 1
    assert response.usage.output_tokens == 8
    chat = openai_client.chat.completions.create(model="tiny", messages=talk, seed=4, max_tokens=8)
    assert response.output_text == chat.choices[0].message.content
    assert openai_client.responses.create(**fields, input=[talk[1]]).output_text == response.output_text


def test_a_conversation_of_responses(openai_client: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "user", "content": "tell me a joke"}]
    read = []
    for _ in range(3):
        response = openai_client.responses.create(model="tiny", input=said, max_output_tokens=6, store=False)
        read.append(response.usage.input_tokens)
        said += response.output
        said += [{"role": "user", "content": [{"type": "input_text", "text": "tell me another"}]}]
    assert read[0] < read[1] < read[2]
    plain = [one if isinstance(one, dict) else one.model_dump() for one in said]
    openai_client.responses.create(model="tiny", input=plain, max_output_tokens=1)


def test_events_of_a_response(openai_client: openai.OpenAI) -> None:
    shape = {"format": {"type": "json_schema", "name": "answer", "schema": Answer.model_json_schema()}}
    fields = {"model": "tiny", "input": "Why?", "text": shape, "extra_body": {"seed": 4}}
    whole = openai_client.responses.create(**fields)
    events = list(openai_client.responses.create(**fields, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage
    with openai_client.responses.stream(**fields) as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_a_response_in_a_shape(openai_client: openai.OpenAI) -> None:
    response = openai_client.responses.parse(model="tiny", input="Why?", text_format=Answer)
    assert isinstance(response.output_parsed, Answer)
    response = openai_client.responses.create(
        model="tiny", input="JSON!", text={"format": {"type": "json_object"}}, extra_body={"seed": 1}, temperature=2
    )
    assert isinstance(json.loads(response.output_text), dict)


def test_a_response_that_fails(openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = openai_client.responses.create(model="tiny", input="a", max_output_tokens=2000, stream=True)
    next(iter(stream))
    monkeypatch.setattr(decode, "step", lambda *_, **__: 1 / 0)
    last = list(stream)[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert "the engine failed" in last.response.error.message
