"""Native kernels against the reference in float64: every output and every gradient, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from mm_rec import ops
from mm_rec.ops import reference
from mm_rec.ops.cpu.load_library import CpuLibrary

from .cases import CASES, FUSED_CASES, MEMORY_SHAPES, Builder, memory_attention, retain
from .compare import assert_agree, run, tolerance, widen

pytestmark = pytest.mark.native
ALL = [pytest.param(op, build, id=f"{op}-{name}") for op, cases in CASES.items() for name, build in cases.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "build"), ALL)
def test_agrees_with_reference(op: str, build: Builder, dtype: torch.dtype) -> None:
    arguments = build(dtype)
    with ops.use_backend("native"):
        got = run(getattr(ops, op), arguments)
    want = run(getattr(reference, op), widen(arguments))
    assert_agree(got, want, tolerance(op, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "build"),
    [pytest.param(op, build, id=f"{op}-{name}") for op, cases in FUSED_CASES.items() for name, build in cases.items()],
)
def test_ops_in_parts_agree_with_reference(op: str, build: Builder, dtype: torch.dtype) -> None:
    arguments = build(dtype)
    got = run(getattr(ops, op), arguments)
    want = run(getattr(reference, op), widen(arguments))
    # In parts, every part rounds: decay logits, their gradient, the gates.
    assert_agree(
        got,
        want,
        {torch.float32: 1e-5, torch.bfloat16: 3e-2}
        if dtype == torch.float32
        else dict.fromkeys((torch.float32, torch.bfloat16), 3e-2),
    )


@pytest.mark.parametrize("strided", ["slice", "transposed"])
@pytest.mark.parametrize("op", CASES)
def test_strided_inputs(op: str, strided: str) -> None:
    arguments = list(CASES[op].values())[1](torch.float32)
    with ops.use_backend("native"):
        want = run(getattr(ops, op), arguments)
        got = run(getattr(ops, op), arguments, strided=strided)
    assert_agree(got, want, {torch.float32: 1e-6})


@pytest.mark.parametrize("op", sorted(CASES.keys() - {"linear_cross_entropy", "linear_branch", "feed_forward"}))
def test_threads_change_nothing(op: str) -> None:
    """Bitwise: sums are cut by shape, never by the number of threads; whose they are changes nothing either.

    The loss and the branches are left out: their matrix products are PyTorch's, which cuts them by threads.
    """
    library = CpuLibrary()
    for build in CASES[op].values():
        arguments = build(torch.float32)
        found = []
        for threads, openmp in ((1, True), (2, True), (3, True), (2, False), (3, False)):
            torch.set_num_threads(threads)
            library.use_openmp(openmp)
            with ops.use_backend("native"):
                found.append(run(getattr(ops, op), arguments))
            library.use_openmp(True)
        for other in found[1:]:
            for name, value in found[0].items():
                assert torch.equal(value, other[name]), f"{name} differs"


OPS_THAT_PASS_NAN = (
    "scan", "recurrence", "mdi", "linear_branch", "readout", "rms_norm", "add_rms_norm", "relu_squared", "feed_forward",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS_THAT_PASS_NAN)
def test_nan_is_passed_on(op: str) -> None:
    """A NaN must reach the loss, where the trainer sees it."""
    made = (make(torch.float32) for name, make in CASES[op].items() if "without" not in name)
    arguments = next(arguments for arguments in made if arguments[0].shape[1] > 1)  # a decay needs a step before
    for index, x in enumerate(arguments):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            poisoned = (*arguments[:index], torch.full_like(x, torch.nan), *arguments[index + 1 :])
            results = getattr(ops, op)(*poisoned)
            results = results if isinstance(results, tuple) else (results,)
            assert any(y.isnan().any() for y in results), f"argument {index}"


def test_long_gradients_stay_exact() -> None:
    """Decay near 1 over a long time: the sums of dW_g and of the biases must not drift."""
    time, width = 2048, 16
    z, u = torch.randn(2, 1, time, width, generator=torch.Generator().manual_seed(0))
    gamma, w_g = torch.full((1, time, width), 0.9999), torch.eye(width)[None] * 0.1
    with ops.use_backend("native"):
        got = run(ops.recurrence, (z, u, gamma, w_g))
    assert_agree(got, run(reference.recurrence, widen((z, u, gamma, w_g))), {torch.float32: 1e-5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_too_large_for_the_caches(dtype: torch.dtype) -> None:
    """They are written past them, by other instructions."""
    generator = torch.Generator().manual_seed(0)
    shape, heads = (16, 140, 256), 4  # each over 1 MB
    z, u = torch.randn(2, *shape, generator=generator)
    gamma, w_g = torch.rand(shape, generator=generator), torch.randn(heads, 64, 64, generator=generator) / 16
    arguments = (z, u.to(dtype), gamma, w_g)
    with ops.use_backend("native"):
        got = run(ops.recurrence, arguments)
    want = run(reference.recurrence, widen(arguments))
    assert_agree(got, want, tolerance("recurrence", dtype))


@pytest.mark.parametrize("name", MEMORY_SHAPES)
def test_the_same_pairs_are_kept(name: str) -> None:
    """Scores are compared and never added to, so that every back end chooses alike, and first of equal ones."""
    arguments = retain(MEMORY_SHAPES[name], torch.float32)
    with ops.use_backend("native"):
        got = ops.retain(*arguments)
    for x, y in zip(got, reference.retain(*arguments), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("slots", "d"), [(1, 10), (300, 16), (16, 130), (7, 256)])
def test_any_number_of_slots(slots: int, d: int, dtype: torch.dtype) -> None:
    """Documents of any length side by side, of which some fill the slots and some have to give up pairs."""
    starts = {(0, t) for t in range(3, 40)} | {(1, t) for t in (63, 64, 65, 128)}
    q, k, v, score, position, kept_k, kept_v, kept_score, base = memory_attention((2, 220, 8, 2, d, [5], starts), dtype)
    pick = torch.arange(slots) % kept_score.shape[2]
    kept = (kept_k[:, :, pick], kept_v[:, :, pick], kept_score[:, :, pick])
    arguments = (q, k, v, score, position, *kept, base)
    with ops.use_backend("native"):
        got = run(ops.memory_attention, arguments)
    assert_agree(got, run(reference.memory_attention, widen(arguments)), tolerance("memory_attention", dtype))
