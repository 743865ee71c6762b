"""linear_cross_entropy beyond the common comparison: chunks of rows, weights of 0, scaled gradients."""

from __future__ import annotations

import threading

import pytest
import torch

from mm_rec import ops
from mm_rec.ops import reference
from mm_rec.ops.cpu import loss

from .cases import linear_cross_entropy
from .compare import assert_agree, run, tolerance, widen

pytestmark = pytest.mark.native
OP = "linear_cross_entropy"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
def test_chunks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4000)
    arguments = linear_cross_entropy(63, 20, 130, True, dtype)
    got = run(ops.linear_cross_entropy, arguments)
    assert_agree(got, run(reference.linear_cross_entropy, widen(arguments)), tolerance(OP, dtype))


@DTYPES
def test_rows_of_weight_0_are_left_out(dtype: torch.dtype) -> None:
    y, embedding, targets, weight = linear_cross_entropy(40, 20, 130, True, dtype)
    weight[::3] = 0
    y[3] = torch.inf  # not even looked at
    got = run(ops.linear_cross_entropy, (y, embedding, targets, weight))
    y[3] = 0
    want = run(reference.linear_cross_entropy, widen((y, embedding, targets, weight)))
    assert_agree(got, want, tolerance(OP, dtype))
    assert not got["output 1"][::3].any()
    assert not got["gradient of argument 0"][::3].any()


def test_no_row_counts() -> None:
    y, embedding, targets, weight = linear_cross_entropy(5, 4, 7, True, torch.float32)
    got = run(ops.linear_cross_entropy, (y, embedding, targets, weight * 0))
    assert not any(value.any() for value in got.values())


def test_gradient_of_a_scaled_loss() -> None:
    y, embedding, targets, weight = linear_cross_entropy(9, 6, 20, True, torch.float32)
    y.requires_grad_()
    for scale in (1.0, -3.0):
        loss, nll = ops.linear_cross_entropy(y, embedding, targets, weight)
        assert not nll.requires_grad
        (got,) = torch.autograd.grad(loss * scale, y)
        (want,) = torch.autograd.grad(reference.linear_cross_entropy(y, embedding, targets, weight)[0] * scale, y)
        torch.testing.assert_close(got, want)


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    y, embedding, targets = linear_cross_entropy(9, 6, 20, False, torch.float32)
    products = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(1) or product(*args, **kwargs))
    with torch.no_grad():
        ops.linear_cross_entropy(y.requires_grad_(), embedding, targets)
    assert len(products) == 1


def test_targets_outside_the_vocabulary() -> None:
    y, embedding, targets = linear_cross_entropy(9, 6, 20, False, torch.float32)
    targets[2] = 20
    with pytest.raises(IndexError, match="targets"):
        ops.linear_cross_entropy(y, embedding, targets)


def test_large_logits() -> None:
    """Neither overflow nor a loss of the small differences that are left."""
    y = torch.tensor([[300.0, 0.0], [0.0, -300.0]])
    embedding = torch.tensor([[1.0, 0.0], [0.99, 0.0], [0.0, 1.0]])
    arguments = (y, embedding, torch.tensor([1, 2]))
    assert_agree(
        run(ops.linear_cross_entropy, arguments),
        run(reference.linear_cross_entropy, widen(arguments)),
        {torch.float32: 1e-5},
    )


def test_training_after_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_kept", threading.local())
    arguments = linear_cross_entropy(63, 20, 130, True, torch.float32)
    with torch.inference_mode():
        ops.linear_cross_entropy(*arguments)
    got = run(ops.linear_cross_entropy, arguments)
    want = run(reference.linear_cross_entropy, widen(arguments))
    assert_agree(got, want, tolerance(OP, torch.float32))
