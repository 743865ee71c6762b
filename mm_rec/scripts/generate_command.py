"""Continue a text with a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_rec.errors import UserError
from mm_rec.program import Parser, run_program
from mm_rec.scripts.sampling_options import (
    MODEL_HELP,
    MOST_CHARACTERS,
    add_adapter_argument,
    add_domain_argument,
    add_json_argument,
    add_memory_argument,
    add_sampling_arguments,
    add_weights_argument,
    given_sampling,
    read_json_schema,
    tell_on_stderr,
)
from mm_rec.translation import Translatable

EPILOG = """examples:
  mm-rec generate --model checkpoints_cpu --prompt "The "
  mm-rec generate --model checkpoints_cpu/stage1 --domain code --prompt "def add(" --temperature 0
  mm-rec generate --model checkpoints_cpu --memory ./notes --prompt "In short, "
  echo "Once upon" | mm-rec generate --model checkpoints_cpu --stop "." --seed 7
"""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, load the model, print the text as it comes."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--prompt", help="text to continue; read from standard input if not given and not a terminal")
    add_memory_argument(parser)
    add_adapter_argument(parser)
    add_domain_argument(
        parser, Translatable("all once fusion is trained, else the one that reads the prompt in the fewest bits")
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA if it is there")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="type of the matrices")
    add_weights_argument(parser)
    add_sampling_arguments(parser)
    add_json_argument(parser)
    return _generate(parser.parse_args(arguments))


def _generate(options: argparse.Namespace) -> int:
    from mm_rec.inference.generate import generate
    from mm_rec.inference.loading import load_model
    from mm_rec.inference.sampling import Sampling

    sampling = Sampling(**given_sampling(options))
    prompt = _read_prompt(options.prompt)
    schema = read_json_schema(options.json_schema)
    loaded = load_model(
        options.model,
        device=options.device,
        precision=options.precision,
        weights=options.weights,
        adapter=options.adapter,
    )
    state = None
    if options.memory is None:
        domain = loaded.choose_domain(options.domain, prompt)
    else:
        from mm_rec.inference.folder_memory import read_folder

        state, domain, _ = read_folder(options.memory, loaded, options.domain, tell_on_stderr)
    pieces = generate(loaded.model, loaded.tokenizer, prompt, sampling, domain, schema, state)
    sys.stdout.write(prompt + next(pieces, ""))  # what can't be drawn is refused before anything is written
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _read_prompt(given: str | None) -> str:
    """The prompt that was given, else what standard input holds if that is no terminal."""
    try:
        prompt = given if given is not None else "" if sys.stdin.isatty() else sys.stdin.read(MOST_CHARACTERS + 1)
        prompt.encode()  # an argument that is not UTF-8 comes with surrogates
    except UnicodeError as error:
        raise UserError("the prompt is not UTF-8 text; convert it first, for example with iconv") from error
    if len(prompt) > MOST_CHARACTERS:
        raise UserError("the prompt has more than {most:,} characters; give less of it", most=MOST_CHARACTERS)
    return prompt


if __name__ == "__main__":
    raise SystemExit(run_program(main))
