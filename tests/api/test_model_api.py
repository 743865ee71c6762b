"""The Python interface gives what the parts under it give, says in a line what is wrong, and its examples run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mm_rec
from mm_rec.config import ModelConfig
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.generate import generate
from mm_rec.inference.sampling import Sampling, SamplingOptions
from mm_rec.model import MMRecModel
from mm_rec.scripts.sampling_options import FLAGS
from mm_rec.state import flatten_state
from mm_rec.storage import checkpoint
from mm_rec.text.conversation import encode_message
from mm_rec.text.tokenizer import CONTROL_TOKENS, train_tokenizer

CONFIG = ModelConfig(vocab_size=512, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)
PROMPT = "def shuffle(self, x):"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights; fusion counts as trained."""
    path = tmp_path_factory.mktemp("api") / "checkpoints"
    model = MMRecModel(CONFIG, seed=3)
    with torch.no_grad():
        model.embedding.weight.mul_(15)
        model.fusion.gate.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    tokenizer = train_tokenizer([inspect.getsource(random), " ".join(CONTROL_TOKENS) * 20], 512)
    weights = model.state_dict()
    checkpoint.save(path, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def model(saved: Path) -> mm_rec.Model:
    return mm_rec.load(saved, device="cpu", precision="fp32")


def test_import_loads_the_standard_library_alone() -> None:
    program = """
import sys
before = set(sys.modules)
import mm_rec
assert "load" in dir(mm_rec) and mm_rec.__version__
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
assert roots - set(sys.stdlib_module_names) == {"mm_rec"}, roots
assert mm_rec.Sampling().seed == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mm_rec.nothing
    assert all(getattr(mm_rec, name) is not None for name in mm_rec.__all__)


def test_the_options_are_those_of_sampling_and_of_the_command_line() -> None:
    fields = {field.name for field in dataclasses.fields(Sampling)}
    assert set(SamplingOptions.__annotations__) == fields == {*FLAGS, "stop"}


@pytest.mark.parametrize("domain", [None, "code", "all"])
def test_generate_and_stream_give_the_same_text_as_the_function(model: mm_rec.Model, domain: str | None) -> None:
    options = {"max_new_tokens": 30, "temperature": 1.3, "seed": 5}
    chosen = None if domain == "all" else domain
    pieces = list(generate(model.module, model.tokenizer, PROMPT, Sampling(**options), chosen))
    assert len(pieces) > 5
    assert list(model.stream(PROMPT, domain=domain, **options)) == pieces
    assert model.generate(PROMPT, domain=domain, **options) == "".join(pieces)
    end = "".join(pieces)[4]
    assert model.generate(PROMPT, domain=domain, stop=end, **options) == "".join(pieces).partition(end)[0]


def test_a_path_may_be_a_string(saved: Path, model: mm_rec.Model) -> None:
    again = mm_rec.load(str(saved), device="cpu", precision="fp32")
    assert again.path == model.path == saved
    assert again.domains == ("text", "code")
    assert str(saved) in repr(again)


def test_a_conversation_is_that_of_a_session_and_goes_on_from_its_file(model: mm_rec.Model, tmp_path: Path) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.2, "seed": 3}
    session = model.chat(system="Be brief.", domain="text", **options)
    twin = ChatSession.start(
        model.module, model.tokenizer, sampling=Sampling(**options), domain="text", system="Be brief."
    )
    assert session.answer("Hello.") == "".join(twin.reply("Hello."))
    path = str(tmp_path / "talk.safetensors")
    session.save(path)
    resumed = model.resume_chat(path)
    assert resumed.sampling == session.sampling
    assert resumed.answer("And now?") == session.answer("And now?") == twin.answer("And now?")
    changed = model.resume_chat(path, temperature=0, stop=["a", "b"])
    assert changed.sampling == dataclasses.replace(session.sampling, temperature=0, stop=("a", "b"))


def test_logits_and_state_are_those_of_a_whole_read(model: mm_rec.Model) -> None:
    text = PROMPT * 120  # longer than a chunk
    whole = model.logits(text, domain="code")
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    assert whole.ids.tolist() == ids
    with torch.no_grad():
        expected, after = model.module(torch.tensor([ids]), None, "code")
    torch.testing.assert_close(whole.logits, expected[0], rtol=1e-3, atol=1e-3)
    first = model.logits(ids[:10], domain="code")
    kept = [tensor.clone() for tensor in flatten_state(first.state).values()]
    rest = model.logits(torch.tensor(ids[10:]), state=first.state, domain="code")
    torch.testing.assert_close(torch.cat([first.logits, rest.logits]), whole.logits, rtol=1e-3, atol=1e-3)
    assert int(rest.state.position) == int(after.position) == len(ids)
    assert all(torch.equal(a, b) for a, b in zip(flatten_state(first.state).values(), kept, strict=True))
    more = model.logits("x", state=rest.state, domain="code")
    assert more.ids.tolist() == model.tokenizer.encode("x"), "no document begins in the middle of one"


@pytest.mark.parametrize("domain", [None, "code"])
def test_bits_per_byte_follow_from_the_logits(model: mm_rec.Model, domain: str | None) -> None:
    text = "ışık = random.shuffle(x)\n" * 30
    read = model.logits(text, domain=domain)
    nats = -read.logits[:-1].double().log_softmax(-1).gather(1, read.ids[1:, None]).sum()
    expected = float(nats) / 0.6931471805599453 / len(text.encode())
    assert model.bits_per_byte(text, domain=domain) == pytest.approx(expected, rel=1e-4)


def test_what_is_wrong_is_said_in_a_line(model: mm_rec.Model, saved: Path, tmp_path: Path) -> None:
    text_state = model.logits("a", domain="text").state
    calls = [
        (mm_rec.UserError, "no folder", lambda: mm_rec.load(tmp_path / "none")),
        (mm_rec.UserError, "no weights 'int4'", lambda: mm_rec.load(saved, weights="int4")),
        (mm_rec.UserError, "unknown precision", lambda: mm_rec.load(saved, precision="fp8")),
        (mm_rec.UserError, "unknown device", lambda: mm_rec.load(saved, device="tpu")),
        (mm_rec.UserError, "no expert 'math'", lambda: model.generate("a", domain="math")),
        (mm_rec.UserError, "no expert 'math'", lambda: model.stream("a", domain="math")),
        (mm_rec.UserError, "no expert 'math'", lambda: model.bits_per_byte("a", domain="math")),
        (mm_rec.UserError, "top_p must be", lambda: model.chat(top_p=2)),
        (
            TypeError,
            "no sampling setting 'max_tokens'; there are",
            lambda: model.stream("a", max_tokens=3),
        ),
        (TypeError, "temperature must be a number, got '1'", lambda: model.generate("a", temperature="1")),
        (TypeError, "top_k must be a whole number, got 2.5", lambda: model.generate("a", top_k=2.5)),
        (TypeError, "a text is a string, not of type int", lambda: model.generate(5)),
        (TypeError, "a text is a string, not of type NoneType", lambda: model.generate(None)),
        (mm_rec.UserError, "cannot read the session", lambda: model.resume_chat(tmp_path / "none")),
        (ValueError, "at least one token", lambda: model.logits([])),
        (ValueError, "at least one token", lambda: model.logits("", state=text_state, domain="text")),
        (ValueError, "at least one token", lambda: model.logits([[1, 2]])),
        (ValueError, f"0 to {model.tokenizer.vocab_size - 1}", lambda: model.logits([model.tokenizer.vocab_size])),
        (ValueError, "whole numbers", lambda: model.logits([-1])),
        (ValueError, "whole numbers", lambda: model.logits([0.5])),
        (
            ValueError,
            "not code",
            lambda: model.logits("a", state=model.logits("a", domain="text").state, domain="code"),
        ),
        (ValueError, "empty text", lambda: model.bits_per_byte("")),
    ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_examples_run(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"mm_rec": mm_rec}
    documented = [mm_rec.load, mm_rec.Model, *vars(mm_rec.Model).values()]
    texts = [text for one in documented if (text := inspect.getdoc(one)) and "Example::" in text]
    assert len(texts) == 8
    for text in texts:
        [example] = re.findall(r"Example::\n\n((?:    .*\n?|\n)+)", text)
        exec(textwrap.dedent(example), names)
    assert (tmp_path / "talk.safetensors").is_file()


def test_a_conversation_may_have_begun(model: mm_rec.Model) -> None:
    said = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "Two.", "tool_calls": None},
    ]
    session = model.chat(messages=said)
    same = model.chat(system="Be brief.", messages=said[1:])
    states = (flatten_state(one.state) for one in (session, same))
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))
    assert session.n_tokens == 1 + sum(len(encode_message(model.tokenizer, one)[0]) for one in said)
    with pytest.raises(ValueError, match="reads text only"):
        model.chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}])


def test_a_text_may_have_to_be_json(model: mm_rec.Model) -> None:
    schema = {"type": "array", "items": {"enum": ["ışık", 3]}, "minItems": 2, "maxItems": 2}
    texts = [
        model.generate(PROMPT, json_schema=schema, temperature=2),
        "".join(model.stream(PROMPT, json_schema=schema, temperature=0)),
        model.chat(temperature=2).answer("Which?", json_schema=schema),
    ]
    assert all(set(json.loads(text)) <= {"ışık", 3} for text in texts)
    with pytest.raises(mm_rec.UserError, match="uniqueItems"):
        model.generate(PROMPT, json_schema={"type": "array", "uniqueItems": True})
