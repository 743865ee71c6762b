"""Conversations as ids, the same as transformers gives; no control id from any text; sessions that go on bitwise."""

import inspect
import random
from pathlib import Path

import pytest
import torch

from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.inference import session_file
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.storage.files import DamageError
from mm_rec.text.conversation import Message, clean, encode_conversation, encode_message
from mm_rec.text.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer

CONFIG = ModelConfig(vocab_size=512, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)
FRAGMENTS = [
    *CONTROL_TOKENS, "<", "|", ">", "<|", "|>", "< |", "end", "bos", "<|bo<|eos|>s|>", "<|<|end|>end|>", "<|END|>",
    "<|end|", "\x00", "\ud800", "\udfff", "\ufffd", "\u200b", "\r\n", "\n\n", "\t", "  ", "ışğü", "漢字", "🙂",
    "{{ messages }}", "{% generation %}", "<s>", "</s>", "[INST]", "&lt;|end|&gt;", "\\u003c|end|\\u003e", "user", "a",
]  # fmt: skip


def nasty(rng: random.Random) -> str:
    return "".join(rng.choices(FRAGMENTS, k=rng.randrange(9)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([inspect.getsource(random), " ".join(CONTROL_TOKENS) * 20], 512)


@pytest.fixture(scope="module")
def model() -> MMRecModel:
    return MMRecModel(CONFIG, seed=3)


def test_no_text_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    control = set(tokenizer.control_ids.values())
    for _ in range(10_000):
        text = nasty(rng)
        ids, _ = encode_message(tokenizer, Message(rng.choice(["system", "user", "assistant"]), text))
        assert control.isdisjoint(ids[1:-1]), repr(text)
        assert tokenizer.decode(ids[1:-1]) == clean(text)
        assert not any(token in clean(text) for token in CONTROL_TOKENS)


@pytest.mark.parametrize("role", ["", "User", "tool", "<|end|>", "end", "user|><|end"])
def test_no_role_becomes_a_control_token(tokenizer: Tokenizer, role: str) -> None:
    with pytest.raises(ValueError, match="role of a message"):
        encode_message(tokenizer, Message(role, "hi"))


def test_clean_changes_nothing_else() -> None:
    text = "a < b | c > d, <|im_start|>, \x00, 🙂, <| end |>"
    assert clean(text) == text
    assert clean(clean("<|<|end|>|>")) == clean("<|<|end|>|>") == "<|< |end|>|>"
    assert clean("a\ud800b") == "a\ufffdb"
    assert clean("\ud83d\ude42") == "🙂"  # a pair in two halves is one character


def test_ids_and_mask_equal_those_of_the_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(2)
    assistant_tokens = 0
    for _ in range(300):
        messages = [Message("system", clean(nasty(rng)))] * rng.randrange(2)
        for _ in range(rng.randrange(1, 4)):
            messages += [Message("user", nasty(rng)), Message("assistant", nasty(rng))]
        messages = [Message(m.role, m.content.replace("\ud800", "").replace("\udfff", "")) for m in messages]
        expected = theirs.apply_chat_template(
            [m._asdict() for m in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encode_conversation(tokenizer, messages)
        assert ids == expected["input_ids"]
        assert mask == expected["assistant_masks"]
        assistant_tokens += sum(mask)
    assert assistant_tokens > 1000


def test_the_prompt_of_a_reply_equals_that_of_the_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    messages = [Message("system", "Be brief."), Message("user", "What is <|end|>?")]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [m._asdict() for m in messages], add_generation_prompt=True, return_dict=False
    )
    ids, _ = encode_conversation(tokenizer, messages)
    assert [*ids, tokenizer.control_ids["<|assistant|>"]] == expected


def start(model: MMRecModel, tokenizer: Tokenizer) -> ChatSession:
    sampling = Sampling(max_new_tokens=6, temperature=1.0, repetition_penalty=1.2, seed=5)
    return ChatSession.start(model, tokenizer, sampling=sampling, system="Be brief.")


def talk(session: ChatSession, turns: int) -> list[str]:
    return ["".join(session.reply(f"This is message {session.turns}.")) for _ in range(turns)]


def following_logits(session: ChatSession) -> torch.Tensor:
    ids = session.tokenizer.encode("What now?")
    with torch.inference_mode():
        logits, _ = session.model(torch.tensor([ids]), session.state, session.domain)
    return logits


def test_a_session_reads_what_was_said(model: MMRecModel, tokenizer: Tokenizer) -> None:
    """After a turn the state is that of the whole conversation read at once."""
    session = start(model, tokenizer)
    session.sampling = Sampling(max_new_tokens=0)
    talk(session, 2)
    messages = [Message("system", "Be brief.")]
    for turn in range(2):
        messages += [Message("user", f"This is message {turn}."), Message("assistant", "")]
    ids, _ = encode_conversation(tokenizer, messages)
    _, state = model(torch.tensor([ids]))
    assert session.n_tokens == len(ids)
    torch.testing.assert_close(session.state.experts["text"][2].h, state.experts["text"][2].h, rtol=1e-4, atol=1e-5)


def test_a_restored_session_goes_on_bitwise(model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    session = start(model, tokenizer)
    talk(session, 5)
    session.save(path)
    size = path.stat().st_size
    talk(session, 45)
    session.save(path)
    assert path.stat().st_size == size
    restored = ChatSession.load(path, MMRecModel(CONFIG, seed=3), tokenizer)
    assert (restored.turns, restored.system, restored.sampling) == (50, session.system, session.sampling)
    assert torch.equal(following_logits(restored), following_logits(session))
    assert talk(restored, 3) == talk(session, 3)
    assert torch.equal(following_logits(restored), following_logits(session))


def test_a_fork_goes_its_own_way(model: MMRecModel, tokenizer: Tokenizer) -> None:
    session, untouched = start(model, tokenizer), start(model, tokenizer)
    talk(session, 1)
    talk(untouched, 1)
    fork = session.fork()
    "".join(fork.reply("Something else."))
    assert talk(session, 2) == talk(untouched, 2)
    assert torch.equal(following_logits(session), following_logits(untouched))
    assert not torch.equal(following_logits(fork), following_logits(session))


def test_an_answer_broken_off_is_closed(model: MMRecModel, tokenizer: Tokenizer) -> None:
    session = start(model, tokenizer)
    before = session.n_tokens
    answer = session.reply("Hello.")
    next(answer)
    answer.close()
    question, _ = encode_message(tokenizer, Message("user", "Hello."))
    assert session.turns == 1
    assert session.n_tokens - before >= len(question) + 3  # the role, at least one token, the end


def test_an_answer_ends_at_the_end_token_and_at_a_stop_string(model: MMRecModel, tokenizer: Tokenizer) -> None:
    always = MMRecModel(CONFIG, seed=3)
    with torch.no_grad():  # a model that says the same token whatever it reads
        always.fusion.mix.zero_()
    session = ChatSession.start(always, tokenizer, sampling=Sampling(temperature=0, max_new_tokens=9))
    end_only = session.fork()
    ids = tokenizer.encode("a")
    # All logits are equal, so the first id that is not banned wins: the end of a text.
    assert "".join(end_only.reply("Hi")) == ""
    assert end_only.n_tokens == session.n_tokens + len(tokenizer.encode("Hi")) + 4
    stop = start(model, tokenizer)
    answer = "".join(stop.fork().reply("Hi"))
    assert len(ids) == 1
    assert len(answer) > 2
    stop.sampling = Sampling(max_new_tokens=6, temperature=1.0, repetition_penalty=1.2, seed=5, stop=(answer[1],))
    assert "".join(stop.reply("Hi")) == answer[: answer.index(answer[1])]


def test_a_session_of_another_model_is_refused(model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    start(model, tokenizer).save(path)
    with pytest.raises(UserError, match="another model"):
        ChatSession.load(path, MMRecModel(CONFIG, seed=4), tokenizer)
    with pytest.raises(UserError, match="another precision"):
        ChatSession.load(path, MMRecModel(CONFIG, seed=3).to(torch.bfloat16), tokenizer)
    with pytest.raises(UserError, match="another tokenizer"):
        ChatSession.load(path, model, train_tokenizer(["some other text, some other text"], 300))
    with pytest.raises(UserError, match="cannot read the session"):
        ChatSession.load(tmp_path / "none", model, tokenizer)


def test_every_damage_is_noticed(model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    start(model, tokenizer).save(path)
    whole = path.read_bytes()
    rng = random.Random(4)
    places = [*range(400), *rng.sample(range(400, len(whole)), 100)]  # the header densely, the tensors here and there
    broken = [whole[:i] + bytes([whole[i] ^ (1 << rng.randrange(8))]) + whole[i + 1 :] for i in places]
    broken += [whole[: rng.randrange(len(whole))] for _ in range(20)] + [b"", whole + b"\0", bytes(len(whole))]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DamageError, match="damaged"):
            ChatSession.load(path, model, tokenizer)


def test_a_file_larger_than_any_session_is_not_read(
    model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "session.safetensors"
    start(model, tokenizer).save(path)
    assert path.stat().st_size < session_file.most_bytes(model)
    ChatSession.load(path, model, tokenizer)
    with path.open("r+b") as file:
        file.truncate(session_file.most_bytes(model) + 1)
    monkeypatch.setattr(session_file, "read_regular", lambda path: pytest.fail("the file was read"))
    with pytest.raises(DamageError, match="more than any session of this model"):
        ChatSession.load(path, model, tokenizer)
