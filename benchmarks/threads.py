"""The kernels in OpenMP's threads and in their own (``cpp/src/parallel.cpp``), in turn: a training step, and one token.

    python -m benchmarks.threads [--threads 2] [--rounds 40] [--steps 8] [--out benchmarks/results/NAME.json]

Both use the same library and the same model in one process. A round is one timing of either, whose order changes from
round to round; the ratio is own threads over OpenMP's, over 1 where they are slower. PyTorch's own products stay in
OpenMP's threads, which wait for a while before they sleep: own threads have to live beside them. What each computes is
compared bit for bit before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.bench.machine import describe_machine
from mm_rec.bench.training import CLIP, RATE, random_batch
from mm_rec.config import PRESETS
from mm_rec.inference import decode
from mm_rec.inference.quantize import pack_matrices
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.ops.cpu.load_library import CpuLibrary
from mm_rec.optim import AdamW
from mm_rec.program import positive_int

KINDS = ("OpenMP", "own")
STEP_TOKENS = 8
"""One-token steps of one timing."""


def training_step(preset: str, precision: str) -> Callable[[], Tensor]:
    """Returns a function that trains one step on (2, 128) tokens and returns all parameters after it, as one row."""
    config = PRESETS[preset]
    torch.manual_seed(0)
    model = MMRecModel(config)
    apply_precision(model, precision)
    optimizer = AdamW(model.named_parameters())
    tokens, targets = random_batch(config, 2, 128)

    def step() -> Tensor:
        output, _ = model(tokens, None, config.experts[0], targets=targets)
        output.loss.backward()
        optimizer.step(RATE, CLIP)
        return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])

    return step


def single_tokens(preset: str, precision: str) -> Callable[[], Tensor]:
    """Returns a function that makes the next :data:`STEP_TOKENS` tokens of one sequence and returns the last logits."""
    torch.manual_seed(0)
    model = MMRecModel(PRESETS[preset])
    apply_precision(model, precision)
    pack_matrices(model)
    domain = model.config.experts[0]
    state = model.initial_state(1, domain)

    @torch.inference_mode()
    def steps() -> Tensor:
        after = state
        token = torch.tensor([1])
        for _ in range(STEP_TOKENS):
            logits, after = decode.step(model, token, after, domain)
            token = logits.argmax(dim=-1)
        return logits

    return steps


def compare(make: Callable[[], Callable[[], Tensor]], library: CpuLibrary, rounds: int) -> dict[str, object]:
    """Times both kinds of threads in turn; returns medians in milliseconds and the ratios of the rounds."""
    results, actions = [], {}
    for kind in KINDS:
        library.use_openmp(kind == "OpenMP")
        actions[kind] = make()
        results.append(actions[kind]())
    if not torch.equal(*results):
        raise RuntimeError("the two kinds of threads don't give the same bits")
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index in range(rounds):
        for kind in KINDS if index % 2 else KINDS[::-1]:
            library.use_openmp(kind == "OpenMP")
            start = time.perf_counter()
            actions[kind]()
            seconds[kind].append(time.perf_counter() - start)
    ratios = sorted(own / openmp for openmp, own in zip(seconds["OpenMP"], seconds["own"], strict=True))
    quarter = len(ratios) // 4
    return {
        **{f"{kind}_ms": round(1000 * statistics.median(values), 2) for kind, values in seconds.items()},
        **{f"{kind}_least_ms": round(1000 * min(values), 2) for kind, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "middle_half_of_ratios": [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)],
        "rounds": rounds,
    }


def main() -> None:
    """Measure and print; with ``--out``, write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive_int, default=os.cpu_count())
    parser.add_argument("--rounds", type=positive_int, default=40)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ops.status()
    library = CpuLibrary()
    if not library.use_openmp(True):
        sys.exit("error: this process has no OpenMP to compare with")
    result: dict[str, object] = {"machine": describe_machine(), "threads": options.threads}
    for precision in ("bf16", "fp32"):
        for name, make in ((f"{STEP_TOKENS} single tokens", single_tokens), ("training step", training_step)):
            measured = compare(partial(make, options.preset, precision), library, options.rounds)
            result[f"{name}, {options.preset}, {precision}"] = measured
            print(f"{name}, {options.preset}, {precision}: {measured}", flush=True)
            if options.out is not None:  # after each: on a busy machine the whole takes long
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
