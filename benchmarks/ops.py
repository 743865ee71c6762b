"""Speed of the CPU kernels: alternating runs, medians.

    python -m benchmarks.ops [--rounds 15] [--only scan mdi] [--threads 2]

Each op is set against a plain copy of as many bytes as it has to read and write (``share_of_copy``), and those made of
matrix products against the rate of the model's own products too (``share_of_limit``: the slower of the two bounds it);
the recurrence against its reference loop and `nn.GRU` of the same width.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from mm_rec.bench.kernels import measure_kernels, measure_recurrence
from mm_rec.bench.limits import copy_rate, products_action
from mm_rec.bench.machine import describe_machine
from mm_rec.config import PRESETS

RESULT = Path(__file__).parent / "results" / "ops.json"
SHAPES = ((2, 512), (8, 2048))
"""A training step's, and one that no cache holds."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of ops; nothing is written then")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = PRESETS["100m"]
    products = products_action(config, "bf16", 1024)
    products()  # warms up
    matrix_rate = statistics.median(products() for _ in range(5))
    result: dict[str, object] = {
        "settings": describe_machine() | {"threads": options.threads, "rounds": options.rounds},
        "matrix_tflops": round(matrix_rate / 1e12, 3),
        "copy_gb_per_s": round(copy_rate() / 1e9, 2),
    }
    print(json.dumps(result))
    if not options.only or "recurrence" in options.only:
        result["recurrence"] = measure_recurrence(config, 2, 512, options.rounds)
        print(json.dumps(result["recurrence"]), flush=True)
    rows = []
    for batch, length in SHAPES:
        for row in measure_kernels(config, batch, length, matrix_rate, options.rounds, options.only):
            rows.append(row.to_dict())
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    result["kernels"] = rows
    if not options.only:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
