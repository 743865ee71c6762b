"""Training speed on the CPU against Transformers, in one run: alternating steps, medians.

    python -m benchmarks.train_step --shapes 1x256 2x512 --models one_domain fused gpt2

one_domain, fused   the `100m` preset, one expert or both
gpt2                GPT-2 110M of transformers (12 blocks of 768), autocast, fused AdamW
gpt                 a modern GPT of 56M (12 blocks of 512: RMSNorm, rotary, ReLU^2), autocast, fused AdamW

A step is forward, backward, clipping and optimizer on random tokens. `matrix rate` is what the model's own
matrix products reach alone in the same run; `share` is how much of it a training step uses.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import ModernGPT, gpt2_110m
from mm_rec import ops
from mm_rec.config import PRESETS
from mm_rec.device import apply_precision, select_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW

RESULT = Path(__file__).parent / "results" / "train_step.json"
Step = Callable[[Tensor, Tensor], None]


def mm_rec_step(domain: str | None, precision: str) -> tuple[nn.Module, Step]:
    """A training step of the `100m` preset."""
    model = MMRecModel(PRESETS["100m"])
    apply_precision(model, precision)
    optimizer = AdamW(model.named_parameters())

    def step(tokens: Tensor, targets: Tensor) -> None:
        output, _ = model(tokens, None, domain, targets=targets)
        output.loss.backward()
        optimizer.step(1e-4, 1.0)

    return model, step


def peer_step(model: nn.Module, logits: Callable[[Tensor], Tensor], precision: str) -> tuple[nn.Module, Step]:
    """A training step of a Transformer as PyTorch users write it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(logits(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def build(name: str, precision: str) -> tuple[nn.Module, Step]:
    """One of the models of the table."""
    if name in ("one_domain", "fused"):
        return mm_rec_step("text" if name == "one_domain" else None, precision)
    if name == "gpt2":
        peer: Any = gpt2_110m()
        return peer_step(peer, lambda tokens: peer(tokens).logits, precision)
    gpt = ModernGPT(vocab_size=32_000, width=512, blocks=12, heads=8)
    return peer_step(gpt, gpt, precision)


def matrix_rate(tokens: int, precision: str) -> float:
    """FLOP/s of the products of one block (forward, both gradients) at this many tokens, weighted by their work."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    width, hidden = PRESETS["100m"].d_model, PRESETS["100m"].d_ff
    work, seconds = 0.0, 0.0
    for rows, columns in ((3 * width + width // 4, width), (width, width), (hidden, width), (width, hidden)):
        x = torch.randn(tokens, columns).to(dtype)
        weight = torch.randn(rows, columns).to(dtype)
        gradient = torch.randn(tokens, rows).to(dtype)
        products: list[tuple[Tensor, Tensor]] = [(x, weight.t()), (gradient, weight), (gradient.t(), x)]
        for left, right in products:
            multiply = partial(torch.mm, left, right)
            multiply()
            seconds += statistics.median(timed(multiply) for _ in range(7))
            work += 2.0 * tokens * rows * columns
    return work / seconds


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def flop_per_token(name: str, model: nn.Module) -> float:
    """Six times the parameters that a token meets in matrix products: forward, and two products backward."""
    active = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    if isinstance(model, MMRecModel) and name == "one_domain":
        active = sum(p.numel() for p in model.experts["text"].parameters()) + model.embedding.weight.numel()
    return 6.0 * active


def measure(shape: str, names: list[str], rounds: int, precision: str) -> list[dict[str, Any]]:
    """Alternate the models' steps on one batch shape."""
    batch, time_steps = (int(part) for part in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32_000, (batch, time_steps + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    built = {name: build(name, precision) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for turn in range(rounds + 1):
        rates.append(matrix_rate(batch * time_steps, precision))
        for name, (_, step) in built.items():
            seconds = timed(partial(step, inputs, targets))
            if turn:  # the first one warms up
                times[name].append(seconds)
    rate = statistics.median(rates)
    rows = []
    for name, (model, _) in built.items():
        seconds = statistics.median(times[name])
        used = flop_per_token(name, model) * batch * time_steps / seconds
        rows.append(
            {
                "shape": shape,
                "model": name,
                "seconds": round(seconds, 4),
                "tokens_per_second": round(batch * time_steps / seconds, 1),
                "matrix_tflops": round(rate / 1e12, 3),
                "share_of_matrix_rate": round(used / rate, 3),
                "all_seconds": [round(value, 4) for value in times[name]],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x256", "2x512"], metavar="BxT")
    parser.add_argument("--models", nargs="+", default=["one_domain", "fused", "gpt2", "gpt"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    precision = select_precision(options.precision, torch.device("cpu"))
    rows = []
    for shape in options.shapes:
        rows += measure(shape, options.models, options.rounds, precision)
        yardstick = next((row["seconds"] for row in rows if row["shape"] == shape and row["model"] == "gpt2"), None)
        for row in rows[-len(options.models) :]:
            ratio = f"{yardstick / row['seconds']:5.2f}x gpt2" if yardstick else ""
            print(
                f"{shape:>7} {row['model']:11} {row['seconds']:8.3f} s {row['tokens_per_second']:8,.0f} tokens/s"
                f" {row['share_of_matrix_rate']:5.0%} of {row['matrix_tflops']:.2f} TFLOP/s  {ratio}",
                flush=True,
            )
    settings = {
        "precision": precision,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "features": [name for name, there in torch.cpu.get_capabilities().items() if there is True],
        "torch": torch.__version__,
        "ops": str(ops.status()["cpu"]),
    }
    options.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
