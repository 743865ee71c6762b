"""Measure the speed of training on this machine: tokens a second, and what share of its matrix rate they use."""

from __future__ import annotations

import argparse

from mm_rec.cli import run_program
from mm_rec.config import DEFAULT_PRESET, PRESETS
from mm_rec.settings import Parser

EPILOG = """examples:
  mm-rec bench
  mm-rec bench --preset small --batch_size 8 --seq_len 512 --precision fp32
"""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, measure, print."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--preset", choices=tuple(PRESETS), default=DEFAULT_PRESET)
    parser.add_argument("--batch_size", type=_count, default=2)
    parser.add_argument("--seq_len", type=_count, default=512)
    parser.add_argument("--steps", type=_count, default=5, help="steps to time (default 5)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--threads", type=_count)
    parser.add_argument("--device", default="auto")
    return _measure(parser.parse_args(arguments))


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _measure(options: argparse.Namespace) -> int:
    from mm_rec import ops
    from mm_rec.bench import matrix_rate, step_speed
    from mm_rec.device import select_device, select_precision, set_threads

    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    threads = set_threads(options.threads)
    config = PRESETS[options.preset]
    print(ops.status())
    print(f"{options.preset} on {device}, {precision}, {threads} threads")
    tokens = options.batch_size * options.seq_len
    rate = matrix_rate(config, precision, tokens, device)
    speed = step_speed(config, precision, options.batch_size, options.seq_len, options.steps, device)
    print(f"matrix products alone        {rate / 1e12:8.2f} TFLOP/s")
    print(f"training, {options.batch_size} x {options.seq_len} tokens, one expert")
    print(f"  a step                     {speed.seconds:8.3f} s")
    print(f"  speed                      {speed.tokens_per_second:8,.0f} tokens/s")
    print(f"  its matrix products        {speed.flops / 1e12:8.2f} TFLOP/s, {speed.flops / rate:.0%} of that rate")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
