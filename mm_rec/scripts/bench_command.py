"""Measure this machine: training, generation and kernels, against its own matrix products and copies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_rec.config import DEFAULT_PRESET, PRESETS
from mm_rec.errors import MissingPackageError
from mm_rec.program import Parser, positive_int, run_program

EPILOG = """examples:
  mm-rec bench
  mm-rec bench --peers --shapes 1x256 2x512 8x512
  mm-rec bench --device cuda --shapes 1x256 128x512
  mm-rec bench --preset small --precision fp32 --threads 1 --output ./bench
"""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, measure, print."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--preset", choices=tuple(PRESETS), default=DEFAULT_PRESET, help="size of the model to measure")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA if it is there (default)")
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=[(1, 256), (2, 512)], metavar="BxT",
        help="rows and tokens of the training steps to measure (default 1x256 2x512)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=positive_int, default=5, help="runs that the medians are of (default 5)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="type of the matrices")
    parser.add_argument("--threads", type=positive_int, help="CPU threads; if not given, as many as pay here")
    parser.add_argument("--peers", action="store_true", help="GPT-2 110M and a GPT of 56M beside it: transformers")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder for bench.json and roofline.png")
    return _measure(parser.parse_args(arguments))


def _shape(text: str) -> tuple[int, int]:
    batch, cross, length = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"must be batch x length, as in 2x512, got {text!r}")
    return positive_int(batch), positive_int(length)


def _measure(options: argparse.Namespace) -> int:
    import importlib.util

    from mm_rec.bench.report import BenchSettings, run_bench
    from mm_rec.machine.device import select_device, select_precision, set_threads

    if options.peers and importlib.util.find_spec("transformers") is None:
        raise MissingPackageError("--peers", "transformers")
    device = select_device(options.device)
    set_threads(options.threads)
    precision = select_precision(options.precision, device)
    settings = BenchSettings(
        options.preset, options.shapes, options.rounds, precision, options.peers, options.output, device
    )

    def write(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    run_bench(settings, write)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
