"""Training speed on one GPU: the `100m` preset against a GPT of 110M, in one run.

    python -m benchmarks.gpu_train [--result benchmarks/results/gpu_train.json] [--rows one_domain-512 gpt-512 ...]

A step is forward, backward, clipping and optimizer on random tokens; documents start about every 500 tokens. MM-Rec
takes micro-batches of up to 65,536 tokens by CUDA graphs, as the trainer does (`launched ms` is without them), and runs
rows of more than 2,048 tokens in chunks of 2,048 with its state carried. The GPT (12 blocks of
768: RMSNorm, rotary, QK-norm, ReLU^2, tied head) runs whole rows through torch.compile and PyTorch's flash attention.
`share` is the part of the rate of a large matrix product that the operations of the model's products make up.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_ops import machine, matrix_rate
from mm_rec.bench.peers import ModernGPT
from mm_rec.config import PRESETS
from mm_rec.data.batches import Batch
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import ModelState, map_state
from mm_rec.training.cuda_graphs import GraphedPass, run_pass

RESULT = Path(__file__).parent / "results" / "gpu_train.json"
CHUNK, MICRO_BATCH, VOCABULARY = 2048, 65_536, 32_000
Step = Callable[[], object]

# Name: model, tokens in a row, rows. All but the long rows of MM-Rec make 65,536 tokens a step; a larger step of the
# GPT is several of these, with one optimizer pass less.
ROWS = {
    "one_domain-512": ("text", 512, 128),
    "one_domain-8192": ("text", 8192, 64),
    "one_domain-1x256": ("text", 256, 1),
    "one_domain-32768": ("text", 32_768, 16),
    "fused-512": (None, 512, 128),
    "fused-8192": (None, 8192, 64),
    "one_domain-2048": ("text", 2048, 32),
    "fused-32768": (None, 32_768, 16),
    "fused-2048": (None, 2048, 32),
    "gpt-512": ("gpt", 512, 128),
    "gpt-8192": ("gpt", 8192, 8),
    "gpt-32768": ("gpt", 32_768, 2),
    "gpt-2048": ("gpt", 2048, 32),
}


def batch(rows: int, time_: int, domain: str | None) -> Batch:
    """Random tokens; documents of about 500 start anywhere."""
    tokens, targets = torch.randint(VOCABULARY, (2, rows, time_), device="cuda")
    reset = torch.rand(rows, time_, device="cuda") < 1 / 500
    reset[:, 0] = True
    return Batch(tokens, targets, torch.full((rows, time_), 1 / (rows * time_), device="cuda"), reset, domain)


def mm_rec_step(domain: str | None, time_: int, rows: int) -> tuple[nn.Module, Step, Step, int]:
    """The model, a training step by graphs as the trainer takes it, one launched op by op, and the parameters that
    its matrix products use.
    """
    model = MMRecModel(PRESETS["100m"]).cuda()
    apply_precision(model, "bf16")
    optimizer = AdamW(model.named_parameters())
    chunk = min(time_, CHUNK)
    group = min(rows, MICRO_BATCH // chunk)
    micro_batches = [batch(group, chunk, domain) for _ in range(rows // group * (time_ // chunk))]
    parts = len(micro_batches)

    def loss_of(one: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        output, after = model(one.tokens, state, domain, one.reset, targets=one.targets, weight=one.weight)
        return output.loss, after

    def take(run: Callable[[Batch, ModelState | None], tuple[Tensor, ModelState]]) -> None:
        for first in range(0, len(micro_batches), time_ // chunk):
            state = model.initial_state(group, domain)
            for one in micro_batches[first : first + time_ // chunk]:
                _, after = run(one, state)
                optimizer.accumulate()
                state = map_state(after, lambda tensor: tensor.detach().clone())
        optimizer.step(1e-4, 1.0)

    graphed = GraphedPass(loss_of, list(model.parameters()), parts)
    used = [
        p for name, p in model.named_parameters() if domain is None or f"experts.{domain}." in name or "embed" in name
    ]
    parameters = sum(p.numel() for p in used if p.ndim == 2)
    return model, lambda: take(graphed), lambda: take(partial(run_pass, loss_of, parts=parts)), parameters


def gpt_step(time_: int, rows: int) -> tuple[nn.Module, Step, int]:
    """The model, a compiled training step, and the parameters that its matrix products use."""
    model = ModernGPT(VOCABULARY, 768, 12, 12).cuda()
    apply_precision(model, "bf16")
    optimizer = AdamW(model.named_parameters())
    one = batch(rows, time_, None)

    @torch.compile(dynamic=False)
    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())

    def step() -> None:
        loss(one.tokens, one.targets).backward()
        optimizer.step(1e-4, 1.0)

    return model, step, sum(p.numel() for p in model.parameters() if p.ndim == 2)


def milliseconds(step: Step, repeats: int = 6) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def kernel_times(step: Step, most: int = 45) -> list[dict[str, Any]]:
    """Where the time of one step goes, by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:most]
    return [{"kernel": r.key[:150], "ms": r.self_device_time_total / 1e3, "count": r.count} for r in rows]


def measure(name: str, rate: float, result: dict[str, Any]) -> None:
    """Fill in ``result``, bit by bit: what is there counts if something fails."""
    kind, time_, rows = ROWS[name]
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    graphed: Step | None = None
    if kind == "gpt":
        model, step, parameters = gpt_step(time_, rows)
    else:
        model, graphed, step, parameters = mm_rec_step(kind, time_, rows)
    step()
    torch.cuda.synchronize()
    tokens = rows * time_
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "tokens a step": tokens}
    result["s to the first timed step"] = time.perf_counter() - start
    result["launched ms"] = ms = milliseconds(step, 6 if graphed is None else 2)
    result["peak GB"] = torch.cuda.max_memory_allocated() / 1e9  # a graph's own memory is not counted
    if graphed is not None:
        graphed()
        result["ms"] = ms = milliseconds(graphed)
        step = graphed
    result["tokens/s"] = tokens / ms * 1e3
    result["share"] = 6 * parameters * tokens / ms * 1e3 / rate
    if name.endswith("-512"):
        result["kernels"] = kernel_times(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--commit", help="of the code measured, where git does not know")
    arguments = parser.parse_args()
    rate = matrix_rate()
    found: dict[str, Any] = {"machine": machine(arguments.commit), "matrix TFLOP/s": rate / 1e12, "rows": []}
    for name in arguments.rows:
        row: dict[str, Any] = {"row": name}
        found["rows"].append(row)
        try:
            measure(name, rate, row)
        except Exception as error:  # such as too little memory: the other rows count all the same
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
        print(f"{name:18s} {numbers} {row.get('error', '')}", flush=True)
        arguments.result.write_text(json.dumps(found, indent=1) + "\n")  # what is there counts, even if cut short


if __name__ == "__main__":
    main()
