import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.inference.generate import TextStream, generate, read_prompt
from mm_rec.inference.sampling import Sampler, Sampling, next_tokens
from mm_rec.model import MMRecModel
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

SAMPLE = ["the cat sat on the mat, çok güzel bir gün 😀 漢字\n", "def f(x):\n    return x + 1\n"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SAMPLE, 320)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MMRecModel:
    config = ModelConfig(
        tokenizer.padded_vocab_size, d_model=32, n_heads=2, n_layers=3, d_ff=32, window=16, kept_pairs=6
    )
    return MMRecModel(config)


def draw(logits: torch.Tensor, sampling: Sampling, count: int, seed: int = 1, seen: tuple[int, ...] = ()) -> list[int]:
    sampler = Sampler(sampling, torch.Generator().manual_seed(seed), seen=seen)
    return [next_tokens(logits[None], [sampler])[0] for _ in range(count)]


def draws(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    return set(draw(logits, sampling, 400))


LOGITS = torch.tensor([2.0, 1.9, 1.0, 0.0, -1.0, -torch.inf])


def test_filters_leave_what_they_say() -> None:
    plain = {"temperature": 1.0, "top_p": 1.0}
    assert draws(LOGITS, Sampling(**plain)) == {0, 1, 2, 3, 4}
    assert draws(LOGITS, Sampling(**plain, top_k=2)) == {0, 1}
    assert draws(LOGITS, Sampling(**plain, min_p=0.3)) == {0, 1, 2}
    probability = LOGITS.softmax(0)
    assert draws(LOGITS, Sampling(temperature=1.0, top_p=float(probability[0]) * 0.99)) == {0}
    assert draws(LOGITS, Sampling(temperature=1.0, top_p=float(probability[:2].sum()) * 0.99)) == {0, 1}
    assert draws(LOGITS, Sampling(temperature=0)) == {0}


def test_draws_follow_the_softmax() -> None:
    count = 20_000
    tokens = draw(LOGITS, Sampling(temperature=0.7, top_p=1.0), count, seed=0)
    found = torch.tensor(tokens).bincount(minlength=6) / count
    assert torch.allclose(found, (LOGITS / 0.7).softmax(0), atol=0.015)


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    greedy = Sampling(temperature=0, repetition_penalty=1.5)
    assert draw(torch.tensor([3.0, 2.5]), greedy, 1, seen=(0,)) == [1]
    assert draw(torch.tensor([-2.0, -2.5]), greedy, 1, seen=(0, 0)) == [1]
    assert draw(torch.tensor([3.0, 1.5]), greedy, 1, seen=(0,)) == [0]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": -0.1}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2},
     {"repetition_penalty": 0}, {"max_new_tokens": -1}, {"stop": ("",)}, {"seed": 10**26}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Sampling(**wrong)


@pytest.mark.parametrize("broken", [[float("nan"), 0.0], [float("-inf")] * 2, [0.0, float("inf")]])
def test_a_model_that_gives_no_numbers_is_an_error(broken: list[float]) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="no numbers"):
            draws(torch.tensor(broken), Sampling(temperature=temperature))


def stream_text(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in ids if not stream.stopped] + [stream.finish()]
    return pieces, stream.stopped


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_are_whole_characters_and_add_up(tokenizer: Tokenizer, text: str) -> None:
    pieces, _ = stream_text(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces) or "�" in text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(7, 262), max_size=30))
def test_any_bytes_stream_as_they_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces, _ = stream_text(tokenizer, ids)
    whole = b"".join(tokenizer.token_bytes[i] for i in ids)
    assert "".join(pieces) == whole.decode("utf-8", "replace")


def test_token_bytes_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    for text in SAMPLE[:2]:
        assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == text.encode()
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert all(tokenizer.token_bytes[i] == b"" for i in tokenizer.control_ids.values())


@settings(max_examples=200, deadline=None)
@given(text=st.text("abX", max_size=30), stops=st.lists(st.text("abX", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    ids = [i for sign in text for i in tokenizer.encode(sign)]
    pieces, stopped = stream_text(tokenizer, ids, tuple(stops))
    # The first stop string is the one that is complete first; among those, the one that begins first.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    expected = text if not ends else text[: min(text.index(s) for s in stops if s in text[: min(ends)])]
    assert "".join(pieces) == expected
    assert stopped == bool(ends)


def test_same_seed_same_text_and_another_seed_another(model: MMRecModel, tokenizer: Tokenizer) -> None:
    def text(seed: int) -> str:
        return "".join(generate(model, tokenizer, "the cat", Sampling(max_new_tokens=40, seed=seed), "text"))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1)


def test_control_tokens_and_padding_rows_never_come(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        tokenizer.padded_vocab_size, d_model=32, n_heads=2, n_layers=3, d_ff=32, window=16, kept_pairs=6
    )
    model = MMRecModel(config)
    ends = (tokenizer.eos_id, tokenizer.end_id)
    banned = [i for i in tokenizer.control_ids.values() if i not in ends]
    banned += range(tokenizer.vocab_size, config.vocab_size)
    with torch.no_grad():
        model.embedding.weight[banned] *= 1000  # one of them is the likeliest by far wherever its sign is right
    drawn = []

    def record(*arguments: object) -> list[int]:
        drawn.extend(next_tokens(*arguments))
        return drawn[-1:]

    monkeypatch.setattr("mm_rec.inference.generate.next_tokens", record)
    list(generate(model, tokenizer, "a", Sampling(max_new_tokens=50, temperature=2), None))
    assert len(drawn) == 50 or drawn[-1] in ends
    assert not set(drawn) & set(banned)


@pytest.mark.parametrize("end", ["eos_id", "end_id"])
def test_generation_ends_at_eos_and_where_an_answer_ends(
    model: MMRecModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr("mm_rec.inference.generate.next_tokens", lambda *_: [getattr(tokenizer, end)])
    assert list(generate(model, tokenizer, "a", Sampling(), "text")) == []


def test_a_long_prompt_is_read_in_chunks_to_the_same_state(model: MMRecModel, tokenizer: Tokenizer) -> None:
    ids = torch.randint(7, tokenizer.vocab_size, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    logits, state = read_prompt(model, ids, "code")
    with torch.no_grad():
        whole, after = model(torch.tensor([ids]), None, "code")
    torch.testing.assert_close(logits, whole[0, -1], rtol=1e-4, atol=1e-5)
    assert int(state.position) == int(after.position) == 1300
