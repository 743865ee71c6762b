"""Token by token in one native call: the same as the forward pass, whatever the batch, the threads and the history."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import CONFIG, build, relative_error
from mm_rec import ops
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.cpp.build import LEVELS
from mm_rec.inference import decode
from mm_rec.inference.decode import compressed_matrices, find_decoder, use_compressed
from mm_rec.inference.quantize import pack_matrices, quantize_int8
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.ops.inference import pack_weights, quantize_rows
from mm_rec.optim import AdamW
from mm_rec.state import ModelState, flatten_state, map_state, unflatten_state

pytestmark = pytest.mark.native
TIME = 75  # of a window of 16


LOWER_LEVELS = [pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[:-1]]


@pytest.fixture(autouse=True, params=["best", *LOWER_LEVELS])
def at_every_level(request: pytest.FixtureRequest, load_level: Callable[[str], None]) -> None:
    """Every test runs at the level of this run, and at all below it."""
    if request.param == "best":
        return
    level = ops.status()["cpu"].level
    assert level is not None
    if LEVELS.index(request.param) >= LEVELS.index(level):
        pytest.skip("this run is at that level, or the processor stops before")
    load_level(request.param)


@pytest.fixture(autouse=True)
def one_thread_and_no_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def model_of(precision: str = "fp32") -> MMRecModel:
    model = build(torch.float32)
    apply_precision(model, precision)
    return model


def tokens_of(rows: int, time: int = TIME, vocabulary: int = CONFIG.vocab_size) -> Tensor:
    return torch.randint(vocabulary, (rows, time), generator=torch.Generator().manual_seed(rows))


def step_through(
    model: MMRecModel, tokens: Tensor, state: ModelState, domain: str | None, donate: bool = False
) -> tuple[Tensor, ModelState]:
    """Logits (B, T, V) of single steps, and the state after them."""
    logits = []
    for column in tokens.unbind(1):
        one, state = decode.step(model, column, state, domain, donate=donate)
        logits.append(one)
    return torch.stack(logits, 1), state


def exact(model: MMRecModel) -> MMRecModel:
    """The same weights in float64, which only the reference computes with."""
    return copy.deepcopy(model).double()


def worst_state_error(actual: ModelState, expected: ModelState) -> float:
    found, wanted = flatten_state(actual), flatten_state(expected)
    assert found.keys() == wanted.keys()
    return max(relative_error(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("domain", ["code", None], ids=["one-domain", "fused"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_float32_agrees_with_forward(rows: int, domain: str | None) -> None:
    model, tokens = model_of(), tokens_of(rows)
    assert find_decoder(model, domain) is not None
    expected, after = exact(model)(tokens, None, domain)
    logits, state = step_through(model, tokens, model.initial_state(rows, domain), domain)
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected) < 3e-6
    assert worst_state_error(state, after) < 1e-5
    assert state.position.tolist() == [TIME] * rows


@pytest.mark.parametrize("domain", ["code", None], ids=["one-domain", "fused"])
def test_bfloat16_is_no_further_from_the_truth_than_forward(domain: str | None) -> None:
    model, tokens = model_of("bf16"), tokens_of(3)
    expected, _ = exact(model)(tokens, None, domain)
    forward, after = model(tokens, None, domain)
    logits, state = step_through(model, tokens, model.initial_state(3, domain), domain)

    def error(actual: Tensor) -> float:
        return float((actual.double() - expected).square().mean().sqrt() / expected.std())

    assert error(logits) < error(forward)
    assert [t.dtype for t in flatten_state(state).values()] == [t.dtype for t in flatten_state(after).values()]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_across_the_window(preset: str) -> None:
    """Shapes as they are, vocabulary aside: from position W on, the first token is in the long-term memory alone."""
    config = ModelConfig.preset(preset, vocab_size=64, experts=("text",))
    model = MMRecModel(config)
    start = config.window - 2
    tokens = tokens_of(2, start + 4)
    _, state = model(tokens[:, :start], None, "text")
    expected, after = model(tokens[:, start:], state, "text")
    logits, stepped = step_through(model, tokens[:, start:], state, "text")
    assert relative_error(logits, expected) < 1e-5
    assert worst_state_error(stepped, after) < 1e-4


def test_rows_at_different_places_of_their_documents() -> None:
    model, tokens = model_of(), tokens_of(3, 40)
    reset = torch.zeros(3, 40, dtype=torch.bool)
    reset[1, 20] = reset[2, 37] = True
    truth = exact(model)
    _, state = model(tokens, None, "text", reset)
    _, wide = truth(tokens, None, "text", reset)
    more = tokens_of(3, 30)
    expected, _ = truth(more, wide, "text")
    logits, _ = step_through(model, more, state, "text")
    assert relative_error(logits, expected) < 3e-6


@pytest.mark.parametrize("window", [3, 16])
def test_a_new_document_begins_with_empty_memories(window: int) -> None:
    model = MMRecModel(dataclasses.replace(CONFIG, window=window))
    _, state = model(tokens_of(3, 30), None, "text")
    state = state._replace(position=torch.tensor([0, 30, 0]))
    state = map_state(
        state, lambda x: x if x.dim() != 2 else x * (state.position > 0)[:, None]
    )  # h is cleared by reset
    more = tokens_of(3, 12)
    expected, _ = exact(model)(more, map_state(state, lambda x: x.double() if x.is_floating_point() else x), "text")
    logits, _ = step_through(model, more, state, "text")
    assert relative_error(logits, expected) < 3e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("domain", ["text", None], ids=["one-domain", "fused"])
def test_neither_batch_nor_threads_change_a_bit(precision: str, domain: str | None) -> None:
    model, tokens = model_of("fp32" if precision == "fp32" else "bf16"), tokens_of(7, 40)
    if precision == "int8":
        quantize_int8(model)
    together, state = step_through(model, tokens, model.initial_state(7, domain), domain)
    for threads, rows in ((1, [3]), (2, [0, 1, 2, 3, 4]), (3, [6, 3]), (5, list(range(7)))):
        torch.set_num_threads(threads)
        logits, after = step_through(model, tokens[rows], model.initial_state(len(rows), domain), domain)
        assert torch.equal(logits, together[rows])
        for name, tensor in flatten_state(after).items():
            assert torch.equal(tensor, flatten_state(state)[name][rows]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_state_goes_on_bitwise_from_wherever_it_was_kept(precision: str) -> None:
    model, tokens = model_of(precision), tokens_of(2)
    whole, end = step_through(model, tokens, model.initial_state(2), None)
    for stop in (1, 15, 16, 24, 33):
        _, state = step_through(model, tokens[:, :stop], model.initial_state(2), None)
        saved = {name: tensor.clone() for name, tensor in flatten_state(state).items()}
        logits, after = step_through(model, tokens[:, stop:], unflatten_state(saved, CONFIG), None)
        assert torch.equal(logits, whole[:, stop:])
        assert all(torch.equal(a, b) for a, b in zip(*map(_values, (after, end)), strict=True))


def _values(state: ModelState) -> list[Tensor]:
    return list(flatten_state(state).values())


def test_earlier_states_stay_as_they_were() -> None:
    model, tokens = model_of(), tokens_of(2)
    state = model.initial_state(2, "text")
    kept: list[tuple[ModelState, ModelState]] = []
    for column in tokens.unbind(1):
        kept.append((state, map_state(state, Tensor.clone)))
        _, state = decode.step(model, column, state, "text")
    for now, then in kept:
        assert all(torch.equal(a, b) for a, b in zip(_values(now), _values(then), strict=True))
    # Every one of them can be gone on from, along another way.
    other = tokens.flip(1)
    for place in (0, 3, 16, 30, 31, 74):
        expected, _ = step_through(model, other, kept[place][1], "text")
        assert torch.equal(step_through(model, other, kept[place][0], "text")[0], expected)


def test_donating_changes_nothing_but_what_was_donated() -> None:
    model, tokens = model_of(), tokens_of(2)
    expected, end = step_through(model, tokens, model.initial_state(2, "text"), "text")
    logits, after = step_through(model, tokens, model.initial_state(2, "text"), "text", donate=True)
    assert torch.equal(logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(_values(after), _values(end), strict=True))
    # What an earlier state holds is not written over, even if the state at hand is donated.
    _, first = step_through(model, tokens[:, :20], model.initial_state(2, "text"), "text")
    _, second = step_through(model, tokens[:, 20:22], first, "text")
    before = [value.clone() for value in _values(first)]
    step_through(model, tokens[:, 22:40], second, "text", donate=True)
    assert all(torch.equal(a, b) for a, b in zip(_values(first), before, strict=True))


def test_weights_are_read_where_they_are() -> None:
    model, column = model_of(), tokens_of(2)[:, 0]
    state = model.initial_state(2, "text")
    before, _ = decode.step(model, column, state, "text")
    twin = copy.deepcopy(model)
    model.experts["text"].blocks[0].ffn_down.mul_(2)  # in place, as an optimizer does
    changed, _ = decode.step(model, column, state, "text")
    assert not torch.equal(changed, before)
    assert torch.equal(decode.step(twin, column, state, "text")[0], before)
    model.load_state_dict(twin.state_dict(), assign=True)
    assert torch.equal(decode.step(model, column, state, "text")[0], before)
    apply_precision(model, "bf16")
    rounded, _ = decode.step(model, column, model.initial_state(2, "text"), "text")
    torch.testing.assert_close(rounded, before, rtol=0.1, atol=0.1)
    assert not torch.equal(rounded, before)


def test_rounding_to_int8_is_within_half_a_step_of_each_row() -> None:
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [0], [50], [1]]
    )
    matrix = quantize_rows(weight)
    assert matrix.data.dtype == torch.int8
    assert ((matrix.dequantize() - weight).abs() <= matrix.scale[:, None] * 0.5001).all()
    assert matrix.data.abs().amax(1).tolist() == [127, 127, 0, 127, 127]


@pytest.mark.parametrize("domain", ["text", None], ids=["one-domain", "fused"])
def test_int8_steps_are_the_forward_pass_of_the_rounded_weights(domain: str | None) -> None:
    model, tokens = model_of(), tokens_of(3)
    whole, _ = model(tokens, None, domain)
    quantize_int8(model)
    assert not any(p.requires_grad for p in model.parameters())
    expected, _ = exact(model)(tokens, None, domain)
    logits, _ = step_through(model, tokens, model.initial_state(3, domain), domain)
    assert relative_error(logits, expected) < 5e-6
    assert 1e-4 < relative_error(logits, whole) < 0.1


def test_int8_beside_bfloat16_activations() -> None:
    model, tokens = model_of("bf16"), tokens_of(3)
    quantize_int8(model)
    expected, _ = exact(model)(tokens, None, "text")
    forward, _ = model(tokens, None, "text")
    logits, _ = step_through(model, tokens, model.initial_state(3, "text"), "text")
    assert relative_error(logits, expected) < 1.5 * relative_error(forward, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_of_an_int8_model_steps_with_the_rounded_parameters(precision: str) -> None:
    model, tokens = model_of(precision), tokens_of(3)
    quantize_int8(model)
    twin = copy.deepcopy(model)
    assert compressed_matrices(model)
    assert not compressed_matrices(twin)
    expected, _ = exact(model)(tokens, None, "text")
    forward, _ = model(tokens, None, "text")
    logits, _ = step_through(twin, tokens, twin.initial_state(3, "text"), "text")
    assert relative_error(logits, expected) < max(5e-6, 1.5 * relative_error(forward, expected))
    quantize_int8(twin)
    assert set(compressed_matrices(twin)) == set(compressed_matrices(model))


def test_nothing_is_kept_of_a_model_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(monkeypatch)
    pack_matrices(model)
    decode.step(model, tokens_of(1)[:, 0], model.initial_state(1), None)
    kept = [weakref.ref(find_decoder(model, None)), *map(weakref.ref, compressed_matrices(model).values())]
    assert len(kept) > 1
    assert all(reference() is not None for reference in kept)
    del model
    gc.collect()
    assert all(reference() is None for reference in kept)


def packed_model(monkeypatch: pytest.MonkeyPatch) -> MMRecModel:
    """Wide enough to be packed, at any level of the kernels."""
    monkeypatch.setattr("mm_rec.inference.quantize.PACKED_LEVELS", LEVELS)
    config = ModelConfig(
        vocab_size=256, d_model=256, n_heads=4, n_layers=2, d_ff=400, gate_every=2, window=16, kept_pairs=6
    )
    model = MMRecModel(config)
    apply_precision(model, "bf16")
    block = model.experts["text"].blocks[0]
    block.in_proj[5], block.in_proj[6, 9::50], block.ffn_up[1, 130:] = 0, 1e-30, 8  # 6 cannot be packed
    return model


@pytest.mark.parametrize("domain", ["text", None], ids=["one-domain", "fused"])
@pytest.mark.parametrize("rows", [1, 7, 11])
def test_packed_matrices_change_no_bit(monkeypatch: pytest.MonkeyPatch, rows: int, domain: str | None) -> None:
    model = packed_model(monkeypatch)
    tokens = tokens_of(rows, 20)
    expected, _ = step_through(model, tokens, model.initial_state(rows, domain), domain)
    pack_matrices(model)
    compressed = compressed_matrices(model)
    assert {"embedding.weight", "experts.text.blocks.0.ffn_down", "experts.code.blocks.1.qkv_proj"} <= set(compressed)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        logits, _ = step_through(model, tokens, model.initial_state(rows, domain), domain)
        assert torch.equal(logits, expected)
    compressed["experts.text.blocks.0.ffn_down"].data.zero_()
    logits, _ = step_through(model, tokens, model.initial_state(rows, domain), domain)
    if rows != 7:  # between the numbers of rows at which levels begin to read the matrix itself
        assert torch.equal(logits, expected) == (rows == 11)


def packed_step(monkeypatch: pytest.MonkeyPatch) -> tuple[MMRecModel, Callable[[], Tensor]]:
    """A packed model, and the logits of its next step."""
    model, column = packed_model(monkeypatch), tokens_of(2)[:, 0]
    pack_matrices(model)
    state = model.initial_state(2, "text")
    return model, lambda: decode.step(model, column, state, "text")[0]


def test_training_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's kernel writes weights by their addresses."""
    model, step = packed_step(monkeypatch)
    before = step()
    weight = model.experts["text"].blocks[0].ffn_down
    weight.grad = torch.ones_like(weight)
    AdamW([("ffn_down", weight)]).step(lr=0.1, max_norm=0)
    changed = step()
    assert not torch.equal(changed, before)
    use_compressed(model, {})
    assert torch.equal(step(), changed)


def test_a_packed_matrix_that_changes_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = packed_step(monkeypatch)
    before = step()
    weight = model.experts["text"].blocks[0].ffn_down
    kept = weight.clone()
    weight.mul_(2)
    changed = step()
    assert not torch.equal(changed, before)
    weight.data = kept
    assert torch.equal(step(), before)
    model.experts["text"].blocks[0].ffn_down = torch.nn.Parameter(2 * kept)
    assert torch.equal(step(), changed)
    pack_matrices(model)
    assert torch.equal(step(), changed)


def test_packing_takes_any_weights_and_leaves_what_gains_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 512, generator=generator).bfloat16()
    packed = pack_weights({"weight": weight})["weight"]
    assert packed.holds(weight)
    assert packed.data.nbytes < 0.77 * weight.nbytes
    twice = pack_weights({"a": weight, "b": weight[:19], "c": weight.float(), "d": weight[:, :100].contiguous()})
    assert list(twice) == ["a", "b"]
    assert torch.equal(twice["a"].data, packed.data)
    assert torch.equal(twice["b"].data, packed.data[: len(twice["b"].data)])
    weight[:, ::100] = 1e-30  # a weight too small for its chunk in nearly every one
    assert not packed.holds(weight)
    assert not pack_weights({"weight": weight})


def test_without_the_native_back_end_the_forward_pass_steps() -> None:
    tokens = tokens_of(2, 20)
    for model in (MMRecModel(CONFIG, use_native=False), MMRecModel(CONFIG).double()):
        assert find_decoder(model, "text") is None
        expected, _ = model(tokens, None, "text")
        logits, _ = step_through(model, tokens, model.initial_state(2, "text"), "text")
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    model = model_of()
    with ops.use_backend("reference"):
        assert find_decoder(model, "text") is None
    assert find_decoder(model.to(torch.bfloat16), "text") is None  # biases too: no kernel has that


def test_what_cannot_be_read_is_an_error() -> None:
    model = model_of()
    state = model.initial_state(2, "text")
    with pytest.raises(IndexError, match="vocabulary of 64"):
        decode.step(model, torch.tensor([0, 64]), state, "text")
    with pytest.raises(ValueError, match="3 tokens do not fit a state of 2 rows"):
        decode.step(model, torch.tensor([0, 1, 2]), state, "text")
    with pytest.raises(ValueError, match="negative"):
        decode.step(model, torch.tensor([0, 1]), state._replace(position=torch.tensor([0, -1])), "text")
    with pytest.raises(ValueError, match="not code"):
        decode.step(model, torch.tensor([0, 1]), state, "code")
