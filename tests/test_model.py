"""The model as a whole: sizes, causality, what gets gradients, state."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mm_rec.config import PRESETS, ModelConfig
from mm_rec.inference import decode
from mm_rec.model import MMRecModel, _TiedEmbedding, document_positions

CONFIG = ModelConfig(vocab_size=64, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)


def tokens(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("preset", "total", "one_domain"), [("tiny", 0.284e6, 0.157e6), ("small", 13.2e6, 7.6e6), ("100m", 95.4e6, 55.8e6)]
)
def test_preset_sizes(preset: str, total: float, one_domain: float) -> None:
    with torch.device("meta"):
        model = MMRecModel(PRESETS[preset])
    expert = sum(p.numel() for p in model.experts["text"].parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=0.01)
    assert expert + model.embedding.weight.numel() == pytest.approx(one_domain, rel=0.01)


@pytest.mark.parametrize("domain", ["code", None])
def test_no_position_sees_its_future(domain: str | None) -> None:
    model = MMRecModel(CONFIG, seed=1)
    before = tokens(1, 90)
    reference, _ = model(before, None, domain)
    for changed in (0, 1, 17, 31, 32, 64, 89):  # inside a window, past it, at the last token
        after = before.clone()
        after[0, changed] = (after[0, changed] + 1) % CONFIG.vocab_size
        logits, _ = model(after, None, domain)
        assert torch.equal(logits[:, :changed], reference[:, :changed])
        assert not torch.equal(logits[:, changed], reference[:, changed])


def test_memory_reaches_past_the_window() -> None:
    """With the recurrence cut off, a token far behind the window still reaches the output as a kept pair."""
    model = MMRecModel(dataclasses.replace(CONFIG, kept_pairs=80), seed=1)
    with torch.no_grad():
        for block in model.experts["text"].blocks:
            block.out_proj.zero_()
            if block.is_memory_block:
                block.attention_out.normal_(0, 1, generator=torch.Generator().manual_seed(5))
    first = tokens(1, 80)
    second = first.clone()
    second[0, 3] = (second[0, 3] + 1) % CONFIG.vocab_size
    difference = (model(first, None, "text")[0] - model(second, None, "text")[0]).abs().amax(dim=(0, 2))
    assert difference[3:19].min() > 0  # the window of 16
    assert difference[79] > 1e-7  # 76 tokens later


def test_one_domain_leaves_the_other_expert_alone() -> None:
    model = MMRecModel(CONFIG)
    batch = tokens(2, 20)
    output, state = model(batch, None, "text", targets=batch)
    output.loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith(("experts.code.", "fusion.")) for name in without)
    assert any(name.startswith("experts.code.") for name in without)
    assert list(state.experts) == ["text"]
    model(batch, None, None, targets=batch)[0].loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_fusion_starts_as_average_and_can_become_one_expert() -> None:
    model = MMRecModel(CONFIG)
    batch = tokens(1, 30)
    text, code = (model(batch, None, name)[0] for name in ("text", "code"))
    fused, _ = model(batch)
    torch.testing.assert_close(fused, (text + code) / 2, rtol=1e-4, atol=1e-5)


def test_loss_is_the_weighted_negative_log_likelihood() -> None:
    model = MMRecModel(CONFIG)
    batch = tokens(2, 21)
    weight = torch.rand(2, 20)
    weight[0, :5] = 0
    logits, _ = model(batch[:, :-1], None, "text")
    output, _ = model(batch[:, :-1], None, "text", targets=batch[:, 1:], weight=weight)
    nll = -logits.log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
    torch.testing.assert_close(output.loss, (weight * nll).sum())
    torch.testing.assert_close(output.nll, torch.where(weight != 0, nll, 0.0))


def test_gradient_checkpointing_changes_nothing() -> None:
    batch = tokens(2, 40)
    gradients = []
    for flag in (False, True):
        model = MMRecModel(CONFIG)
        model.gradient_checkpointing = flag
        model(batch, targets=batch)[0].loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, checkpointed, rtol=1e-6, atol=1e-8)


def test_step_continues_a_sequence() -> None:
    model = MMRecModel(CONFIG)
    batch = tokens(3, 50)
    expected, _ = model(batch, None, "code")
    _, state = model(batch[:, :-1], None, "code")
    logits, state = decode.step(model, batch[:, -1], state, "code")
    torch.testing.assert_close(logits, expected[:, -1], rtol=1e-5, atol=1e-5)
    assert state.position.tolist() == [50, 50, 50]


def test_wrong_domain_or_state_is_refused() -> None:
    model = MMRecModel(CONFIG)
    with pytest.raises(ValueError, match="unknown domain 'music'"):
        model(tokens(1, 4), None, "music")
    _, state = model(tokens(1, 4), None, "text")
    with pytest.raises(ValueError, match="not code"):
        model(tokens(1, 4), state, "code")


def test_document_positions() -> None:
    reset = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    start = torch.tensor([7, 3])
    assert document_positions(start, reset, 5).tolist() == [[7, 8, 0, 1, 0], [3, 4, 5, 6, 7]]
    assert document_positions(start, None, 2).tolist() == [[7, 8], [3, 4]]


def test_same_seed_same_weights() -> None:
    first, second, third = (MMRecModel(CONFIG, seed=s).embedding.weight for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(("of_rows", "of_head"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_gradients_of_rows_and_head_add_up(of_rows: float, of_head: float) -> None:
    weight = torch.randn(12, 4, requires_grad=True)
    ids = torch.tensor([[3, 7, 3], [0, 3, 11]])
    above, above_head = torch.randn(2, 3, 4), torch.randn(12, 4)

    def gradient(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        parts = [(rows * above).sum()] * (of_rows > 0) + [(head * above_head).sum()] * (of_head > 0)
        return torch.autograd.grad(sum(parts), weight)[0]

    got = gradient(*_TiedEmbedding.apply(weight, ids))
    torch.testing.assert_close(got, gradient(F.embedding(ids, weight), weight))
