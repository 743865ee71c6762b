"""Continue a text with a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_rec.cli import run_program
from mm_rec.errors import UserError
from mm_rec.settings import Parser

EPILOG = """examples:
  mm-rec generate --model checkpoints_cpu --prompt "The "
  mm-rec generate --model checkpoints_cpu/stage1 --domain code --prompt "def add(" --temperature 0
  echo "Once upon" | mm-rec generate --model checkpoints_cpu --stop "." --seed 7
"""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, load the model, print the text as it comes."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, run folder or folder of runs")
    parser.add_argument("--prompt", help="text to continue; read from standard input if not given and not a terminal")
    parser.add_argument("--domain", help="the expert to use, or `all` to fuse them (default: what training reached)")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    parser.add_argument("--top_p", type=float, default=0.95, help="keep the likeliest with this much probability")
    parser.add_argument("--min_p", type=float, default=0.0, help="keep those this share as likely as the likeliest")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids what was said")
    parser.add_argument("--stop", action="append", default=[], help="end before this string; may be given often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    return _generate(parser.parse_args(arguments))


def _generate(options: argparse.Namespace) -> int:
    from mm_rec.generate import Sampling, generate
    from mm_rec.loading import load_model

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        stop=tuple(options.stop),
        seed=options.seed,
    )
    prompt = options.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    model, tokenizer, domain, _ = load_model(options.model, device=options.device, precision=options.precision)
    experts = model.config.experts
    if options.domain is not None:
        if options.domain not in (*experts, "all"):
            raise UserError(f"there is no expert {options.domain!r}; use --domain {', '.join(experts)} or all")
        domain = None if options.domain == "all" else options.domain
    sys.stdout.write(prompt)
    for piece in generate(model, tokenizer, prompt, sampling, domain):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
