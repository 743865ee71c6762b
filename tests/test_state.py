"""The state of a model: of fixed size, flattened and back."""

import pytest
import torch

from mm_rec.config import ModelConfig
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.state import detach_state, flatten_state, initial_state, map_state, unflatten_state

CONFIG = ModelConfig(vocab_size=64, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)


def tokens(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, time), generator=torch.Generator().manual_seed(seed))


def test_state_has_fixed_size_and_survives_flattening() -> None:
    model = MMRecModel(CONFIG)
    _, short = model(tokens(2, 5))
    _, long = model(tokens(2, 300))
    flat = flatten_state(long)
    assert {k: v.shape for k, v in flatten_state(short).items()} == {k: v.shape for k, v in flat.items()}
    restored = unflatten_state(flat, CONFIG)
    following = tokens(2, 9, seed=4)
    assert torch.equal(model(following, restored)[0], model(following, long)[0])
    assert not any(t.requires_grad for t in flatten_state(detach_state(long)).values())
    doubled = map_state(long, lambda t: t * 2)
    assert torch.equal(doubled.position, long.position * 2)


def test_state_that_does_not_fit_is_refused() -> None:
    flat = flatten_state(MMRecModel(CONFIG).initial_state(1))
    with pytest.raises(ValueError, match="does not fit"):
        unflatten_state({name: t for name, t in flat.items() if not name.endswith("kept_k")}, CONFIG)
    with pytest.raises(ValueError, match="does not fit"):
        unflatten_state({name: t[..., :1] for name, t in flat.items()}, CONFIG)
    with pytest.raises(ValueError, match="not a state"):
        unflatten_state({}, CONFIG)
    with pytest.raises(ValueError, match="not a state"):
        unflatten_state({name: t for name, t in flat.items() if name != "position"}, CONFIG)
    with pytest.raises(ValueError, match=r"experts\.text\.blocks\.3\.h is missing or too many"):
        unflatten_state({**flat, "experts.text.blocks.3.h": flat["experts.text.blocks.0.h"]}, CONFIG)
    with pytest.raises(ValueError, match=r"experts\.text\.blocks\.0\.h is \(1, 32\)"):
        unflatten_state({**flat, "position": torch.zeros(2, dtype=torch.int64)}, CONFIG)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_keeps_its_types(backend: str, precision: str) -> None:
    """A session is saved with these types and loaded with those of the empty state."""
    model = MMRecModel(CONFIG, use_native=backend == "native")
    apply_precision(model, precision)
    with torch.no_grad():
        _, state = model(tokens(1, 60))
    before = {name: tensor.dtype for name, tensor in flatten_state(model.initial_state(1)).items()}
    assert {name: tensor.dtype for name, tensor in flatten_state(state).items()} == before
    assert (torch.bfloat16 in before.values()) == (precision == "bf16")


def test_one_expert_alone_is_a_state_too() -> None:
    state = MMRecModel(CONFIG).initial_state(2, "code")
    restored = unflatten_state(flatten_state(state), CONFIG)
    assert list(restored.experts) == ["code"]
    assert [block.memory is None for block in restored.experts["code"]] == [
        not CONFIG.is_memory_block(index) for index in range(CONFIG.n_layers)
    ]


def test_mapping_goes_in_the_order_of_the_names() -> None:
    _, state = MMRecModel(CONFIG)(tokens(2, 30))
    seen: list[torch.Tensor] = []
    map_state(state, lambda t: seen.append(t) or t)
    assert all(torch.equal(a, b) for a, b in zip(seen, flatten_state(state).values(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_what_lasts_is_never_narrower_than_float32(dtype: torch.dtype, kept: torch.dtype) -> None:
    for block in initial_state(CONFIG, 1, ("text",), dtype=dtype).experts["text"]:
        assert block.h.dtype == kept
        if block.memory is not None:
            assert block.memory.k.dtype == block.memory.v.dtype == dtype
            assert block.memory.kept_k.dtype == block.memory.kept_v.dtype == dtype
            assert block.memory.score.dtype == block.memory.kept_score.dtype == kept
