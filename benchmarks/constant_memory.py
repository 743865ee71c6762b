"""Peak memory of a forward pass over a long sequence in chunks: it must not grow with the length.

    python -m benchmarks.constant_memory --lengths 10000 100000

Each length runs in a process of its own, since a peak never falls again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from mm_rec.config import PRESETS, ModelConfig
from mm_rec.model import MMRecModel

RESULT = Path(__file__).parent / "results" / "constant_memory.json"


def measure(preset: str, length: int, chunk: int) -> dict[str, float | int | str]:
    """Run ``length`` random tokens through one expert and report the peak resident memory in MiB."""
    model = MMRecModel(ModelConfig.preset(preset)).eval()
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    state = None
    start = time.perf_counter()
    with torch.no_grad():
        for begin in range(0, length, chunk):
            _, state = model(tokens[:, begin : begin + chunk], state, "text")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "preset": preset,
        "length": length,
        "chunk": chunk,
        "peak_rss_mib": round(peak, 1),
        "tokens_per_second": round(length / seconds),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure each length in its own process, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--preset", choices=PRESETS, default="100m")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(measure(options.preset, options.lengths[0], options.chunk)))
        return 0
    rows = []
    for length in options.lengths:
        flags = ["--child", "--lengths", str(length), "--preset", options.preset, "--chunk", str(options.chunk)]
        command = [sys.executable, "-m", "benchmarks.constant_memory", *flags]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{length:>8,} tokens: peak {rows[-1]['peak_rss_mib']:,} MiB, {rows[-1]['tokens_per_second']:,} tokens/s")
    RESULT.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
