"""Outputs and every gradient of an op, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def run(op: Callable[..., Any], arguments: tuple[Any, ...], *, strided: str = "no") -> dict[str, Tensor]:
    """Call ``op`` on fresh leaves, backpropagate random gradients, and return everything by name.

    The gradients that come from above have values of bfloat16, so that every type gets the same ones.
    """
    constants = (3,) if op.__name__ == "linear_cross_entropy" else ()  # its weight
    leaves = [_leaf(x, i not in constants) for i, x in enumerate(arguments)]
    results = op(*(_strided(x, strided) if isinstance(x, Tensor) else x for x in leaves))
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    pairs = [(y, torch.randn(y.shape, generator=generator).bfloat16()) for y in results if y.requires_grad]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [g.to(y) for y, g in pairs])
    found = {f"output {i}": y.detach() for i, y in enumerate(results)}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.requires_grad:
            assert x.grad is not None, f"argument {i} got no gradient"
            found[f"gradient of argument {i}"] = x.grad
    return found


def _leaf(x: Any, learns: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.clone().requires_grad_(learns and x.is_floating_point())


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values in another layout: a slice of something wider, or with its axes in reverse order in memory."""
    if how == "slice" and x.dim():
        wide = torch.cat([x, x[..., :1], x[..., :1], x[..., :1]], dim=-1)
        return wide[..., : x.shape[-1]]
    if how == "transposed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    return x


def widen(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with float64 tensors, so that the reference computes in float64."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def tolerance(op: str, dtype: torch.dtype) -> dict[torch.dtype, float]:
    """Errors allowed to ``op`` on activations of ``dtype``, by the type of the result.

    bfloat16 results are one rounding (2^-9) from the truth. Some ops also compute from something rounded: the loss
    from bfloat16 logits, and the gradients of attention from its result and, where a matrix unit takes bfloat16
    alone, from a rounded softmax. The branches round after each of their products, five times in a row:
    test_branches.py holds them to the same products and ops one by one.
    """
    if dtype == torch.bfloat16 and op in ("linear_branch", "feed_forward"):
        return {torch.float32: 3e-2, torch.bfloat16: 3e-2}
    if dtype == torch.bfloat16 and op in ("memory_attention", "linear_cross_entropy"):
        return {torch.float32: 5e-3, torch.bfloat16: 1e-2}
    return {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: dict[torch.dtype, float]) -> None:
    """The largest difference, relative to the largest value wanted, is within the tolerance of the type got."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.shape == want[name].shape, f"{name} has shape {tuple(value.shape)}"
        nothing = want[name] == -math.inf  # the score of an empty slot
        assert torch.equal(value == -math.inf, nothing), f"{name} has other slots empty"
        value, expected = value.masked_fill(nothing, 0.0), want[name].masked_fill(nothing, 0.0)
        assert value.isfinite().all(), f"{name} is not finite everywhere"
        scale = expected.abs().max().clamp_min(1e-30)
        error = ((value.double() - expected.double()).abs().max() / scale).item()
        assert error <= tolerance[value.dtype], f"{name}: error {error:.2e} of {tolerance[value.dtype]:.0e}"
