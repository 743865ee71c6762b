"""The fused AdamW pass against PyTorch's, and the sum of squares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mm_rec import ops

BACKENDS = pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def an_update(size: int, grad: Tensor, *, rounds: bool = False, decay: float = 0.1, step: int = 0) -> ops.Update:
    out = torch.empty(size, dtype=torch.bfloat16) if rounds else None
    moments = torch.full((2, size), 0.5 if step else 0.0)
    return ops.Update(torch.linspace(-1, 1, size), *moments, grad, out, torch.tensor(float(step)), decay)


@BACKENDS
@pytest.mark.parametrize("size", [1, 77, 40_000])
def test_ten_steps_of_adamw(backend: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    update = an_update(size, torch.empty(size), rounds=True)
    wanted = update.master.clone().requires_grad_()
    optimizer = torch.optim.AdamW([wanted], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with ops.use_backend(backend):
        for _ in range(10):
            update.grad.copy_(torch.randn(size, generator=generator))
            wanted.grad = update.grad * 0.5
            optimizer.step()
            ops.adamw_([update], torch.tensor(2.0), max_norm=1.0, **SETTINGS)
    torch.testing.assert_close(update.master, wanted.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(update.weights, update.master.bfloat16())
    assert update.step == 10


@BACKENDS
@pytest.mark.parametrize(
    ("norm", "max_norm", "scale"),
    [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0), (4.0, math.inf, 1.0)],
)
def test_gradients_are_clipped(backend: str, norm: float, max_norm: float, scale: float) -> None:
    grad = torch.linspace(-2, 2, 33).bfloat16()
    with ops.use_backend(backend):
        got, want = an_update(33, grad), an_update(33, grad.float() * scale)
        ops.adamw_([got], torch.tensor(norm), max_norm=max_norm, **SETTINGS)
        ops.adamw_([want], torch.tensor(1.0), **SETTINGS)
    for name in ("master", "m", "v"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))


@BACKENDS
@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_changes_nothing(backend: str, norm: float) -> None:
    update, before = (an_update(50, torch.full((50,), norm), rounds=True, step=3) for _ in range(2))
    for one in (update, before):
        one.weights.copy_(one.master)
    with ops.use_backend(backend):
        ops.adamw_([update], torch.tensor(norm), max_norm=1.0, **SETTINGS)
    for name in ("master", "m", "v", "param_out", "step"):
        assert torch.equal(getattr(update, name), getattr(before, name)), name


@BACKENDS
def test_weights_get_a_new_version(backend: str) -> None:
    """By which copies of them know that they are old."""
    updates = [an_update(5, torch.ones(5), rounds=rounds) for rounds in (False, True)]
    versions = [one.weights._version for one in updates]
    with ops.use_backend(backend):
        ops.adamw_(updates, torch.tensor(1.0), **SETTINGS)
    assert all(one.weights._version > version for one, version in zip(updates, versions, strict=True))


def test_adamw_names_what_is_wrong() -> None:
    x, half, step = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bfloat16), torch.zeros(())
    for arguments, name in [
        ((half, x, x, x, None, step), "master"),
        ((x, half, x, x, None, step), "m must"),
        ((x, x, x[:2], x, None, step), "v must"),
        ((x, x, x, x[:2], None, step), "grad"),
        ((x, x, x, x.double(), None, step), "grad must be torch.float32"),
        ((x, x, x, x, x, step), "param_out"),
        ((x, x, x, torch.zeros(3, 4).t(), None, step), "grad must be contiguous"),
        ((x, x, x, x, None, torch.zeros(1)), "step"),
        ((x, x, x, x, None, torch.zeros((), dtype=torch.int64)), "step"),
    ]:
        with pytest.raises((TypeError, ValueError), match=name):
            ops.Update(*arguments)
    good = ops.Update(x, x, x, x, None, step)
    for updates, norm, name in [([], torch.ones(()), "updates"), ([good], torch.ones(1), "norm")]:
        with pytest.raises(ValueError, match=name):
            ops.adamw_(updates, norm, **SETTINGS)


@BACKENDS
@pytest.mark.parametrize("threads", [1, 3])
def test_many_tensors_at_once_are_updated_as_each_alone(backend: str, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    together, alone = [], []
    for index, size in enumerate((1, 40_000, 0, 16_384, 77)):
        grad = torch.randn(size, generator=generator).to(torch.bfloat16 if index % 2 else torch.float32)
        for group in (together, alone):
            group.append(an_update(size, grad, rounds=index != 1, decay=0.1 * index, step=index + 1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with ops.use_backend(backend):
            ops.adamw_(together, torch.tensor(2.0), max_norm=1.0, **SETTINGS)
            for one in alone:
                ops.adamw_([one], torch.tensor(2.0), max_norm=1.0, **SETTINGS)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(together, alone, strict=True):
        for name in ("master", "m", "v", "step", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@BACKENDS
def test_sum_of_squares(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in [(1,), (300, 700), (77,)]]
    tensors += [torch.randn(500, generator=generator).bfloat16(), torch.randn(9, 5, generator=generator).t()]
    with ops.use_backend(backend):
        total = ops.sum_of_squares(tensors)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(sum(x.double().square().sum().item() for x in tensors), rel=1e-6)
    with pytest.raises(ValueError, match="tensors"):
        ops.sum_of_squares([])


def test_sum_of_squares_shows_a_nan() -> None:
    assert ops.sum_of_squares([torch.ones(50_000), torch.tensor([torch.nan])]).isnan()


@pytest.mark.native
def test_threads_change_nothing() -> None:
    x = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        one = ops.Update(x.clone(), torch.zeros_like(x), torch.zeros_like(x), x, None, torch.zeros(()))
        ops.adamw_([one], torch.tensor(1.0), **SETTINGS)
        found.append(torch.cat([one.master, one.m, one.v, ops.sum_of_squares([x])[None].float()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
