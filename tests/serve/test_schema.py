"""The server keeps to its own OpenAPI description, whatever is sent: generated requests, valid and not."""

import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode

from mm_rec.serve.app import create_app
from mm_rec.serve.service import Service
from mm_rec.text.tokenizer import MIN_VOCAB_SIZE

N_CASES = int(os.environ.get("MM_REC_SCHEMA_CASES", "15"))
"""Valid requests to each operation, and as many that are not; all checks of schemathesis run on each of them."""

VALIDATORS_WORDS = re.compile(
    r"Input should|Field required|Extra inputs|should have at|should match|this server does not take"
)
"""Those of pydantic, and what is said of a fault of it that has no words of ours yet."""

HOST = {"Host": "localhost"}
A_SCHEMA = {"type": "array", "items": {"type": "integer"}, "maxItems": 3}
A_SESSION = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "session": "talk"}
OPERATIONS = (
    "GET /health",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/responses",
    "GET /api/tags",
    "GET /api/ps",
    "GET /api/version",
    "POST /api/show",
    "POST /api/chat",
    "POST /api/generate",
    "GET /v1/sessions/{session}",
    "DELETE /v1/sessions/{session}",
)


@pytest.fixture
def app(make_service: Callable[..., Service]) -> FastAPI:
    return create_app(make_service(max_streams=16, max_queue=1000, max_tokens=4, max_sessions=5, seconds=20.0))


def load(app: FastAPI) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=HOST)


def test_all_operations_are_tried(app: FastAPI) -> None:
    assert {result.ok().label for result in load(app).get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_valid_requests(app: FastAPI, operation: str) -> None:
    answers = try_requests(app, operation, GenerationMode.POSITIVE)
    assert 200 in answers
    assert max(answers) < 500


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if "POST" in one or "sessions" in one])
def test_invalid_requests(app: FastAPI, operation: str) -> None:
    answers = try_requests(app, operation, GenerationMode.NEGATIVE)
    assert 400 in answers
    assert max(answers) < 500


def keep_rules(body: dict[str, Any]) -> None:
    """Those that a description of single fields does not tell."""
    if body.get("top_logprobs"):
        body["logprobs"] = True
    if body.get("session") is not None:
        body["n"] = 1
    if isinstance(body.get("format"), dict):  # not every object is a schema
        body["format"] = A_SCHEMA
    for form in (body.get("response_format"), (body.get("text") or {}).get("format")):
        named = form and form.get("json_schema", form)
        if named and named.get("schema"):
            named["schema"] = A_SCHEMA
    if isinstance(body.get("prompt"), list):
        body["prompt"] = [_in_vocabulary(one) for one in body["prompt"]]


def _in_vocabulary(prompt: Any) -> Any:
    if isinstance(prompt, list):
        return [_in_vocabulary(one) for one in prompt]
    return prompt if isinstance(prompt, str) else prompt % MIN_VOCAB_SIZE


def try_requests(app: FastAPI, operation: str, mode: GenerationMode) -> Counter[int]:
    """How often the server answered generated requests with which status; each answer is checked by schemathesis."""
    method, path = operation.split()
    described = load(app)[path][method]
    answers: Counter[int] = Counter()

    @given(case=described.as_strategy(generation_mode=mode))
    @settings(
        max_examples=N_CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def run(case: Case) -> None:
        for name, there in (("model", "tiny"), ("session", "talk")):  # what is there, every other time
            if mode is GenerationMode.POSITIVE and len(str((case.path_parameters or {}).get(name, ""))) % 2:
                case.path_parameters[name] = there
                if name == "session":
                    TestClient(app, headers=HOST).post("/v1/chat/completions", json=A_SESSION).raise_for_status()
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # another is not found, and nothing else would be tried
            if mode is GenerationMode.POSITIVE:
                keep_rules(case.body)
        answer = case.call_and_validate(headers=HOST, timeout=60)
        answers[answer.status_code] += 1
        assert not VALIDATORS_WORDS.search(answer.text if answer.status_code >= 400 else "")

    run()
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(answers.items()))
    print(f"\n{operation}, {mode.value}: {sum(answers.values())} requests, {counts}")
    return answers
