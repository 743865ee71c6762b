r"""Training speed on the CPU against Transformers, in one run: alternating steps, medians.

    python -m benchmarks.train_step --shapes 1x256 2x512 8x512 --models one_domain fused gpt2 gpt_compiled
    python -m benchmarks.train_step --quick --output /tmp/train_step.json

one_domain, fused   the `100m` preset, one expert or both
gpt2                GPT-2 110M of transformers (12 blocks of 768), autocast, fused AdamW, its best thread count
gpt, gpt_compiled   a modern GPT of 56M (12 blocks of 512: RMSNorm, rotary, ReLU^2), the same; eager or torch.compile

A step is forward, backward, clipping and optimizer on random tokens. `matrix rate` is what the model's own
matrix products reach alone in the same run; `share` is how much of it a training step uses. On levels up to AVX2:

    MM_REC_CPU_LEVEL=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python -m benchmarks.train_step --precision fp32 --models one_domain gpt2

``--quick`` is for two cores and two minutes: three shapes, few rounds, the compiled GPT last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from mm_rec.bench.machine import describe_machine
from mm_rec.bench.training import Contender, StepTime, compare_steps, contenders, tune_threads
from mm_rec.config import PRESETS
from mm_rec.machine.device import select_precision

RESULT = Path(__file__).parent / "results" / "train_step.json"
NAMES = ("one_domain", "fused", "gpt2", "gpt", "gpt_compiled")
TUNED = ("gpt2", "gpt")
"""Peers whose threads are tried out; compiled code is tied to the threads that it was compiled for."""
QUICK = (
    ("1x256", 5, ("one_domain", "fused", "gpt2")),
    ("2x512", 3, ("one_domain", "fused", "gpt2")),
    ("8x512", 1, ("one_domain", "gpt2")),
    ("2x512", 2, ("one_domain", "gpt_compiled")),  # compiling takes a minute
)
QUICK_SECONDS = 80  # after which no further row is begun


def measure(shape: str, entries: dict[str, Contender], rounds: int, precision: str) -> list[StepTime]:
    """Alternate the contenders' steps on one batch shape, and print a line for each."""
    batch, length = (int(part) for part in shape.split("x"))
    times = compare_steps(PRESETS["100m"], precision, batch, length, entries, rounds)
    yardstick = times["gpt2"].seconds if "gpt2" in times else None
    for one in times.values():
        ratio = f"{yardstick / one.seconds:5.2f}x gpt2" if yardstick else ""
        print(
            f"{shape:>7} {one.label:26} {one.seconds:8.3f} s {one.tokens_per_second:8,.0f} tokens/s"
            f" {one.flops / one.matrix_rate:5.0%} of {one.matrix_rate / 1e12:.2f} TFLOP/s  {ratio}",
            flush=True,
        )
    return list(times.values())


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x256", "2x512"], metavar="BxT")
    parser.add_argument("--models", nargs="+", default=["one_domain", "fused", "gpt2", "gpt"], choices=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    precision = select_precision(options.precision, torch.device("cpu"))
    config = PRESETS["100m"]
    plan = QUICK if options.quick else [(shape, options.rounds, options.models) for shape in options.shapes]
    entries: dict[str, Contender] = {}
    rows: list[StepTime] = []
    for shape, rounds, names in plan:
        if options.quick and time.monotonic() - start > QUICK_SECONDS:
            print(f"{shape:>7} {' '.join(names)} left out: {QUICK_SECONDS} s are over")
            continue
        entries |= contenders(config, precision, [name for name in names if name not in entries])
        for name in TUNED:
            if name in names and not rows and options.threads > 1:
                tune_threads(entries[name], config, sorted({1, options.threads // 2, options.threads}))
        rows += measure(shape, {name: entries[name] for name in names}, rounds, precision)
        result = {
            "settings": describe_machine() | {"precision": precision, "threads": options.threads},
            "rows": [row.to_dict() for row in rows],
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
