"""Ollama's own Python client works unmodified, as its README shows it, and so do plain requests."""

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import ollama
import openai
import pydantic
import pytest
from fastapi.testclient import TestClient

import mm_rec
from mm_rec.inference.sampling import Sampling
from mm_rec.serve.service import Service
from mm_rec.text.conversation import encode_conversation

WHY = {"role": "user", "content": "Why is the sky blue?"}
SHORT = {"num_predict": 8, "seed": 5}


class Country(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=10)
    capital: bool


@pytest.fixture
def ollama_client(address: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=address) as client:
        yield client


@pytest.fixture
def openai_text(address: str) -> Iterator[Callable[..., str]]:
    """What OpenAI's protocol gives for the same."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield lambda prompt, **fields: client.completions.create(model="tiny", prompt=prompt, **fields).choices[0].text


def test_list(ollama_client: ollama.Client, service: Service) -> None:
    [model] = ollama_client.list().models
    assert model.model == "tiny"
    assert model.digest == service.fingerprint
    assert model.size == sum(one.nbytes for one in service.engine.model.parameters())
    assert model.modified_at is not None
    assert model.details.family == "mm-rec"


def test_what_clients_ask_about_the_model(ollama_client: ollama.Client, service: Service, address: str) -> None:
    [model] = ollama_client.ps().models
    assert (model.model, model.digest, model.size_vram) == ("tiny", service.fingerprint, 0)
    assert model.size == ollama_client.list().models[0].size
    for name in ("tiny", "tiny:latest"):
        shown = ollama_client.show(name)
        assert shown.capabilities == ["completion"]
        assert shown.details == model.details
        parameters = service.engine.model.parameters()
        assert shown.modelinfo["general.parameter_count"] == sum(one.numel() for one in parameters)
        assert (
            shown.modelinfo[f"{shown.modelinfo['general.architecture']}.embedding_length"]
            == service.engine.model.config.d_model
        )
    with pytest.raises(ollama.ResponseError, match="there is no model 'other'") as error:
        ollama_client.show("other")
    assert error.value.status_code == 404
    with urllib.request.urlopen(f"{address}/api/version") as reply:
        assert json.load(reply) == {"version": mm_rec.__version__}


def test_embeddings_are_refused_in_words(ollama_client: ollama.Client, address: str) -> None:
    for ask in (lambda: ollama_client.embed("tiny", "a"), lambda: ollama_client.embeddings("tiny", "a")):
        with pytest.raises(ollama.ResponseError, match="makes no embeddings") as error:
            ask()
        assert error.value.status_code == 400
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="makes no embeddings") as refused:
            client.embeddings.create(model="tiny", input="a")
        assert refused.value.code == "unsupported_operation"


def test_chat_with_its_defaults(ollama_client: ollama.Client, service: Service) -> None:
    response = ollama_client.chat(model="tiny", messages=[WHY])
    assert response["message"]["role"] == "assistant"
    assert response.message.content == response["message"]["content"]
    assert response.done
    ids = encode_conversation(service.tokenizer, [WHY])[0]
    assert response.prompt_eval_count == len(ids) + 1
    assert 0 < response.eval_count <= service.max_tokens
    assert 0 < response.eval_duration < response.total_duration


def test_a_conversation_goes_on_with_the_message_that_came(ollama_client: ollama.Client) -> None:
    messages: list[Any] = [WHY]
    for turn in range(3):
        response = ollama_client.chat("tiny", messages=messages, options=SHORT)
        messages += [response.message, {"role": "user", "content": f"And number {turn}?"}]
    assert response.prompt_eval_count > 50
    again = [one if isinstance(one, dict) else one.model_dump() for one in messages[:-2]]
    assert ollama_client.chat("tiny", messages=again, options=SHORT).message == response.message


def test_streaming_gives_the_same_text(ollama_client: ollama.Client) -> None:
    whole = ollama_client.chat(model="tiny", messages=[WHY], options=SHORT)
    parts = list(ollama_client.chat(model="tiny", messages=[WHY], options=SHORT, stream=True))
    assert "".join(part["message"]["content"] for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].done_reason == whole.done_reason == "length"
    assert parts[-1].eval_count == whole.eval_count == 8


def test_the_asynchronous_client(address: str, ollama_client: ollama.Client) -> None:
    async def chat() -> str:
        client = ollama.AsyncClient(host=address)
        parts = await client.chat(model="tiny", messages=[WHY], options=SHORT, stream=True)
        return "".join([part["message"]["content"] async for part in parts])

    assert asyncio.run(chat()) == ollama_client.chat("tiny", messages=[WHY], options=SHORT).message.content


def test_generate_is_an_answer_and_raw_a_text(ollama_client: ollama.Client, openai_text: Callable[..., str]) -> None:
    response = ollama_client.generate(model="tiny", prompt="Why?", system="Be brief.", options=SHORT)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert response.response == ollama_client.chat("tiny", messages=talk, options=SHORT).message.content
    options = {**SHORT, "temperature": 0, "repeat_penalty": 1.0, "num_ctx": 4096}
    raw = ollama_client.generate(model="tiny", prompt="def", raw=True, options=options)
    assert raw["response"] == openai_text("def", max_tokens=8, temperature=0)
    parts = list(ollama_client.generate(model="tiny", prompt="def", raw=True, options=options, stream=True))
    assert "".join(part["response"] for part in parts) == raw.response


@pytest.mark.parametrize("prompt", ["def", ""])
def test_raw_takes_no_system_message(ollama_client: ollama.Client, prompt: str) -> None:
    with pytest.raises(ollama.ResponseError, match="leave system out, or write it into the prompt") as error:
        ollama_client.generate(model="tiny", prompt=prompt, system="Be brief.", raw=True)
    assert error.value.status_code == 400
    assert ollama_client.generate(model="tiny", prompt=prompt, system="", raw=True, options=SHORT).done


def test_structured_outputs(ollama_client: ollama.Client) -> None:
    fields = {"model": "tiny", "messages": [WHY], "options": {"temperature": 2, "seed": 3}}
    response = ollama_client.chat(**fields, format=Country.model_json_schema())
    assert response.done_reason == "stop"
    Country.model_validate_json(response.message.content)
    anything = ollama_client.generate(model="tiny", prompt="Why?", format="json", options={"seed": 2})
    assert anything.done_reason == "length" or isinstance(json.loads(anything.response), dict)


def test_logprobs(ollama_client: ollama.Client) -> None:
    fields = {"model": "tiny", "messages": [WHY], "options": {**SHORT, "temperature": 0}}
    response = ollama_client.chat(**fields, logprobs=True, top_logprobs=2)
    assert len(response.logprobs) == 8
    assert all(one.logprob <= one.top_logprobs[0].logprob for one in response.logprobs)
    assert all(len(one.top_logprobs) == 2 for one in response.logprobs)
    parts = list(ollama_client.chat(**fields, logprobs=True, top_logprobs=2, stream=True))
    assert [one for part in parts for one in part.logprobs or []] == response.logprobs


def test_asking_for_nothing_loads_the_model(ollama_client: ollama.Client) -> None:
    assert ollama_client.chat("tiny").done_reason == "load"
    assert ollama_client.generate("tiny:latest", keep_alive="5m").done_reason == "load"


@pytest.mark.parametrize(
    ("fields", "status", "problem"),
    [
        ({"model": "llama3.2"}, 404, "there is no model 'llama3.2'; this server has 'tiny'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "calls no tools; ask for JSON with format"),
        ({"think": True}, 400, "think: this model doesn't think"),
        ({"messages": [{**WHY, "images": ["iVBORw0KGgo="]}]}, 400, "messages.0.images: a message has images"),
        ({"format": {"type": "array", "uniqueItems": True}}, 400, "uniqueItems"),
        ({"options": {"temperature": -1}}, 400, "options.temperature: it must be at least 0"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat: tokens aren't drawn in this way here"),
        ({"options": {"seedling": 2}}, 400, "options.seedling: it is not a parameter"),
        ({"messages": [{"role": "tool", "content": "3"}]}, 400, "use one of system"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_lines(
    ollama_client: ollama.Client, fields: dict[str, Any], status: int, problem: str, stream: bool
) -> None:
    with pytest.raises(ollama.ResponseError) as error:
        list(ollama_client.chat(**{"model": "tiny", "messages": [WHY], "stream": stream, **fields}))
    assert (error.value.status_code, problem in error.value.error) == (status, True), error.value.error


def test_a_fault_within_a_stream(ollama_client: ollama.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm_rec.inference import decode

    stream = ollama_client.generate("tiny", "a", stream=True, options={"num_predict": 2000, "stop": ["\0"]})
    next(iter(stream))
    monkeypatch.setattr(decode, "step", lambda *_, **__: 1 / 0)
    with pytest.raises(ollama.ResponseError, match="the engine failed"):
        list(stream)


def test_streams_are_the_default_of_plain_requests(client: TestClient) -> None:
    reply = client.post("/api/generate", json={"model": "tiny", "prompt": "Why?", "options": SHORT})
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    parts = [json.loads(line) for line in reply.text.splitlines()]
    assert parts[-1]["done"]
    assert all(part["created_at"].endswith("Z") for part in parts)
    assert "message" not in parts[0]


def test_a_penalty_is_that_of_the_engine(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sampling] = []
    whole = Service.sampling
    monkeypatch.setattr(Service, "sampling", lambda *rest: seen.append(whole(*rest)) or seen[-1])
    for options in ({}, {"repeat_penalty": 1.5}, {"repeat_penalty": 1.5, "repeat_last_n": 0}, {"num_predict": -1}):
        client.post("/api/chat", json={"model": "tiny", "messages": [], "options": options}).raise_for_status()
    assert [one.repetition_penalty for one in seen] == [1.0, 1.5, 1.0, 1.0]
    assert {(one.temperature, one.top_k, one.top_p) for one in seen} == {(0.8, 40, 0.9)}
    assert seen[-1].max_new_tokens == 2048
