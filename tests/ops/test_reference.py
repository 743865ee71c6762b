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
    memory_context,
    memory_read,
    memory_update,
    positions,
    readout,
    recurrence,
    relu_squared,
    rms_norm,
    scan,
)

SHAPE = (2, 5, 6, 3)
MEMORY = (2, 9, 4, 2, 4, 3, [0, 6], {(1, 3)})
F64 = torch.float64
SMALL_CASES: dict[str, tuple[Any, ...]] = {
    "scan": scan(SHAPE, True, F64),
    "recurrence": recurrence(SHAPE, True, F64),
    "mdi": mdi(SHAPE, True, F64),
    "readout": readout(SHAPE, F64),
    "rms_norm": rms_norm((3, 5), None, F64),
    "add_rms_norm": add_rms_norm((3, 5), F64),
    "relu_squared": relu_squared((3, 5), F64),
    "memory_update": memory_update(MEMORY, F64),
    "memory_read": memory_read(MEMORY, F64),
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
    "memory_context": ("memory_context", memory_context(2, 3, 4, 3, 5, F64)),
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
    if op == "memory_read":  # at mass 0 a slot jumps from masked to read
        arguments[5] = (SMALL_CASES[op][5] + 0.1).requires_grad_()
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


def test_reading_an_empty_memory_is_causal_attention() -> None:
    batch, time, window, heads, d = 2, 6, 8, 2, 4
    q, k, v, key, value, mass, _, base = memory_read((batch, time, window, heads, d, 3, [0], set()), F64)
    out = reference.memory_read(q, k, v, key, value, mass * 0, positions(batch, time, [0], set()), base)
    index = torch.arange(window, window + time)
    q, k = (reference.rotate(x, index, base).transpose(1, 2) for x in (q, k[:, window:]))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v[:, window:].transpose(1, 2), is_causal=True)
    assert torch.allclose(out, want.transpose(1, 2))


def test_mass_of_a_slot_counts_what_was_written() -> None:
    """With rate 1 and one slot, a write replaces the memory by the sum of what it wrote, and mass counts the tokens."""
    batch, time, window = 1, 9, 8
    k, v, address, _, position, key, value, mass = memory_update((batch, time, window, 1, 4, 1, [0], set()), F64)
    _, new_value, new_mass = reference.memory_update(
        k, v, address, torch.ones(1, dtype=F64), position, key, value, mass
    )
    assert torch.equal(new_mass[0, -1], torch.full((1, 1), window / 2, dtype=F64))
    assert torch.allclose(new_value[0, -1, 0, 0], v[0, window : window + window // 2, 0].sum(0))
