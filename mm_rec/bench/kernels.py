"""The kernels one by one: bytes and operations a second, against a copy, a matrix product, a loop and a GRU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_rec import ops
from mm_rec.bench.limits import copy_action
from mm_rec.bench.timing import Action, median_seconds, recorded
from mm_rec.config import KEY_TAPS, ModelConfig
from mm_rec.system import keep_freed_memory

__all__ = ["KernelTime", "measure_kernels", "measure_recurrence"]

ADAMW: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "max_norm": 1.0,
}


@dataclass(frozen=True)
class Work:
    """One call of a kernel.

    Attributes:
        size: bytes that it has to read and write, every tensor once.
        flop: floating-point operations of its matrix products; 0 for those that have none.
    """

    name: str
    action: Action
    size: float
    flop: float = 0.0


@dataclass(frozen=True)
class KernelTime:
    """What a kernel took, and what a copy of as many bytes and a product of as many operations took beside it."""

    name: str
    shape: str
    seconds: float
    size: float
    flop: float
    copy_seconds: float
    product_seconds: float

    @property
    def share_of_copy(self) -> float:
        """Its bytes a second against those of the copy."""
        return self.copy_seconds / self.seconds

    @property
    def share_of_limit(self) -> float:
        """The same against the slower of copy and product: what bounds it."""
        return max(self.copy_seconds, self.product_seconds) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "op": self.name,
            "shape": self.shape,
            "ms": round(self.seconds * 1e3, 4),
            "gb_per_s": round(self.size / self.seconds / 1e9, 2),
            "gflops": round(self.flop / self.seconds / 1e9, 1),
            "share_of_copy": round(self.share_of_copy, 3),
            "share_of_limit": round(self.share_of_limit, 3),
        }


def forward_backward(op: Callable[..., Any], *arguments: Any) -> tuple[Action, Action]:
    """Actions that run ``op`` without gradients, and forward and backward."""
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            op(*leaves)

    above = [torch.randn_like(y) for y in _learned(op(*leaves))]

    def both() -> None:
        torch.autograd.grad(_learned(op(*leaves)), inputs, above)

    return forward, both


def _learned(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]


def _both_ways(
    name: str,
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    sizes: tuple[float, float],
    flops: tuple[float, float],
) -> Iterator[Work]:
    """Forward, and forward and backward together; sizes and flops are those of the one and of the other pass."""
    forward, both = forward_backward(op, *arguments)
    yield Work(f"{name} forward", forward, sizes[0], flops[0])
    yield Work(f"{name} forward+backward", both, sum(sizes), sum(flops))


def _streams(batch: int, length: int, width: int, heads: int) -> Iterator[Work]:
    """The kernels without products, as a training step in bfloat16 calls them.

    Bytes per element count inputs read and outputs written, and what the backward pass reads again.
    """
    shape, n = (batch, length, width), batch * length * width
    gamma, x, bias = torch.rand(shape), torch.randn(shape), torch.zeros(width)

    def half() -> Tensor:
        return torch.randn(shape).bfloat16()

    rows: list[tuple[str, Callable[..., Any], tuple[Any, ...], int, int]] = [
        ("scan", ops.scan, (gamma, x), 4 * 3, 4 * 5),
        ("mdi gated", ops.mdi, (half(), bias, half(), half(), bias), 3 * 2 + 8, 8 + 3 * 2 + 3 * 2),
        ("mdi", ops.mdi, (half(), bias, half()), 2 * 2 + 8, 8 + 2 * 2 + 2 * 2),
        ("rms_norm", ops.rms_norm, (half(),), 4, 6),
        ("add_rms_norm", ops.add_rms_norm, (x, half()), 4 + 2 + 4 + 2, 4 + 2 + 4 + 4 + 2),
        ("readout", ops.readout, (x, half(), heads), 4 + 2 + 2, 2 + 4 + 2 + 4 + 2),
        ("relu_squared", ops.relu_squared, (half(),), 4, 6),
    ]
    for name, op, arguments, forward, backward in rows:
        yield from _both_ways(name, op, arguments, (forward * n, backward * n), (0.0, 0.0))
    master, m, v, grad, out = torch.randn(n), torch.zeros(n), torch.zeros(n), half().flatten(), half().flatten()
    update = ops.Update(master, m, v, grad, out, torch.full((), 10.0), weight_decay=0.1)
    yield Work("adamw_", partial(ops.adamw_, [update], torch.ones(()), **ADAMW), (4 * 6 + 2 + 2) * n)
    yield Work("sum_of_squares", partial(ops.sum_of_squares, [grad]), 2 * n)


def _products(config: ModelConfig, batch: int, length: int) -> Iterator[Work]:
    """The kernels that are matrix products inside: the memories and the loss, in bfloat16."""
    heads, d, window, slots, width = config.n_heads, config.head_dim, config.window, config.kept_pairs, config.d_model
    rows = batch * length
    position = torch.arange(1000, 1000 + length).expand(batch, -1)
    q = torch.randn(batch, length, heads, d).bfloat16()
    own, k, v = (torch.randn(batch, n + length, heads, d).bfloat16() for n in (KEY_TAPS - 1, window, window))
    k = ops.rms_norm(k) / d**0.5
    activations = per_token = 2 * rows * width  # bytes of a tensor in bfloat16; operations of a multiplication each
    score, kept_score = F.logsigmoid(torch.randn(batch, window + length, heads)), torch.zeros(batch, heads, slots)
    kept_k, kept_v = torch.randn(2, batch, heads, slots, d).bfloat16()
    yield from _both_ways(
        "memory_attention",
        ops.memory_attention,
        (q, k, v, score, position, kept_k / d**0.5, kept_v, kept_score - 3.0),
        (4 * activations, 9 * activations),
        (2 * (window + slots) * per_token, 5 * (window + slots) * per_token),
    )
    taps = torch.randn(heads, d, KEY_TAPS)
    yield from _both_ways(
        "mixed_keys", ops.mixed_keys, (own, taps, position), (2 * activations, 3 * activations), (0.0, 0.0)
    )
    y = torch.randn(rows, width).bfloat16()
    embedding = (torch.randn(config.vocab_size, width) * 0.05).bfloat16()
    targets = torch.randint(config.vocab_size, (rows,))
    weights = 2 * config.vocab_size * width
    _, both = forward_backward(ops.linear_cross_entropy, y, embedding, targets)
    size = 2 * activations + 3 * weights + 6 * rows * config.vocab_size
    yield Work("linear_cross_entropy forward+backward", both, size, 3 * config.vocab_size * per_token)


def measure_kernels(
    config: ModelConfig, batch: int, length: int, matrix_rate: float, rounds: int, only: list[str] | None = None
) -> list[KernelTime]:
    """Every kernel at one shape, each in turn with a copy of as many bytes.

    Args:
        config: widths.
        batch, length: B and T.
        matrix_rate: bf16 operations a second of the machine's products, the limit of those made of products.
        rounds: runs that the medians are of.
        only: parts of the names of those to measure; None or empty for all.
    """
    keep_freed_memory()  # as training does: fresh pages would cost more than many a kernel
    found = []
    works = [*_streams(batch, length, config.d_model, config.n_heads), *_products(config, batch, length)]
    for work in works:
        if only and not any(part in work.name for part in only):
            continue
        actions = {"kernel": recorded(work.action), "copy": recorded(copy_action(int(work.size)))}
        seconds = median_seconds(actions, rounds)
        shape = f"{batch}x{length}x{config.d_model}"
        limit = work.flop / matrix_rate
        found.append(KernelTime(work.name, shape, seconds["kernel"], work.size, work.flop, seconds["copy"], limit))
    return found


def measure_recurrence(config: ModelConfig, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """The time loop, forward and backward in float32, against the reference loop and ``nn.GRU`` of the same width."""
    keep_freed_memory()  # as training does
    width, heads, d = config.d_model, config.n_heads, config.head_dim
    z, u = torch.randn(batch, length, width), torch.randn(batch, length, width)
    arguments = (z, u, torch.rand(batch, length, width), torch.randn(heads, d, d) * 0.5 * d**-0.5)
    forward, native = forward_backward(ops.recurrence, *arguments)
    _, loop = forward_backward(ops.reference.recurrence, *arguments)
    gru = nn.GRU(width, width, batch_first=True)
    x = torch.randn(batch, length, width, requires_grad=True)
    above = torch.randn(batch, length, width)

    def gru_step() -> None:
        torch.autograd.grad(gru(x)[0], [x, *gru.parameters()], above)

    seconds = median_seconds({"forward": forward, "native": native, "gru": gru_step}, rounds)
    slow = median_seconds({"native": native, "loop": loop}, max(5, rounds // 2))
    return {
        "shape": f"{batch}x{length}x{width}, {heads} heads",
        "forward_ms": round(seconds["forward"] * 1e3, 3),
        "ms": round(seconds["native"] * 1e3, 3),
        "gru_ms": round(seconds["gru"] * 1e3, 3),
        "loop_ms": round(slow["loop"] * 1e3, 1),
        "times_faster_than_gru": round(seconds["gru"] / seconds["native"], 2),
        "times_faster_than_loop": round(slow["loop"] / slow["native"], 1),
    }
