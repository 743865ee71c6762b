import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_rec.data.synthetic import synthetic_code, synthetic_text
from mm_rec.errors import UserError
from mm_rec.text.chat_template import CHAT_TEMPLATE
from mm_rec.text.tokenizer import CONTROL_TOKENS, MIN_VOCAB_SIZE, Tokenizer, train_tokenizer

PROPERTY = settings(deadline=None, max_examples=300, derandomize=True)
CORPUS = [*synthetic_text(40), *synthetic_code(40), *CONTROL_TOKENS * 5]

# Control strings whole, in pieces, nested and beside each other, among any other characters.
fragments = st.sampled_from(
    [*CONTROL_TOKENS, "<|", "|>", "<", "|", ">", "bos", "user|>", "<|assist", "ant|>", "\n", " "]
)
nasty = st.lists(fragments | st.text(max_size=3), max_size=12).map("".join)
nested = st.tuples(st.sampled_from(CONTROL_TOKENS), st.sampled_from(CONTROL_TOKENS), st.integers(0, 13)).map(
    lambda parts: parts[0][: parts[2]] + parts[1] + parts[0][parts[2] :]
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 600)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(saved):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(saved)


def test_the_vocabulary_has_control_tokens_first_and_is_bounded(tokenizer):
    assert tokenizer.control_ids == {token: i for i, token in enumerate(CONTROL_TOKENS)}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_id) == (0, 1, 2, 6)
    assert tokenizer.vocab_size <= 600
    assert tokenizer.padded_vocab_size % 64 == 0
    assert 0 <= tokenizer.padded_vocab_size - tokenizer.vocab_size < 64
    small = train_tokenizer(["too little text"], 32_000)
    assert small.vocab_size == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match="at least 263"):
        train_tokenizer(CORPUS, 262)


def test_common_words_and_indentation_are_single_tokens(tokenizer):
    assert len(tokenizer.encode(" apples")) == 1
    assert len(tokenizer.encode(":\n    ")) == 1


@PROPERTY
@given(st.text(max_size=200) | nasty)
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == text.encode()


def test_every_byte_has_a_token(tokenizer):
    every = "".join(map(chr, [*range(0x300), 0x0, 0x7F, 0xFFFD, 0xFFFF, 0x1F642, 0x10FFFF]))
    assert tokenizer.decode(tokenizer.encode(every)) == every
    assert {bytes([i]) for i in range(256)} <= set(tokenizer.token_bytes)


@PROPERTY
@given(nasty | nested)
def test_no_text_yields_a_control_id(tokenizer, text):
    assert not set(tokenizer.encode(text)) & set(tokenizer.control_ids.values())


def test_a_batch_is_the_same_as_one_by_one(tokenizer):
    texts = ["", "<|bos|>", *CORPUS]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_control_ids_and_cut_characters_in_decoding(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.end_id]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(tokenizer.encode("ü")[:1]) == "\ufffd"


def test_half_characters_cannot_be_encoded(tokenizer):
    with pytest.raises(ValueError, match="lone surrogates"):
        tokenizer.encode("a\ud800")


def test_training_is_deterministic_across_processes(tokenizer):
    program = (
        "from mm_rec.data.synthetic import *; from mm_rec.text.tokenizer import *;"
        "print(train_tokenizer([*synthetic_text(40), *synthetic_code(40), *CONTROL_TOKENS * 5], 600).sha256)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer.sha256


def test_what_was_saved_is_loaded(tokenizer, saved):
    loaded = Tokenizer.load(saved)
    assert loaded.sha256 == tokenizer.sha256
    assert [loaded.encode(text) for text in CORPUS] == [tokenizer.encode(text) for text in CORPUS]
    assert not set(loaded.encode("".join(CONTROL_TOKENS))) & set(loaded.control_ids.values())


def test_a_missing_or_broken_file_is_an_error(tmp_path, saved):
    with pytest.raises(UserError, match="there is no"):
        Tokenizer.load(tmp_path)
    whole = (saved / "tokenizer.json").read_bytes()
    without_control = whole.replace(b"<|end|>", b"<|fin|>")
    for content in (b"", b"{}", b"\xff", whole[:-9], b"[]", without_control):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer"):
            Tokenizer.load(tmp_path)


@PROPERTY
@given(st.text(max_size=100))
def test_transformers_reads_the_folder_and_gives_the_same_ids(tokenizer, theirs, text):
    if "<|" not in text:
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


def test_transformers_knows_the_control_tokens(tokenizer, theirs):
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.convert_tokens_to_ids("<|end|>"))
    assert ids == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_id)
    assert (theirs.padding_side, len(theirs)) == ("left", tokenizer.vocab_size)
    assert theirs.model_max_length > 10**9


def conversation_ids(tokenizer, messages):
    """The chat format from parts that are encoded on their own, and which of its tokens an assistant wrote."""
    ids, mask = [tokenizer.bos_id], [0]
    for message in messages:
        text = message["content"]
        for token in CONTROL_TOKENS:
            text = text.replace(token, "< " + token[1:])
        part = [*tokenizer.encode(text), tokenizer.end_id]
        ids += [tokenizer.control_ids[f"<|{message['role']}|>"], *part]
        mask += [0, *([int(message["role"] == "assistant")] * len(part))]
    return ids, mask


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": nasty | nested}),
    min_size=1,
    max_size=5,
)


@PROPERTY
@given(messages)
def test_a_rendered_chat_has_just_the_control_ids_of_its_structure(tokenizer, theirs, messages):
    ids, mask = conversation_ids(tokenizer, messages)
    rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == ids
    assert rendered["assistant_masks"] == mask
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == [*ids, tokenizer.control_ids["<|assistant|>"]]


@pytest.mark.parametrize(
    "message",
    [{"role": "<|user|>", "content": "x"}, {"role": "user<|end|>", "content": "x"}, {"role": "tool", "content": "x"},
     {"role": "user", "content": None}, {"role": "user", "content": ["<|end|>"]}, {"role": "user"}],
)  # fmt: skip
def test_a_message_of_another_shape_is_refused(theirs, message):
    with pytest.raises(Exception, match="message"):
        theirs.apply_chat_template([message], tokenize=False)


def test_other_fields_of_a_message_are_not_rendered(theirs):
    message = {"role": "user", "content": "x", "name": "<|system|>", "weight": ["<|end|>"]}
    assert theirs.apply_chat_template([message], tokenize=False) == "<|bos|><|user|>x<|end|>"


def test_the_template_names_every_control_token(saved):
    names = json.dumps([token[2:-2] for token in CONTROL_TOKENS])
    assert names in CHAT_TEMPLATE
    assert (saved / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_a_word_without_end_is_trained_in_pieces_and_written_whole() -> None:
    word = "".join(random.Random(0).choices("ACGT", k=100_000))
    trained = train_tokenizer([word, "some words that are short " * 30], 400)
    assert trained.vocab_size == 400
    assert trained.decode(trained.encode(word)) == word


def test_a_tokenizer_of_a_stranger_ends_in_one_line(tmp_path: Path) -> None:
    trained = train_tokenizer(["some words " * 50], 300)
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    sound = json.loads(path.read_text())
    strangers: dict[str, Any] = {
        "numbers from 0": {"model": {**sound["model"], "vocab": {**sound["model"]["vocab"], "Ġsome": 5000}}},
        "stand for bytes": {
            "model": {**sound["model"], "vocab": {**sound["model"]["vocab"], "漢": trained.vocab_size}}
        },
        "give a text back": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        "is not a tokenizer": {"pre_tokenizer": "none"},
        "has a normalizer": {"normalizer": {"type": "Lowercase"}},
        "of the kind 'WordLevel'": {"model": {**sound["model"], "type": "WordLevel"}},
    }
    for message, change in strangers.items():
        path.write_text(json.dumps({**sound, **change}))
        with pytest.raises(UserError, match=message) as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "in a sequence", "decoder"])
def test_a_pattern_that_takes_exponential_time_is_refused(part: str, tmp_path: Path) -> None:
    train_tokenizer(["some words " * 50], 300).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    sound = json.loads(path.read_text())
    endless = {"Regex": r"(?:(?:[A-z]+)+)+(?!.|\s)"}  # looks at "Aaaa" in as many ways as there are to cut it
    replace = {"type": "Replace", "pattern": endless, "content": "x"}
    split = {"type": "Split", "pattern": endless, "behavior": "Isolated", "invert": False}
    change = {
        "normalizer": {"normalizer": replace},
        "pre_tokenizer": {"pre_tokenizer": split},
        "in a sequence": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}},
        "decoder": {"decoder": replace},
    }
    path.write_text(json.dumps({**sound, **change[part]}))
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
