"""CUDA kernels against the reference in float64: every output and every gradient, on odd shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.ops import backend, reference
from mm_rec.ops.cuda import common, loss

from .cases import (
    CASES,
    FUSED_CASES,
    MEMORY_SHAPES,
    Arguments,
    Builder,
    MemoryCase,
    Random,
    linear_cross_entropy,
    memory_attention,
    mixed_keys,
    retain,
)
from .cases import recurrence as recurrence_case
from .cases import scan as scan_case
from .compare import assert_agree, run, widen

pytestmark = pytest.mark.gpu

# float32 products on the tensor cores are sums of three bfloat16 ones, near 2^-16. bfloat16 results are one rounding
# (2^-9) from the truth; some ops also compute from something rounded, as their CPU kernels or PyTorch's attention do:
# memory_attention from rotated queries and keys, from weights and from what is read of the window, the loss from
# logits, dW_g from du; gated_recurrence from decay logits, which are an activation.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 5e-3}
TOLERANCE_ROUNDED = {torch.float32: 2e-2, torch.bfloat16: 2e-2}
ROUNDED = (
    "memory_attention", "linear_cross_entropy", "recurrence", "gated_recurrence", "linear_branch", "feed_forward",
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

# Beside the common cases: every head size that a recurrence kernel is written for, with batches that fill its groups
# of sequences or don't, and so many that they are taken in groups; several tiles of time for scan; heads past 64 for
# the memories, and sizes at which a block walks through many tiles, in one part and in two.
HEADS = [
    (1, 1, 64, 1),
    (19, 18, 128, 2),
    (5, 21, 128, 2),
    (40, 19, 512, 8),
    (139, 9, 512, 8),
    (3, 37, 256, 2),
    (3, 26, 512, 2),
    (2, 13, 80, 1),
]
MEMORIES: dict[str, MemoryCase] = {
    "heads-of-72": (2, 130, 9, 2, 72, [0, 40], {(0, 70)}),
    "heads-of-128": (2, 70, 24, 1, 128, [0, 100], {(0, 30)}),
    "heads-of-192": (1, 100, 12, 1, 192, [3], {(0, 64)}),
    "heads-of-256": (1, 145, 12, 1, 256, [50], set()),
    "heads-of-250": (1, 70, 3, 2, 250, [50], {(0, 9)}),
    "long-walk": (24, 330, 128, 8, 64, [0, 90, 500], {(0, 100), (3, 1), (5, 64), (5, 320)}),
    "walks-of-two": (8, 700, 128, 8, 64, [0, 129, 70, 1000], {(0, 300), (3, 63), (3, 650), (6, 0), (6, 512)}),
    "ends-of-tiles": (3, 65, 128, 3, 64, [0, 300, 64], {(1, 30), (1, 31), (2, 64)}),
    "one-sequence": (1, 2600, 128, 2, 64, [63], {(0, t) for t in (300, 562, 900, 1500, 1813, 2000, 2001, 2500)}),
    "wide-window": (1, 400, 181, 1, 32, [500], {(0, 250)}),
    "new-documents": (2, 200, 5, 2, 48, [0], {(0, t) for t in range(0, 200, 3)}),
}


def keys_of_taps(reach: int, dim: int, dtype: torch.dtype) -> Arguments:
    """Other numbers of taps than a model has, of which a kernel keeps a few in registers."""
    case: MemoryCase = (2, 171, 16, 3, dim, [0, 40], {(0, 0), (0, 77), (0, 79), (1, 128)})
    k, taps, position = mixed_keys(case, dtype)
    return k, Random(dtype, "taps", reach, dim).normal(*taps.shape[:2], reach), position


def other_slots(slots: int, dim: int, dtype: torch.dtype) -> Arguments:
    """Another number of slots, with documents that fill them and some that don't."""
    case: MemoryCase = (2, 300, 8, 2, dim, [5, 200], {(0, t) for t in range(3, 40)} | {(1, t) for t in (63, 64, 65)})
    q, k, v, score, position, *kept, base = memory_attention(case, dtype)
    pick = torch.arange(slots) % kept[0].shape[2]
    return q, k, v, score, position, *(x[:, :, pick] for x in kept), base


LARGE_HEADS = ("heads-of-72", "heads-of-128", "heads-of-192", "heads-of-250", "heads-of-256")
EXTRA: dict[str, dict[str, Builder]] = {
    "recurrence": {
        "x".join(map(str, shape)) + f"-{state}": partial(recurrence_case, shape, state)
        for shape in HEADS
        for state in (False, True)
    },
    "scan": {f"long-{state}": partial(scan_case, (2, 1100, 40, 1), state) for state in (False, True)},
    **{
        build.__name__: {name: partial(build, case) for name, case in MEMORIES.items()}
        for build in (memory_attention, mixed_keys)
    },
}
EXTRA["mixed_keys"] |= {
    f"taps-{reach}-heads-of-{dim}": partial(keys_of_taps, reach, dim) for reach in (1, 3, 6, 17) for dim in (16, 70)
}
EXTRA["memory_attention"] |= {
    f"slots-{slots}-heads-of-{dim}": partial(other_slots, slots, dim)
    for slots, dim in [(1, 10), (64, 32), (130, 64), (300, 16), (1000, 64)]
}
ALL = [
    pytest.param(op, build, id=f"{op}-{name}")
    for table in (CASES, EXTRA, FUSED_CASES)
    for op, cases in table.items()
    for name, build in cases.items()
]


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results starts as NaN, so that an element that a kernel leaves out is seen."""
    empty = common.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        result = empty(*arguments, **options)
        return result.fill_(torch.nan) if result.is_floating_point() else result.fill_(0x7F)

    monkeypatch.setattr(common, "empty", poisoned)


def on_device(arguments: Arguments) -> Arguments:
    return tuple(x.cuda() if isinstance(x, Tensor) else x for x in arguments)


def to_host(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in found.items()}


@DTYPES
@pytest.mark.parametrize(("op", "build"), ALL)
def test_agrees_with_reference(op: str, build: Builder, dtype: torch.dtype) -> None:
    arguments = build(dtype)
    with ops.use_backend("native"):
        got = to_host(run(getattr(ops, op), on_device(arguments)))
    want = run(getattr(reference, op), widen(arguments))
    assert_agree(got, want, TOLERANCE_ROUNDED if op in ROUNDED and dtype == torch.bfloat16 else TOLERANCE)


@DTYPES
@pytest.mark.parametrize("kilobytes", [163, 99], ids=["A100", "RTX"])
@pytest.mark.parametrize(
    ("op", "build"),
    [
        pytest.param(op, build, id=f"{op}-{name}")
        for op in ("recurrence", "memory_attention", "mixed_keys")
        for name, build in {**CASES[op], **EXTRA[op]}.items()
        if op != "memory_attention" or name not in LARGE_HEADS
    ],
)
def test_gpus_with_less_shared_memory(
    op: str, build: Builder, kilobytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MM_REC_CUDA_SHARED_MEMORY", str(kilobytes * 1024))
    arguments = build(dtype)
    with ops.use_backend("native"):
        got = to_host(run(getattr(ops, op), on_device(arguments)))
    want = run(getattr(reference, op), widen(arguments))
    assert_agree(got, want, TOLERANCE_ROUNDED if op in ROUNDED and dtype == torch.bfloat16 else TOLERANCE)


@pytest.mark.parametrize(
    ("op", "build", "size"),
    [
        ("memory_attention", partial(memory_attention, MEMORIES["heads-of-128"]), "heads of 128"),
        ("mixed_keys", partial(keys_of_taps, 17, 250), "heads of 250 and 17 taps"),
    ],
)
def test_what_does_not_fit_runs_as_it_is_defined(
    op: str, build: Builder, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MM_REC_CUDA_SHARED_MEMORY", str(60 * 1024))
    monkeypatch.setattr(backend, "_warned", set())
    arguments = build(torch.float32)
    with ops.use_backend("native"), pytest.raises(backend.NativeUnavailableError, match=f"{size} in float32"):
        run(getattr(ops, op), on_device(arguments))
    with pytest.warns(RuntimeWarning, match="more shared memory than this GPU has"):
        got = to_host(run(getattr(ops, op), on_device(arguments)))
    assert_agree(got, run(getattr(reference, op), widen(arguments)), TOLERANCE)


def assert_same_pairs(arguments: Arguments) -> None:
    with ops.use_backend("native"):
        got = ops.retain(*on_device(arguments))
    for name, value, want in zip(("slot", "held"), got, reference.retain(*arguments), strict=True):
        assert torch.equal(value.cpu(), want), f"{name} differs"


@pytest.mark.parametrize("name", [*MEMORY_SHAPES, *MEMORIES])
def test_the_same_pairs_are_kept(name: str) -> None:
    """Scores are compared and never added to, so that every back end chooses alike, and first of equal ones."""
    assert_same_pairs(retain((MEMORY_SHAPES | MEMORIES)[name], torch.float32))


@pytest.mark.parametrize("equal", [False, True], ids=["different-scores", "equal-scores"])
@pytest.mark.parametrize("slots", [1, 31, 128, 257, 3000])
def test_the_same_pairs_are_kept_of_a_long_chunk(slots: int, equal: bool) -> None:
    """With slots by the thousand, and with a sequence whose scores rise, so that every token is kept."""
    case: MemoryCase = (3, 5000, 60, 2, 2, [0, 500], {(1, t) for t in (1000, 1001, 1200, 3136)})
    score, position, kept_score = retain(case, torch.float32)
    if not equal:
        score = Random(torch.float32, "scores", slots).normal(*score.shape)
        score[0] = score[0].sort(dim=0).values
    assert_same_pairs((score, position, kept_score[..., torch.arange(slots) % kept_score.shape[2]]))


@pytest.mark.parametrize("strided", ["slice", "transposed"])
@pytest.mark.parametrize("op", [*CASES, *FUSED_CASES])
def test_strided_inputs(op: str, strided: str) -> None:
    arguments = on_device(list((CASES | FUSED_CASES)[op].values())[1](torch.float32))
    with ops.use_backend("native"):
        want = run(getattr(ops, op), arguments)
        got = run(getattr(ops, op), arguments, strided=strided)
    assert_agree(got, want, {torch.float32: 1e-6})


@pytest.mark.parametrize("op", sorted(CASES | FUSED_CASES))
def test_equal_inputs_give_equal_bits(op: str) -> None:
    for build in [*(CASES | FUSED_CASES)[op].values(), *EXTRA.get(op, {}).values()]:
        arguments = on_device(build(torch.bfloat16))
        first, second = (run(getattr(ops, op), arguments) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} differs"


@DTYPES
def test_loss_in_chunks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4000)
    arguments = linear_cross_entropy(63, 20, 130, True, dtype)
    got = to_host(run(ops.linear_cross_entropy, on_device(arguments)))
    tolerance = TOLERANCE if dtype == torch.float32 else TOLERANCE_ROUNDED
    assert_agree(got, run(reference.linear_cross_entropy, widen(arguments)), tolerance)


def test_loss_without_gradient_is_exact_for_bfloat16() -> None:
    arguments = linear_cross_entropy(63, 64, 520, True, torch.bfloat16)
    with torch.no_grad():
        got = ops.linear_cross_entropy(*on_device(arguments))
    want = reference.linear_cross_entropy(*widen(arguments))
    for value, exact in zip(got, want, strict=True):
        torch.testing.assert_close(value.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["scan", "recurrence", "mdi", "readout", "rms_norm", "add_rms_norm", "relu_squared"])
def test_nan_is_passed_on(op: str) -> None:
    """A NaN must reach the loss, where the trainer sees it."""
    arguments = on_device(list(CASES[op].values())[2](torch.float32))
    for index, x in enumerate(arguments):
        if isinstance(x, Tensor) and x.is_floating_point():
            poisoned = (*arguments[:index], torch.full_like(x, torch.nan), *arguments[index + 1 :])
            results = getattr(ops, op)(*poisoned)
            results = results if isinstance(results, tuple) else (results,)
            assert any(y.isnan().any() for y in results), f"argument {index}"


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    """A captured graph replays the kernels on new inputs, so no call waits for the device."""
    arguments = on_device(memory_attention(MEMORY_SHAPES["model-sizes"], torch.bfloat16))
    ops.memory_attention(*arguments)  # the table of rotations is made at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.memory_attention(*arguments)
    arguments[0].mul_(0.5)
    arguments[3].mul_(0.5).sub_(0.1)  # other pairs are kept
    graph.replay()
    for value, want in zip(captured, ops.memory_attention(*arguments), strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=0)


COUNTS = (1, 7, 0, 4099, 3 * 4096, 70_001)


def updates(device: str, many: int, *, shifted: bool = False) -> list[ops.Update]:
    """Of tensors of all sorts; ``shifted`` ones don't begin at multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(many):
        count = COUNTS[index % len(COUNTS)] + (index > len(COUNTS)) * index
        master, m, v, grad = torch.randn(4, count + 1, generator=generator)
        tensors = [master, m, v.abs(), grad.bfloat16() if index % 3 else grad]
        out = torch.zeros(count + 1).bfloat16()
        tensors = [x.to(device, copy=True)[1:] if shifted else x[1:].to(device, copy=True) for x in (*tensors, out)]
        step = torch.tensor(float(index % 4), device=device)
        found.append(ops.Update(*tensors[:4], tensors[4] if index % 2 else None, step, 0.1 * (index % 5)))
    return found


@pytest.mark.parametrize(("many", "shifted"), [(1, False), (6, False), (6, True), (300, False)])
@pytest.mark.parametrize("norm", [0.5, 2.0, float("inf")])
def test_optimizer_passes(many: int, shifted: bool, norm: float) -> None:
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "max_norm": 1.0}
    ours, theirs = updates("cuda", many, shifted=shifted), updates("cpu", many)
    with ops.use_backend("native"):
        squares = ops.sum_of_squares([one.grad for one in ours])
        ops.adamw_(ours, torch.tensor(norm, device="cuda"), **settings)
    with ops.use_backend("reference"):
        want = ops.sum_of_squares([one.grad for one in theirs])
        ops.adamw_(theirs, torch.tensor(norm), **settings)
    torch.testing.assert_close(squares.cpu(), want, rtol=1e-12, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("master", "m", "v"):
            torch.testing.assert_close(getattr(one, name).cpu(), getattr(other, name), rtol=1e-5, atol=1e-6)
        assert one.step.cpu() == other.step
        if one.param_out is not None:
            expected = one.master.bfloat16() if norm < float("inf") else torch.zeros_like(one.param_out)
            assert torch.equal(one.param_out, expected)


def test_the_optimizer_may_be_part_of_a_graph() -> None:
    """What it needs of the host is in the graph: replays go on where the last one ended, with new gradients."""
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "max_norm": 1.0}
    recorded, plain = updates("cuda", 300), updates("cuda", 300)

    def step(group: list[ops.Update]) -> None:
        ops.adamw_(group, ops.sum_of_squares([one.grad for one in group]).sqrt().float(), **settings)

    graph = torch.cuda.CUDAGraph()
    with ops.use_backend("native"):
        step(updates("cuda", 1))  # loads the kernels
        with torch.cuda.graph(graph):
            step(recorded)
        for _ in range(3):
            for one, other in zip(recorded, plain, strict=True):
                one.grad.mul_(-0.7)
                other.grad.mul_(-0.7)
            graph.replay()
            step(plain)
    for one, other in zip(recorded, plain, strict=True):
        for name in ("master", "m", "v", "step", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
