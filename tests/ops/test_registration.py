"""The ops as PyTorch sees them: schema, autograd, fake tensors, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mm_rec import ops

from .cases import CASES
from .compare import assert_agree, run

pytestmark = pytest.mark.native

# Which case of each op: small, and with all optional arguments where there are some.
CHOSEN = {op: list(cases.values())[1] for op, cases in CASES.items()}


def _leaves(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def _schema_arguments(op: str, arguments: tuple[Any, ...]) -> list[Any]:
    """What the public function hands to the registered op."""
    leaves = _leaves(arguments)
    if op == "linear_cross_entropy":
        return [*leaves[:3], torch.full((len(leaves[0]),), 0.1), True, True]
    if op == "memory_attention":
        *first, position, kept_k, kept_v, kept_score, base = leaves
        return [*first, *ops.retain(first[3], position, kept_score), position, kept_k, kept_v, kept_score, base]
    if op == "rms_norm":
        return [leaves[0], leaves[0].dtype]
    return leaves + [None] * (len(getattr(torch.ops.mm_rec, op).default._schema.arguments) - len(leaves))


@pytest.mark.parametrize("op", CASES)
def test_opcheck(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares results of two runs, NaN and all
    torch.library.opcheck(getattr(torch.ops.mm_rec, op).default, _schema_arguments(op, CHOSEN[op](torch.float32)))


@pytest.mark.parametrize("op", CASES)
def test_traced_by_torch_compile(op: str) -> None:
    function = getattr(ops, op)
    torch.compiler.reset()  # the cases share the code below, and there is a limit of versions
    ops.status()  # loads the library: dlopen cannot be traced
    compiled = torch.compile(lambda *args: function(*args), backend="aot_eager", fullgraph=True)
    compiled.__name__ = op
    arguments = CHOSEN[op](torch.float32)
    assert_agree(run(compiled, arguments), run(function, arguments), {torch.float32: 1e-6})


@pytest.mark.parametrize("op", CASES)
def test_fake_results_look_like_real_ones(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = _schema_arguments(op, CHOSEN[op](dtype))
        registered = getattr(torch.ops.mm_rec, op).default
        real = registered(*arguments)
        meta = registered(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
        real, meta = (x if isinstance(x, tuple) else (x,) for x in (real, meta))
        for x, y in zip(real, meta, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
