"""Large products of tiles and of vectors of pairs; what the processor lacks is emulated in C++."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_rec import ops
from mm_rec.ops import backend
from mm_rec.ops.cpu import branches, loss, matmul
from mm_rec.ops.cpu.load_library import CpuLibrary

pytestmark = pytest.mark.native
SIZES = st.one_of(st.sampled_from([16, 17, 31, 32, 33, 64, 95]), st.integers(16, 130))
ROUNDED = 2.0**-8
"""Of the largest value, what one rounding to bfloat16 and an addition in another order may differ by."""
DEPTHS = st.one_of(st.sampled_from([1, 2, 31, 32, 33, 512, 513, 1030]), st.integers(1, 200))


@pytest.fixture(autouse=True, params=["tile_product", "vector_product"], scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.status()
    before = matmul._product
    matmul.use(getattr(CpuLibrary().call, request.param))
    yield request.param
    matmul.use(before)


def _matrix(rows: int, columns: int, *, transposed: bool, gap: int, generator: torch.Generator) -> Tensor:
    """A bfloat16 matrix whose fast index is the one or the other, its rows ``gap`` elements apart."""
    if transposed:
        return _matrix(columns, rows, transposed=False, gap=gap, generator=generator).t()
    return torch.randn(rows, columns + gap, generator=generator).bfloat16()[:, :columns]


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=SIZES,
    columns=SIZES,
    depth=DEPTHS,
    layout=st.tuples(st.booleans(), st.booleans()),
    gap=st.sampled_from([0, 1, 32]),
)
def test_products_of_any_layout(
    kernel: str, rows: int, columns: int, depth: int, layout: tuple[bool, bool], gap: int
) -> None:
    generator = torch.Generator().manual_seed(rows * columns + depth)
    left = _matrix(rows, depth, transposed=layout[0], gap=gap, generator=generator)
    right = _matrix(depth, columns, transposed=layout[1], gap=gap, generator=generator)
    want = left.double() @ right.double()
    wide = torch.full((rows, columns + 3), 7.0)
    matmul.mm(left, right, wide[:, :columns])
    # Vectors add pair by pair, so their rounding grows as a random walk does; tiles add 16 pairs before.
    assert _error(wide[:, :columns], want) < (1e-6 if kernel == "tile_product" else max(1e-6, 2**-24 * depth**0.5))
    assert (wide[:, columns:] == 7).all(), "written past the end of a row"
    assert _error(matmul.mm(left, right), want) < ROUNDED
    total = torch.full((rows, columns), 2.0)
    matmul.add_mm(total, left, right, torch.empty(rows, columns, dtype=torch.bfloat16))
    assert _error(total - 2.0, want) < 1e-5


def test_our_own_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", None)
    x = torch.ones(16, 8).bfloat16()
    assert (matmul.mm(x, x.t()) == 8).all()


@pytest.mark.parametrize("shape", [(15, 40, 40), (40, 40, 15), (40, 0, 40)])
def test_small_ones_are_left_to_pytorch(shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    left, right = torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16()
    assert torch.equal(matmul.mm(left, right), torch.mm(left, right))


def test_float32_is_left_to_pytorch() -> None:
    left, right = torch.randn(40, 50), torch.randn(50, 60)
    total = torch.ones(40, 60)
    matmul.add_mm(total, left, right, torch.empty(40, 60))
    assert torch.equal(total, 1 + torch.mm(left, right))


@pytest.mark.parametrize("depth", [70, 1100, 2112, 4200])
def test_neither_threads_nor_neighbours_change_a_bit(depth: int) -> None:
    left, right = torch.randn(200, depth).bfloat16(), torch.randn(depth, 333).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(matmul.mm(left, right, torch.empty(200, 333)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert _error(found[0], left.double() @ right.double()) < 2**-24 * depth**0.5 + 1e-7
    alone = matmul.mm(left[64:97], right[:, 17:49], torch.empty(33, 32))
    assert torch.equal(alone, found[0][64:97, 17:49])


def test_an_infinity_stays_in_its_row() -> None:
    left, right = torch.ones(50, 33).bfloat16(), torch.ones(33, 40).bfloat16()
    left[7, 32], left[9, 0] = float("inf"), float("nan")
    product = matmul.mm(left, right)
    assert product[7].isinf().all()
    assert product[9].isnan().all()
    kept = torch.ones(50, dtype=torch.bool)
    kept[[7, 9]] = False
    assert (product[kept] == 33).all()


@pytest.mark.parametrize(("learns_x", "learns_weight"), [(True, True), (True, False), (False, True)])
def test_linear(learns_x: bool, learns_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # These kernels are only among those of processors that multiply pairs of bfloat16, and no caller of the package has
    # a reason to change what a back end holds: so the test does it, to see the op and its gradient everywhere.
    ops.status()
    native = backend._loaded["cpu"]
    assert isinstance(native, backend.Native)
    kernels = {**native.kernels, "mm": matmul.mm, "linear": branches.linear}
    monkeypatch.setitem(backend._loaded, "cpu", dataclasses.replace(native, kernels=kernels))
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 20, 48), (64, 48), (2, 20, 64))
    )
    y = ops.linear(x.requires_grad_(learns_x), weight.requires_grad_(learns_weight))
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "_LinearBackward", "PyTorch's own ran"
    y.backward(dy)
    rows, columns, above = x.detach().double().flatten(0, 1), weight.detach().double(), dy.double().flatten(0, 1)
    assert _error(y.detach().flatten(0, 1), rows @ columns.t()) < ROUNDED
    for leaf, want in ((x, (above @ columns).view(x.shape)), (weight, above.t() @ rows)):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert _error(leaf.grad, want) < ROUNDED


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "pytorch's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_matmul_writes_the_product_that_linear_computes(
    dtype: torch.dtype, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor has a kernel, bfloat16 takes it; all else is PyTorch's."""
    ops.status()
    native = backend._loaded["cpu"]
    assert isinstance(native, backend.Native)
    others = {name: function for name, function in native.kernels.items() if name != "mm"}
    calls: list[Tensor] = []

    def mm(left: Tensor, right: Tensor, out: Tensor) -> None:
        calls.append(matmul.mm(left, right, out))

    kernels = {**others, "mm": mm} if ours else others
    monkeypatch.setitem(backend._loaded, "cpu", dataclasses.replace(native, kernels=kernels))
    left, right = torch.randn(40, 50).to(dtype), torch.randn(50, 60).to(dtype)
    out = torch.full((40, 60), torch.nan, dtype=dtype)
    ops.matmul(left, right, out)
    assert _error(out, left.double() @ right.double()) < (ROUNDED if dtype == torch.bfloat16 else 1e-6)
    assert bool(calls) == (ours and dtype == torch.bfloat16)


def test_linear_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.linear(torch.ones(1, 2, 3), torch.ones(4, 5))


def test_large_losses_add_their_parts_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the embedding is a sum over chunks of rows."""
    monkeypatch.setattr(loss, "LOGIT_BYTES", 2 * 70 * 30)
    generator = torch.Generator().manual_seed(0)
    y, embedding = (torch.randn(shape, generator=generator).bfloat16() for shape in ((90, 48), (70, 48)))
    targets = torch.randint(70, (90,), generator=generator)
    weight = torch.rand(90, generator=generator)
    found = loss.linear_cross_entropy(y, embedding, targets, weight, True, True)
    monkeypatch.setattr(matmul, "_product", None)
    wanted = loss.linear_cross_entropy(y, embedding, targets, weight, True, True)
    for got, want in zip(found, wanted, strict=True):
        assert _error(got, want.double()) < 2 * ROUNDED
