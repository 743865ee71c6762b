"""Write a model as a folder for transformers, load it, there if it is installed, and compare."""

from __future__ import annotations

from pathlib import Path

from mm_rec.errors import MissingPackageError
from mm_rec.program import Parser, run_program
from mm_rec.scripts.sampling_options import MODEL_HELP, add_adapter_argument, add_domain_argument

EPILOG = """examples:
  mm-rec export --model checkpoints_cpu --output my-model
  mm-rec export --model checkpoints_cpu/stage1 --output python-model --domain code
  mm-rec export --model checkpoints_cpu/stage3 --adapter my-adapter --output merged-model

In Python:
  import mm_rec.hf                                    # or trust_remote_code=True below
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("my-model")
  tokenizer = AutoTokenizer.from_pretrained("my-model")
"""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments and export."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to make; it must not exist")
    add_adapter_argument(parser)
    add_domain_argument(parser)
    options = parser.parse_args(arguments)

    from mm_rec.inference.export import compare_own, export

    try:
        from mm_rec.hf.compare import compare
    except MissingPackageError as missing:
        for line in export(options.model, options.output, compare_own, options.domain, options.adapter):
            print(f"the same here: {line}")
        print(f"not tried in transformers: {missing}")
    else:
        for line in export(options.model, options.output, compare, options.domain, options.adapter):
            print(f"the same in transformers: {line}")
    print(f"exported to {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
