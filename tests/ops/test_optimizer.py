"""The fused AdamW pass against PyTorch's, and the sum of squares."""

from __future__ import annotations

import pytest
import torch

from mm_rec import ops

BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@BACKENDS
@pytest.mark.parametrize("size", [1, 77, 40_000])
def test_ten_steps_of_adamw(backend: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    start = torch.randn(size, generator=generator)
    wanted = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([wanted], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    master, m, v, out = start.clone(), torch.zeros(size), torch.zeros(size), torch.empty(size, dtype=torch.bfloat16)
    with ops.use_backend(backend):
        for step in range(1, 11):
            grad = torch.randn(size, generator=generator)
            wanted.grad = grad * 0.5
            optimizer.step()
            ops.adamw_(master, m, v, grad, out, lr=1e-2, step=step, grad_scale=0.5, **SETTINGS)
    torch.testing.assert_close(master, wanted.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(out, master.bfloat16())


@BACKENDS
def test_adamw_takes_bfloat16_gradients_and_tensor_scales(backend: str) -> None:
    grad = torch.linspace(-2, 2, 33).bfloat16()
    results = []
    with ops.use_backend(backend):
        for g, scale in ((grad, torch.tensor(0.25)), (grad.float() * 0.25, 1.0)):
            master, m, v = torch.ones(33), torch.zeros(33), torch.zeros(33)
            ops.adamw_(master, m, v, g, lr=1e-2, step=1, grad_scale=scale, **SETTINGS)
            results.append((master, m, v))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_adamw_names_what_is_wrong() -> None:
    x, half = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bfloat16)
    good = {"lr": 1e-3, "step": 1, **SETTINGS}
    for arguments, changes, name in [
        ((half, x, x, x), {}, "master"),
        ((x, half, x, x), {}, "m must"),
        ((x, x, x[:2], x), {}, "v must"),
        ((x, x, x, x[:2]), {}, "grad"),
        ((x, x, x, x, x), {}, "param_out"),
        ((x, x, x, torch.zeros(3, 4).t()), {}, "grad must be contiguous"),
        ((x, x, x, x), {"step": 0}, "step"),
    ]:
        with pytest.raises((TypeError, ValueError), match=name):
            ops.adamw_(*arguments, **{**good, **changes})


@BACKENDS
@pytest.mark.parametrize("threads", [1, 3])
def test_many_tensors_at_once_are_updated_as_each_alone(backend: str, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    together, alone = [], []
    for index, size in enumerate((1, 40_000, 0, 16_384, 77)):
        grad = torch.randn(size, generator=generator).to(torch.bfloat16 if index % 2 else torch.float32)
        out = torch.empty(size, dtype=torch.bfloat16) if index != 1 else None
        for group in (together, alone):
            tensors = (torch.linspace(-1, 1, size), torch.ones(size), torch.ones(size))
            group.append(ops.Update(*tensors, grad, None if out is None else out.clone(), 0.1 * index, index + 1))
    betas = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with ops.use_backend(backend):
            ops.adamw_many_(together, lr=1e-2, grad_scale=0.5, **betas)
            for master, m, v, grad, out, decay, step in alone:
                ops.adamw_(master, m, v, grad, out, lr=1e-2, weight_decay=decay, step=step, grad_scale=0.5, **betas)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(together, alone, strict=True):
        for got, want in zip(one, other, strict=True):
            assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want
    with pytest.raises(ValueError, match="updates"):
        ops.adamw_many_([], lr=1e-2, **betas)


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


def test_threads_change_nothing() -> None:
    x = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        master, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        ops.adamw_(master, m, v, x, lr=1e-2, step=1, **SETTINGS)
        found.append(torch.cat([master, m, v, ops.sum_of_squares([x])[None].float()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
