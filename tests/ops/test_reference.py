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
    delta_keys,
    delta_rule,
    feed_forward,
    gated_recurrence,
    linear_branch,
    linear_cross_entropy,
    mdi,
    memory_context,
    mix_memories,
    positions,
    readout,
    recurrence,
    relu_squared,
    rms_norm,
    scan,
    window_attention,
)

SHAPE = (2, 5, 6, 3)
MEMORY = (2, 9, 4, 2, 4, [0, 6], {(1, 3)})
F64 = torch.float64
SMALL_CASES: dict[str, tuple[Any, ...]] = {
    "scan": scan(SHAPE, True, F64),
    "recurrence": recurrence(SHAPE, True, F64),
    "mdi": mdi(SHAPE, True, F64),
    "readout": readout(SHAPE, F64),
    "rms_norm": rms_norm((3, 5), None, F64),
    "add_rms_norm": add_rms_norm((3, 5), F64),
    "relu_squared": relu_squared((3, 5), F64),
    "window_attention": window_attention(MEMORY, F64),
    "delta_keys": delta_keys(MEMORY, F64),
    "delta_rule": delta_rule(MEMORY, F64),
    "mix_memories": mix_memories(SHAPE, F64),
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
    q, k, v, _, base = window_attention((batch, time, window, heads, d, [0], set()), F64)
    out = reference.window_attention(q, k, v, positions(batch, time, [0], set()), base)
    index = torch.arange(window, window + time)
    q, k = (reference.rotate(x, index, base).transpose(1, 2) for x in (q, k[:, window:]))
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v[:, window:].transpose(1, 2), is_causal=True, scale=1.0
    )
    assert torch.allclose(out, want.transpose(1, 2))


def test_the_delta_rule_replaces_what_lies_under_a_key() -> None:
    """Two orthogonal keys, the first written twice: each then gives the value written last, without any decay."""
    key = torch.eye(4, dtype=F64)[[0, 1, 0]].view(1, 3, 1, 4)
    v = torch.randn(1, 3, 1, 4, dtype=F64)
    one, none = torch.ones(1, 3, 1, dtype=F64), torch.zeros(1, 3, 1, dtype=F64)
    _, state = reference.delta_rule(key, key, v, one, none, torch.arange(3)[None], torch.zeros(1, 1, 4, 4, dtype=F64))
    assert torch.allclose(state[0, 0, 0], v[0, 2, 0])
    assert torch.allclose(state[0, 0, 1], v[0, 1, 0])


def test_a_key_is_made_of_its_own_document_alone() -> None:
    k, taps, _ = delta_keys((1, 3, 8, 1, 4, [5], set()), F64)
    position = torch.tensor([[5, 0, 1]])
    key = reference.delta_keys(k, taps, position)
    assert torch.allclose(key[0, 1], reference.delta_keys(k[:, 8:10], taps[..., :1], torch.tensor([[0]]))[0, 0])
    assert not torch.allclose(key[0, 0], reference.delta_keys(k[:, 7:9], taps[..., :1], torch.tensor([[0]]))[0, 0])
