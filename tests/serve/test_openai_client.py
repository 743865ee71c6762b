"""OpenAI's own client works unmodified."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from mm_rec.inference import decode
from mm_rec.serve.service import Service

QUESTION = [{"role": "user", "content": "What is ışık?"}]
N_STREAMS = 32


@pytest.fixture
def openai_client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    assert openai_client.models.retrieve("tiny").owned_by == "mm-rec"


def test_completions(openai_client: openai.OpenAI) -> None:
    reply = openai_client.completions.create(
        model="tiny", prompt=["def", "import"], max_tokens=5, echo=True, logprobs=2, seed=1, stop=["\x00"],
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert [choice.text.startswith(prompt) for choice, prompt in zip(reply.choices, ("def", "import"), strict=True)]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[:2] == ["<|bos|>", "def"]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 10
    assert reply.system_fingerprint.startswith("mm_")


def test_chat(openai_client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "messages": QUESTION, "max_completion_tokens": 8, "seed": 5}
    reply = openai_client.chat.completions.create(**fields, logprobs=True, top_logprobs=3)
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.content) == reply.usage.completion_tokens == 8
    assert openai_client.chat.completions.create(**fields).choices[0].message.content == choice.message.content
    again = [*QUESTION, choice.message, *QUESTION]
    assert openai_client.chat.completions.create(**{**fields, "messages": again}).usage.prompt_tokens > 20


def test_streaming(openai_client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "messages": QUESTION, "max_tokens": 8, "seed": 5}
    whole = openai_client.chat.completions.create(**fields)
    chunks = list(openai_client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with openai_client.chat.completions.stream(**fields, stop=text[-1]) as events:
        assert events.get_final_completion().choices[0].message.content == text.partition(text[-1])[0]
    pieces = openai_client.completions.create(model="tiny", prompt="def", max_tokens=4, stream=True, seed=1)
    assert "".join(piece.choices[0].text for piece in pieces)


def test_sessions(openai_client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    first = openai_client.chat.completions.create(**fields, messages=QUESTION, extra_body={"session": "talk"})
    more = [{"role": "user", "content": "And çiğ?"}]
    second = openai_client.chat.completions.create(**fields, messages=more, extra_body={"session": "talk"})
    history = [*QUESTION, first.choices[0].message, *more]
    resent = openai_client.chat.completions.create(**fields, messages=history)
    assert second.choices[0].message.content == resent.choices[0].message.content
    assert second.usage.prompt_tokens < resent.usage.prompt_tokens


def test_errors(openai_client: openai.OpenAI, address: str, make_service: Callable[..., Service]) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'") as missing:
        openai_client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        openai_client.completions.create(model="tiny", prompt="a", temperature=5)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        openai_client.moderations.create(input="a")


def test_a_fault_within_a_stream(openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = openai_client.completions.create(model="tiny", prompt="a", max_tokens=2000, stream=True)
    next(iter(stream))
    monkeypatch.setattr(decode, "step", lambda *_, **__: 1 / 0)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(stream)


def test_a_key(
    make_service: Callable[..., Service], serve: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    with serve(make_service(), api_key="secret") as address:
        base = {"base_url": f"{address}/v1", "max_retries": 0}
        assert openai.OpenAI(**base, api_key="secret").models.list().data
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            openai.OpenAI(**base, api_key="guess").models.list()


def test_concurrent_streams(
    make_service: Callable[..., Service], serve: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    service = make_service(max_streams=N_STREAMS, max_queue=N_STREAMS)
    with serve(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

        def ask(number: int, stream: bool) -> str:
            message = [{"role": "user", "content": f"Say {number} " + "again " * (number % 7)}]
            fields = {"model": "tiny", "messages": message, "max_tokens": 10 + number % 5, "temperature": 0}
            if not stream:
                return client.chat.completions.create(**fields).choices[0].message.content
            chunks = client.chat.completions.create(**fields, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        alone = [ask(number, False) for number in range(N_STREAMS)]
        with ThreadPoolExecutor(N_STREAMS) as pool:
            together = list(pool.map(ask, range(N_STREAMS), [True] * N_STREAMS))
        assert together == alone
        assert service.engine.running == 0
