"""What a message is: the same for read_message, the chat template, training rows and the ids."""

import inspect
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mm_rec.data.conversations import parse_conversation
from mm_rec.text.conversation import encode_conversation
from mm_rec.text.message import ROLE_NAMES, UNREADABLE, Message, MessageError, read_message, without_nulls
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

ANSWER = {"role": "assistant", "content": "Yes."}
PARTS = [{"type": "text", "text": "Hel"}, {"type": "input_text", "text": "lo", "image_url": None}]

TAKEN = [
    ({"role": "user", "content": "Hello"}, Message("user", "Hello")),
    ({"role": "developer", "content": "Hello"}, Message("system", "Hello")),
    ({"role": "user", "content": PARTS}, Message("user", "Hello")),
    ({"role": "user", "content": ""}, Message("user", "")),
    ({"role": "gpt", "content": "Hello", "refusal": None, "tool_calls": []}, Message("assistant", "Hello")),
    ({"role": "user", "content": "Hello", "name": "<|end|>", "weight": 1}, Message("user", "Hello")),
]  # fmt: skip

REFUSED = [
    ("Hello", (), "not an object"),
    (None, (), "not an object"),
    ({"content": "Hello"}, ("role",), "role of a message is None"),
    ({"role": None, "content": "Hello"}, ("role",), "role of a message is None"),
    ({"role": "tool", "content": "3"}, ("role",), "'tool'; use one of system"),
    ({"role": ["user"], "content": "3"}, ("role",), "role of a message"),
    ({"role": "user"}, ("content",), "no content"),
    ({"role": "user", "content": None}, ("content",), "no content"),
    ({"role": "user", "content": []}, ("content",), "neither a string nor"),
    ({"role": "user", "content": {"type": "text", "text": "a"}}, ("content",), "neither a string nor"),
    ({"role": "user", "content": ["a"]}, ("content", 0, "type"), "reads text only"),
    ({"role": "user", "content": [*PARTS, {"type": "image_url"}]}, ("content", 2, "type"), "say it in words"),
    ({"role": "user", "content": [{"type": "text", "text": None}]}, ("content", 0, "text"), "no text"),
    ({"role": "assistant", "content": "a", "tool_calls": [{}]}, ("tool_calls",), "reads text only"),
    ({"role": "user", "content": "a", "images": ["iVBORw0KGgo="]}, ("images",), "say it in the content"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([inspect.getsource(random)], 400)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def rendered(theirs: PreTrainedTokenizerFast, *messages: Any) -> list[int]:
    return list(theirs.apply_chat_template(list(messages), return_dict=True)["input_ids"])


@pytest.mark.parametrize(("value", "message"), TAKEN)
def test_all_take_the_same(
    tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, value: dict[str, Any], message: Message
) -> None:
    assert read_message(value) == message
    assert parse_conversation({"messages": [value, ANSWER]})[0] == message
    ids = encode_conversation(tokenizer, [message])[0]
    assert encode_conversation(tokenizer, [value])[0] == ids
    assert rendered(theirs, value) == ids


@pytest.mark.parametrize(("value", "path", "problem"), REFUSED)
def test_all_refuse_the_same(
    tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, value: Any, path: tuple[str | int, ...], problem: str
) -> None:
    with pytest.raises(MessageError, match=problem) as error:
        read_message(value)
    assert error.value.path == path
    with pytest.raises(ValueError, match=problem):
        parse_conversation({"messages": [value, ANSWER]})
    with pytest.raises(MessageError):
        encode_conversation(tokenizer, [value])
    with pytest.raises(Exception, match="message" if isinstance(value, dict) else None):
        rendered(theirs, ANSWER, value)


texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=8)
somethings = st.sampled_from([None, "", [], {}, "x", 3, ["x"]])
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "output_text", "image_url", None]), "text": texts | st.none()}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLE_NAMES, "tool", "function", None])},
    optional={
        "content": texts | st.none() | st.lists(parts, max_size=3) | somethings,
        "name": somethings,
        **dict.fromkeys(UNREADABLE, st.none() | somethings),
    },
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(messages)
def test_the_template_agrees(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, value: dict[str, Any]) -> None:
    try:
        expected = encode_conversation(tokenizer, [value])[0]
    except MessageError:
        with pytest.raises(Exception, match="message"):
            rendered(theirs, value)
    else:
        assert rendered(theirs, value) == expected


def test_null_is_absence() -> None:
    assert without_nulls({"a": None, "b": float("nan"), "c": 0, "d": "", "e": []}) == {"c": 0, "d": "", "e": []}
