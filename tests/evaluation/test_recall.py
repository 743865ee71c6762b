"""Recall: the measure against models whose memory is known."""

import pytest
import torch
from torch import Tensor, nn

from mm_rec.config import ModelConfig
from mm_rec.evaluation.recall import Recall, _continuation_nats, _read, associative_recall, passkey
from mm_rec.model import LossOutput, MMRecModel
from mm_rec.state import ModelState
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The pass key is 12345. The grass is green. What is the pass key?"] * 3, 320)


class Copier(nn.Module):
    """Has read everything for ``reach`` tokens back, and says what came after the last place of the last token there.

    The state's position counts tokens and the state's ring holds them, one row of ids.
    """

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.embedding = nn.Embedding(1, 1)

    def initial_state(self, rows: int, domain: str | None) -> ModelState:
        return ModelState(torch.zeros(rows, 0, dtype=torch.int64), {})

    def forward(self, tokens: Tensor, state: ModelState, domain=None, reset=None, *, targets=None, weight=None):
        past = state.position
        rows, time = tokens.shape
        logits = torch.zeros(rows, time, CONFIG.vocab_size)
        seen = torch.cat([past, tokens], dim=1)
        for row in range(rows):
            for step in range(time):
                here = past.shape[1] + step
                for at in range(max(0, here - self.reach), here):
                    if seen[row, at] == seen[row, here]:
                        logits[row, step, seen[row, at + 1]] += 1 + at / 1e4
        after = ModelState(seen, {})
        if targets is None:
            return logits, after
        nll = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * weight
        return LossOutput(nll.sum(), nll), after


@pytest.mark.parametrize("measure", [associative_recall, passkey])
def test_what_is_in_reach_is_recalled_and_nothing_else(measure, tokenizer: Tokenizer) -> None:
    near, far = measure(Copier(150), tokenizer, None, [0, 300], trials=6)
    assert (near.distance, near.accuracy) == (0, 1.0)
    assert far.distance == 300
    assert far.accuracy < 0.5
    assert near.chance in (1 / 8, 1 / 10)


@pytest.mark.parametrize("measure", [associative_recall, passkey])
def test_a_new_model_guesses_and_the_same_seed_gives_the_same(measure, tokenizer: Tokenizer) -> None:
    model = MMRecModel(CONFIG, seed=1)
    first, second = (measure(model, tokenizer, "text", [0, 40], trials=8, seed=3) for _ in range(2))
    assert first == second
    assert all(isinstance(one, Recall) and abs(one.accuracy - one.chance) < 0.4 for one in first)


def test_rows_of_any_lengths_are_read_side_by_side(tokenizer: Tokenizer) -> None:
    model = MMRecModel(CONFIG, seed=1)
    rows = [tokenizer.encode("The grass"), tokenizer.encode("The pass key is green. " * 30)]
    with torch.no_grad():
        state = _read(model, rows, None, lambda: None)
        nats = _continuation_nats(model, state, 9, [[10, 11], [12]], None)
        for index, (row, continuation) in enumerate(zip(rows, ([10, 11], [12]), strict=True)):
            logits, _ = model(torch.tensor([[*row, 9, *continuation[:-1]]]))
            lines = logits[0, -len(continuation) :].log_softmax(-1)
            expected = -sum(line[token] for line, token in zip(lines, continuation, strict=True))
            torch.testing.assert_close(nats[index], expected, rtol=1e-4, atol=1e-4)
