"""The definitions: their gradients in float64, and values that can be had another way."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.ops import reference

from .cases import (
    add_rms_norm,
    feed_forward,
    gated_recurrence,
    linear_branch,
    linear_cross_entropy,
    mdi,
    memory_attention,
    memory_context,
    mixed_keys,
    positions,
    readout,
    recurrence,
    relu_squared,
    rms_norm,
    scan,
)

SHAPE = (2, 5, 6, 3)
MEMORY = (2, 9, 4, 2, 4, [0, 6], {(1, 3)})
F64 = torch.float64


def _full_memory() -> tuple[Any, ...]:
    """A case without equal scores and empty slots, about which finite differences say nothing."""
    q, k, v, score, position, kept_k, kept_v, kept_score, base = memory_attention((2, 9, 4, 2, 4, [5, 6], set()), F64)
    generator = torch.Generator().manual_seed(0)
    score, kept_score = (-torch.rand(x.shape, generator=generator, dtype=F64) for x in (score, kept_score))
    return q, k, v, score, position, kept_k, kept_v, kept_score, base


SMALL_CASES: dict[str, tuple[Any, ...]] = {
    "scan": scan(SHAPE, True, F64),
    "recurrence": recurrence(SHAPE, True, F64),
    "mdi": mdi(SHAPE, True, F64),
    "readout": readout(SHAPE, F64),
    "rms_norm": rms_norm((3, 5), None, F64),
    "add_rms_norm": add_rms_norm((3, 5), F64),
    "relu_squared": relu_squared((3, 5), F64),
    "memory_attention": _full_memory(),
    "mixed_keys": mixed_keys(MEMORY, F64),
    "linear_cross_entropy": linear_cross_entropy(4, 5, 7, True, F64),
}
COMPOSITE_CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{
        f"gated_recurrence-{'loop' if loop else 'scan'}-{'with' if state else 'without'}-state": (
            "gated_recurrence",
            gated_recurrence(SHAPE, loop, state, F64),
        )
        for loop in (False, True)
        for state in (False, True)
    },
    "linear_branch-without-state": ("linear_branch", linear_branch((1, 5, 6, 3), False, F64)),
    "linear_branch-with-state": ("linear_branch", linear_branch(SHAPE, True, F64)),
    "feed_forward": ("feed_forward", feed_forward((2, 3, 5, 1), F64)),
    "memory_context": ("memory_context", memory_context(2, 3, 3, 4, 3, 5, F64)),
}
"""Ops that are made of others, with and without feedback, and a state and resets."""


def _leaf(x: Any) -> Any:
    """A float that learns; resets at a start and in the midst, which random ones of so few tokens may lack."""
    if not isinstance(x, Tensor) or x.dtype == torch.int64:
        return x
    if x.dtype == torch.bool:
        reset = torch.zeros_like(x)
        reset[0, 3] = reset[1, 0] = True
        return reset
    return x.clone().requires_grad_()


@pytest.mark.parametrize("op", SMALL_CASES)
def test_gradcheck(op: str) -> None:
    arguments = [_leaf(x) for x in SMALL_CASES[op]]
    assert torch.autograd.gradcheck(getattr(reference, op), arguments)


@pytest.mark.parametrize("module", [reference, ops], ids=["definition", "parts"])
@pytest.mark.parametrize("case", COMPOSITE_CASES)
def test_gradcheck_of_composites(case: str, module: ModuleType) -> None:
    """Of the definition, and of the public op, which puts its parts together by itself for float64."""
    op, arguments = COMPOSITE_CASES[case]
    with ops.use_backend("reference"):
        assert torch.autograd.gradcheck(getattr(module, op), [_leaf(x) for x in arguments])


def test_scan_of_zeros_is_a_cumulative_product() -> None:
    a = torch.rand(2, 7, 3, dtype=F64)
    assert torch.allclose(reference.scan(a, torch.zeros_like(a), torch.ones(2, 3, dtype=F64)), a.cumprod(1))


def test_recurrence_without_feedback_is_a_scan() -> None:
    z, u, gamma, w_g, h0, reset = recurrence(SHAPE, True, F64)
    h, h_last = reference.recurrence(z, u, gamma, torch.zeros_like(w_g), h0, reset)
    assert torch.allclose(h, reference.scan(gamma, torch.sigmoid(u) * z, h0, reset))
    assert torch.equal(h_last, h[:, -1])


def test_a_window_as_wide_as_the_chunk_is_causal_attention() -> None:
    batch, time, window, heads, d = 2, 6, 8, 2, 4
    q, k, v, score, _, *kept, base = memory_attention((batch, time, window, heads, d, [0], set()), F64)
    out, *_ = reference.memory_attention(q, k, v, score, positions(batch, time, [0], set()), *kept, base)
    index = torch.arange(window, window + time)
    q, k = (reference.rotate(x, index, base).transpose(1, 2) for x in (q, k[:, window:]))
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v[:, window:].transpose(1, 2), is_causal=True, scale=1.0
    )
    assert torch.allclose(out, want.transpose(1, 2))


def test_what_is_kept_are_the_highest_scores_of_the_document() -> None:
    """Slots are found token by token; what they hold has to be the highest scores among all that left the window."""
    window, slots, time = 4, 3, 40
    score = torch.randn(1, window + time, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    position = torch.arange(time)[None] % 25
    nothing = torch.full((1, 2, slots), -torch.inf, dtype=F64)
    _, held = reference.retain(score, position, nothing)
    for head in range(2):
        left = score[0, window + 25 : time, head]  # of the second document
        want = left.topk(slots).indices + window + 25 + slots
        assert held[0, head, -1].sort().values.tolist() == want.sort().values.tolist()


def test_of_equal_scores_the_first_stays() -> None:
    score, position = torch.zeros(1, 12, 1), torch.arange(10)[None]
    slot, held = reference.retain(score, position, torch.full((1, 1, 3), -torch.inf))
    assert slot.flatten().tolist() == [-1, -1, 0, 1, 2, -1, -1, -1, -1, -1]
    assert held[0, 0].tolist() == [[-1, -1, -1], [3 + 2, 3 + 3, 3 + 4]]


@pytest.mark.parametrize("cut", [1, 7, 12, 29])
def test_two_chunks_are_one(cut: int) -> None:
    """What is kept goes from one chunk to the next, and so do gradients."""
    case = (2, 30, 5, 2, 4, [0, 9], {(1, 11)})
    arguments = [_leaf(x) for x in memory_attention(case, F64)]
    q, k, v, score, position, *kept, base = arguments
    out, *after = reference.memory_attention(*arguments)
    window, parts = 5, []
    for t, end in ((0, cut), (cut, 30)):
        here, *kept = reference.memory_attention(
            q[:, t:end], *(x[:, t : window + end] for x in (k, v, score)), position[:, t:end], *kept, base
        )
        parts.append(here)
    assert torch.allclose(torch.cat(parts, 1), out)
    for x, y in zip(kept, after, strict=True):
        assert torch.equal(x, y)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    whole = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    for x, y in zip(torch.autograd.grad(torch.cat(parts, 1).square().sum(), leaves), whole, strict=True):
        assert torch.allclose(x, y)


def test_a_key_is_made_of_its_own_document_alone() -> None:
    k, taps, _ = mixed_keys((1, 3, 8, 1, 4, [5], set()), F64)
    position = torch.tensor([[5, 0, 1]])
    key = reference.mixed_keys(k, taps, position)
    assert torch.allclose(key[0, 1], reference.mixed_keys(k[:, 8:10], taps[..., :1], torch.tensor([[0]]))[0, 0])
    assert not torch.allclose(key[0, 0], reference.mixed_keys(k[:, 7:9], taps[..., :1], torch.tensor([[0]]))[0, 0])
