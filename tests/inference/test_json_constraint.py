"""Texts that are drawn by a JSON schema are JSON that follows it, whatever the model would rather say."""

import builtins
import inspect
import json
import random
from typing import Any

import jsonschema_rs
import pytest
import torch

from mm_rec import ops
from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.generate import GeneratedText, end_tokens, generate, json_constraint
from mm_rec.inference.json_constraint import ANY_OBJECT, JsonConstraint
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.text.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer

CONFIG = ModelConfig(vocab_size=576, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 130}},
        "required": ["name", "age"],
        "description": "A person. " * 500,
        "additionalProperties": False,
    },
    "choice": {"enum": ["ışık", "漢字", "<|end|>", 3, None]},
    "multiple": {"type": "number", "multipleOf": 0.05, "minimum": 1, "maximum": 9},
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "pattern": {"type": "string", "pattern": "^[A-F]{2}-[0-9]{3}$"},
    "nested": {
        "$defs": {"node": {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"],
                           "additionalProperties": False}},
        "type": "array", "items": {"anyOf": [{"$ref": "#/$defs/node"}, {"const": 0}]}, "minItems": 3, "maxItems": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [inspect.getsource(random), "ışık çiğ öğüt " * 20, '{"name": true, "age": 12}\n' * 9]
    return train_tokenizer([*texts, " ".join(CONTROL_TOKENS) * 20], 540)


@pytest.fixture(scope="module")
def model() -> MMRecModel:
    model = MMRecModel(CONFIG, seed=3).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(15)
    return model


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_text_follows_its_schema(
    model: MMRecModel, tokenizer: Tokenizer, name: str, temperature: float, backend: str
) -> None:
    sampling = Sampling(400, temperature=temperature, top_k=40, repetition_penalty=1.1, seed=5)
    with ops.use_backend(backend):
        text = "".join(generate(model, tokenizer, "Say it: ", sampling, None, SCHEMAS[name]))
    jsonschema_rs.validate(SCHEMAS[name], json.loads(text))


def test_any_object(model: MMRecModel, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        sampling = Sampling(2000, temperature=2.0, seed=seed)
        assert isinstance(json.loads("".join(generate(model, tokenizer, "", sampling, None, ANY_OBJECT))), dict)


def test_an_answer_follows_its_schema_and_the_conversation_goes_on(model: MMRecModel, tokenizer: Tokenizer) -> None:
    session = ChatSession.start(model, tokenizer, sampling=Sampling(200, temperature=1.5))
    assert json.loads(session.answer("Which?", json_schema=SCHEMAS["choice"])) in SCHEMAS["choice"]["enum"]
    session.sampling = Sampling(30, temperature=1.5)
    with pytest.raises(ValueError, match=r"Expecting|Extra"):
        json.loads(session.answer("And now?"))


def test_what_may_come_is_what_makes_json(tokenizer: Tokenizer) -> None:
    """Against all texts of a small schema: a token is allowed if a text goes on with it, and no other is."""
    texts = ["[true,true]", "[true,false]", "[false,true]", "[false,false]"]
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    ends = end_tokens(tokenizer)
    start = JsonConstraint(tokenizer, CONFIG.vocab_size, ends, schema)
    for text in texts:
        constraint, said = start.fork(), ""
        for token in tokenizer.encode(text):
            allowed = set(range(CONFIG.vocab_size)) - set(constraint.banned())
            pieces = {one: tokenizer.decode([one]) for one in allowed}
            assert all(pieces.values())  # no control token, and none of the rows without a token
            packed = {one for one, piece in pieces.items() if not any(map(str.isspace, piece))}
            expected = {
                one
                for one, content in enumerate(tokenizer.token_bytes)
                if content and any(whole.encode().startswith(said.encode() + content) for whole in texts)
            }
            # Where only one text can follow, it is written in the tokens that the tokenizer would choose.
            assert packed in (expected, {token})
            assert not constraint.is_complete
            constraint.push(token)
            said += pieces[token]
        assert constraint.is_complete


def test_a_text_may_end_where_it_is_whole(tokenizer: Tokenizer) -> None:
    constraint = JsonConstraint(tokenizer, CONFIG.vocab_size, end_tokens(tokenizer), {"type": "integer"})
    assert end_tokens(tokenizer) <= set(constraint.banned())
    for token in tokenizer.encode("12"):
        constraint.push(token)
    assert end_tokens(tokenizer).isdisjoint(constraint.banned())
    assert not constraint.is_complete


def test_texts_share_a_constraint_and_not_its_progress(tokenizer: Tokenizer, model: MMRecModel) -> None:
    constraint = json_constraint(model, tokenizer, SCHEMAS["list"])
    texts = [
        GeneratedText(tokenizer, CONFIG.vocab_size, Sampling(), torch.Generator(), constraint=constraint) for _ in "ab"
    ]
    for token in tokenizer.encode("[true,true,false]"):
        texts[0].push(token)
    assert texts[0].finish_reason == "stop"
    assert texts[1].finish_reason is None
    assert texts[1].push(tokenizer.encode("[")[0]) == "["


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "foo"}, "can't be followed .*foo"),
        ({"type": "array", "uniqueItems": True}, "can't be followed .*uniqueItems.*leave that part of it out"),
        ({"type": "string", "pattern": "(?!x)"}, "can't be followed .*look-around"),
        ({"$ref": "http://example.org/schema"}, "can't be followed .*example.org"),
        ({"const": "\ud800"}, "no JSON schema"),
        (
            {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(6)]} for i in range(8)]},
            "can't be followed .*large",
        ),
        ({"type": "integer", "multipleOf": 7919 * 7907}, "smaller ones in multipleOf"),
        ({"type": "integer", "multipleOf": 10**400}, "smaller ones in multipleOf"),
        ({"type": "integer", "multipleOf": True}, "can't be followed"),
        (
            {"allOf": [{"type": "integer", "multipleOf": n} for n in (7, 11, 13, 17, 19, 23)]},
            "smaller ones in multipleOf",
        ),
        ({"type": "number", "allOf": [{"multipleOf": 1e-9}, {"multipleOf": 5}]}, "smaller ones in multipleOf"),
        ({"type": "number", "multipleOf": 1e-300}, "smaller ones in multipleOf"),
        ({"type": "integer", "multipleOf": 0}, "can't be followed"),
        ({"const": {"description": "x " * 2000}}, "may have 1000 characters, and 'x x"),
        ({"type": "string", "pattern": "(ab|cd)?" * 2000}, "may have 1000 characters"),
        ({"properties": {"x" * 2000: {"type": "string"}}}, "may have 1000 characters"),
        ({"enum": ["word " * 100] * 1000}, "a JSON schema may have 100000 characters"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(
    tokenizer: Tokenizer, schema: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as error:
        JsonConstraint(tokenizer, CONFIG.vocab_size, end_tokens(tokenizer), schema)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_schema_that_grows_too_complex_is_given_up(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_rec.inference.json_constraint.MAX_LEXER_STATES", 2_000)  # soon reached
    schema = {"type": "string", "pattern": "^([ab]*a[ab]{18}){6}$"}
    rng = random.Random(1)
    with pytest.raises(UserError, match="too complex"):  # noqa: PT012
        constraint = JsonConstraint(tokenizer, CONFIG.vocab_size, end_tokens(tokenizer), schema)
        for letter in '"' + "".join(rng.choices("ab", k=100_000)):
            constraint.push(tokenizer.encode(letter)[0])
            constraint.banned()


def test_where_the_library_is_missing_a_line_says_so(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "llguidance":
            raise ModuleNotFoundError(name=name)
        return whole(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="JSON by a schema needs the package llguidance; install it with: pip"):
        JsonConstraint(tokenizer, CONFIG.vocab_size, end_tokens(tokenizer), ANY_OBJECT)
