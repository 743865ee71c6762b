"""Branches as one op against the same products and ops one by one, and the kernel inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec import ops
from mm_rec.ops.cpu import sequence

from .cases import CASES, TIME_SHAPES, Builder, Random
from .compare import assert_agree, run

pytestmark = pytest.mark.native
ALL = [
    pytest.param(op, build, id=f"{op}-{name}")
    for op in ("linear_branch", "feed_forward")
    for name, build in CASES[op].items()
]


def linear_branch_in_parts(
    n: Tensor,
    in_proj: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    out_proj: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor]:
    projected = F.linear(n, in_proj)
    y, h_last = ops.gated_recurrence(projected, decay_proj, decay_bias, gate_bias, heads, None, h0, reset)
    return F.linear(y, out_proj), h_last


def feed_forward_in_parts(n: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(ops.relu_squared(F.linear(n, up)), down)


IN_PARTS: dict[str, Callable[..., Any]] = {
    "linear_branch": linear_branch_in_parts,
    "feed_forward": feed_forward_in_parts,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "build"), ALL)
def test_agrees_with_its_parts(op: str, build: Builder, dtype: torch.dtype) -> None:
    """Both round in the same places, so a bfloat16 may differ by one step at most."""
    arguments = build(dtype)
    with ops.use_backend("native"):
        got = run(getattr(ops, op), arguments)
        want = run(IN_PARTS[op], arguments)
    assert_agree(got, want, {torch.float32: 1e-5 if dtype == torch.float32 else 5e-3, torch.bfloat16: 1e-2})


@pytest.mark.parametrize("shape", TIME_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_threads_change_nothing(shape: tuple[int, int, int, int]) -> None:
    """Bitwise, with the gradients written into slices of wider rows."""
    batch, time, width, heads = shape
    random = Random(torch.bfloat16, "gated_scan", shape)
    wide, decay, dy = (random.activation(batch, time, columns) for columns in (3 * width + 5, width, width))
    z, u, r = (wide[..., i * width : (i + 1) * width] for i in range(3))
    rest = (decay, random.normal(width), random.normal(width), random.normal(batch, width), random.reset(batch, time))
    dh_last = random.normal(batch, width)
    ops.status()  # loads the library
    found: list[list[Tensor]] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        h, y = sequence.gated_scan(z, u, r, *rest, heads)
        dwide = torch.zeros_like(wide)
        slices = [dwide[..., i * width : (i + 1) * width] for i in range(3)]
        gradients = sequence.gated_scan_backward(dy, dh_last, h, z, u, r, *rest, heads, *slices)
        assert not dwide[..., 3 * width :].any()
        found.append([h, y, dwide, *gradients])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
