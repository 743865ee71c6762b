"""Polar factors against those of a singular value decomposition, and updates by orthogonalised momentum."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.ops import cpu
from mm_rec.ops.cpu import muon
from mm_rec.ops.cpu.load_library import CpuLibrary
from mm_rec.ops.reference import POLAR_POLYNOMIALS, orthogonalize

LEAST, MOST = 0.65, 1.35
"""Singular values of a result, where those of the matrix are at least 0.002 of its norm."""
ROUNDED = 0.1
"""Of the norm of a result, what some twenty products in bfloat16 may make of it."""
ROUNDED_SMALL = 0.5
"""The same of a matrix with few rows, whose large elements meet steep polynomials, and of one with tiny singular
values, whose directions rounding changes."""
SHAPES = [(1, 1), (1, 40), (3, 2), (16, 16), (33, 70), (70, 33), (96, 320), (130, 64)]
KERNELS = ["tile_orthogonalize", "vector_orthogonalize"]


def matrix(rows: int, columns: int, least: float = 0.1, seed: int = 0) -> Tensor:
    """A matrix whose singular values are spread from 1 down to ``least``."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    left, right = (torch.randn(size, n, dtype=torch.float64, generator=generator) for size in (rows, columns))
    values = torch.logspace(0, math.log10(least), n, dtype=torch.float64)
    return (torch.linalg.qr(left)[0] * values @ torch.linalg.qr(right)[0].t()).float()


def polar_factor(x: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    return left @ right


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.fixture(params=["reference", *KERNELS, "pytorch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The definition, the kernels (emulated where the processor lacks their instructions) and PyTorch's products."""
    if request.param == "reference":
        with ops.use_backend("reference"):
            yield request.param
        return
    status = ops.status()["cpu"]
    if status.backend != "native":
        pytest.skip(f"needs the native CPU kernels: {status.reason}")
    before = muon._polar_factors
    muon.use(getattr(CpuLibrary().call, request.param) if request.param in KERNELS else None)
    yield request.param
    muon.use(before)


def test_the_polynomials_take_singular_values_to_one() -> None:
    x = torch.logspace(math.log10(0.002), 0, 100_001, dtype=torch.float64)
    slope = math.prod(a for a, _, _ in POLAR_POLYNOMIALS)
    for a, b, c in POLAR_POLYNOMIALS:
        x = a * x + b * x**3 + c * x**5
    assert LEAST < x.min() < x.max() < MOST
    assert slope == pytest.approx(344, rel=0.001)  # smaller ones are multiplied by so much


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_one_and_the_singular_vectors_stay(way: str, shape: tuple[int, int]) -> None:
    x = matrix(*shape)
    result = x.bfloat16()
    ops.orthogonalize_([result])
    values = torch.linalg.svdvals(result.double())
    assert values.min() > LEAST - ROUNDED
    assert values.max() < MOST + ROUNDED
    # The best of all factors: as large as a matrix whose singular values are 1 can be along x.
    nuclear = torch.linalg.svdvals(x.double()).sum()
    assert (result.double() * x).sum() == pytest.approx(nuclear.item(), rel=0.35)
    assert error(result, polar_factor(x)) < 0.35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [0.3, 1e-4])
def test_kernels_agree_with_the_definition(way: str, dtype: torch.dtype, least: float) -> None:
    wanted = [matrix(*shape, least=least) for shape in SHAPES]
    results = [x.to(dtype, copy=True) for x in wanted]
    ops.orthogonalize_(results)
    for x, result in zip(wanted, results, strict=True):
        assert result.dtype == dtype
        bound = ROUNDED if least > 0.1 and min(x.shape) >= 16 else ROUNDED_SMALL
        bound = 1e-3 if dtype == torch.float32 else bound
        assert error(result, orthogonalize(x.to(dtype).float())) < bound, x.shape


@pytest.mark.parametrize("factor", [1e-37, 1e-25, 1e25, 1e37])
def test_the_size_of_a_matrix_does_not_matter(way: str, factor: float) -> None:
    x = matrix(40, 70)
    result = (x * factor).bfloat16()
    ops.orthogonalize_([result])
    assert error(result, orthogonalize(x)) < ROUNDED


def test_zeros_stay_and_a_matrix_of_low_rank_keeps_its_rank(way: str) -> None:
    nothing, thin = torch.zeros(20, 50).bfloat16(), (matrix(64, 3) @ matrix(3, 40)).bfloat16()
    before = thin.clone()
    ops.orthogonalize_([nothing, thin])
    assert not nothing.any()
    values = torch.linalg.svdvals(thin.double())
    assert (values[:3] > LEAST - ROUNDED).all()
    assert values.max() < MOST + ROUNDED
    # What rounding to bfloat16 has added to the others is no longer rank 3, and is enlarged as all small values are.
    assert error(thin, orthogonalize(before.float())) < 0.3


def test_a_nan_stays_in_its_matrix(way: str) -> None:
    broken, whole = torch.ones(20, 30).bfloat16(), matrix(20, 30).bfloat16()
    alone = whole.clone()
    broken[3, 4] = torch.nan
    ops.orthogonalize_([broken, whole])
    ops.orthogonalize_([alone])
    assert broken.isnan().any()
    assert torch.equal(whole, alone)


@pytest.mark.native
@pytest.mark.parametrize("way", KERNELS, indirect=True)
def test_neither_threads_nor_other_matrices_change_a_bit(way: str) -> None:
    matrices = [matrix(*shape).bfloat16() for shape in SHAPES * 2]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results = [x.clone() for x in matrices]
            ops.orthogonalize_(results)
            found.append(results)
    finally:
        torch.set_num_threads(before)
    for x, *results in zip(matrices, *found, strict=True):
        ops.orthogonalize_([x])
        assert all(torch.equal(x, result) for result in results)


@pytest.mark.native
def test_the_back_end_of_this_processor_has_its_kernel() -> None:
    kernels = cpu.load().kernels
    assert {"muon_", "orthogonalize_"} <= kernels.keys()
    assert (muon._polar_factors is None) == ("mm" not in kernels)  # where products are our own, so are these


def test_orthogonalize_names_what_is_wrong() -> None:
    for wrong in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(4, 5).t(), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises((TypeError, ValueError), match="matrices"):
            ops.orthogonalize_([wrong])
    ops.orthogonalize_([])


def an_update(shape: tuple[int, int], grad: Tensor, *, rounds: bool = False, decay: float = 0.1) -> ops.MuonUpdate:
    out = torch.empty(shape, dtype=torch.bfloat16) if rounds else None
    return ops.MuonUpdate(
        matrix(*shape, seed=1), torch.full(shape, 0.5), grad, out, ops.muon_scale(*shape), weight_decay=decay
    )


def test_a_few_steps_by_hand(way: str) -> None:
    shape, lr, momentum = (24, 50), 0.1, 0.9
    update = an_update(shape, torch.empty(shape), rounds=True)
    update.m.copy_(matrix(*shape, seed=4))
    master, m = update.master.clone(), update.m.clone()
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        update.grad.copy_(torch.randn(shape, generator=generator))
        g = update.grad * 0.5
        m = momentum * m + (1 - momentum) * g
        direction = orthogonalize(momentum * m + (1 - momentum) * g)
        master = (1 - lr * 0.1) * master - lr * 0.2 * math.sqrt(50) * direction
        ops.muon_([update], torch.tensor(2.0), lr=lr, momentum=momentum, max_norm=1.0)
    torch.testing.assert_close(update.m, m, rtol=1e-5, atol=1e-6)
    assert error(update.master, master) < (1e-5 if way == "reference" else ROUNDED)
    assert torch.equal(update.weights, update.master.bfloat16())


def test_an_update_has_the_size_of_adamw_s(way: str) -> None:
    """So that one learning rate and one weight decay suit both."""
    update = an_update((64, 160), matrix(64, 160), decay=0.0)
    before = update.master.clone()
    update.m.zero_()
    ops.muon_([update], torch.tensor(1.0), lr=0.1, momentum=0.95)
    assert (update.master - before).square().mean().sqrt() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("norm", "max_norm", "scale"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0)])
def test_gradients_are_clipped(way: str, norm: float, max_norm: float, scale: float) -> None:
    grad = matrix(20, 30).bfloat16()
    got, want = an_update((20, 30), grad), an_update((20, 30), grad.float() * scale)
    ops.muon_([got], torch.tensor(norm), lr=0.1, momentum=0.95, max_norm=max_norm)
    ops.muon_([want], torch.tensor(1.0), lr=0.1, momentum=0.95)
    torch.testing.assert_close(got.m, want.m)
    assert error(got.master, want.master) < 0.01


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_changes_nothing(way: str, norm: float) -> None:
    update, before = (an_update((20, 30), torch.full((20, 30), norm), rounds=True) for _ in range(2))
    for one in (update, before):
        one.weights.copy_(one.master)
    ops.muon_([update], torch.tensor(norm), lr=0.1, momentum=0.95, max_norm=1.0)
    for name in ("master", "m", "param_out"):
        assert torch.equal(getattr(update, name), getattr(before, name)), name


def test_weights_get_a_new_version(way: str) -> None:
    updates = [an_update((5, 6), torch.ones(5, 6), rounds=rounds) for rounds in (False, True)]
    versions = [one.weights._version for one in updates]
    ops.muon_(updates, torch.tensor(1.0), lr=0.1, momentum=0.95)
    assert all(one.weights._version > version for one, version in zip(updates, versions, strict=True))


def test_many_matrices_at_once_are_updated_as_each_alone(way: str) -> None:
    together, alone = [], []
    for index, shape in enumerate(SHAPES):
        grad = matrix(*shape, seed=3).to(torch.bfloat16 if index % 2 else torch.float32)
        for group in (together, alone):
            group.append(an_update(shape, grad, rounds=index != 1, decay=0.1 * index))
    ops.muon_(together, torch.tensor(2.0), lr=0.1, momentum=0.95, max_norm=1.0)
    for one in alone:
        ops.muon_([one], torch.tensor(2.0), lr=0.1, momentum=0.95, max_norm=1.0)
    for one, other in zip(together, alone, strict=True):
        for name in ("master", "m", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_muon_names_what_is_wrong() -> None:
    x, half = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bfloat16)
    for arguments, name in [
        ((half, x, x, None), "master"),
        ((torch.zeros(4), x, x, None), "master must be a matrix"),
        ((x, half, x, None), "m must"),
        ((x, x, x[:2], None), "grad"),
        ((x, x, x, x), "param_out"),
        ((x, x, torch.zeros(3, 4).t(), None), "grad must be contiguous"),
    ]:
        with pytest.raises((TypeError, ValueError), match=name):
            ops.MuonUpdate(*arguments, scale=1.0)
    good = ops.MuonUpdate(x, x, x, None, 1.0)
    for updates, norm, name in [([], torch.ones(()), "updates"), ([good], torch.ones(1), "norm")]:
        with pytest.raises(ValueError, match=name):
            ops.muon_(updates, norm, lr=0.1, momentum=0.95)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_cuda_agrees_with_the_definition_without_waiting(norm: float) -> None:
    on_cpu, on_gpu = [], []
    for index, shape in enumerate(SHAPES * 2):
        grad = matrix(*shape, seed=index).to(torch.bfloat16 if index % 2 else torch.float32)
        on_cpu.append(an_update(shape, grad, rounds=index % 3 == 0, decay=0.1 * (index % 2)))
        tensors = [None if x is None else x.cuda() for x in vars(on_cpu[-1]).values() if not isinstance(x, float)]
        on_gpu.append(ops.MuonUpdate(*tensors, on_cpu[-1].scale, on_cpu[-1].weight_decay))
    on_device = torch.tensor(norm, device="cuda")
    ops.muon_(on_gpu, on_device, lr=0.1, momentum=0.95, max_norm=1.0)  # once before, for what a library sets up
    with ops.use_backend("reference"):
        ops.muon_(on_cpu, torch.tensor(norm), lr=0.1, momentum=0.95, max_norm=1.0)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(one.m.cpu(), other.m)
        assert error(one.master.cpu(), other.master) < ROUNDED
        assert one.param_out is None or torch.equal(one.param_out, one.master.bfloat16()) or norm == math.inf
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.muon_(on_gpu, on_device, lr=0.1, momentum=0.95, max_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
