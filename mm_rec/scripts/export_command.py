"""Write a model as a folder for transformers, load it, there if it is installed, and compare; upload it to a hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mm_rec.errors import MissingPackageError, UserError
from mm_rec.program import Parser, run_program
from mm_rec.scripts.sampling_options import MODEL_HELP, add_adapter_argument, add_domain_argument
from mm_rec.translation import translate

if TYPE_CHECKING:
    from mm_rec.inference.loading import Loaded

EPILOG = """examples:
  mm-rec export --model checkpoints_cpu --output my-model
  mm-rec export --model checkpoints_cpu/stage1 --output python-model --domain code
  mm-rec export --model checkpoints_cpu/stage3 --adapter my-adapter --output merged-model
  mm-rec export --model checkpoints_cpu --output my-model --push my-name/my-model

README.md in the folder is a model card: what the model is, what it was taught and on which data, how good it is, how to
use it. Read it before others do, and choose a licence. Uploading needs the extra `train` and a token that may write, in
HF_TOKEN or from `hf auth login`.

In Python:
  import mm_rec.hf                                    # or trust_remote_code=True below
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("my-model")
  tokenizer = AutoTokenizer.from_pretrained("my-model")
"""
EVALUATION = Path("evaluation")
"""Where `mm-rec eval` writes if nothing else is named."""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, export, and upload what was exported if a name on a hub is given."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to make; it must not exist")
    add_adapter_argument(parser)
    add_domain_argument(parser)
    parser.add_argument(
        "--evaluation", type=Path, metavar="FOLDER",
        help="of the report of `mm-rec eval`, whose recall the model card shows (default: ./evaluation, if that is of "
        "this checkpoint)",
    )  # fmt: skip
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub, by default for you alone")
    parser.add_argument("--public", action="store_true", help="with --push: let everybody see a new model")
    options = parser.parse_args(arguments)
    if options.public and options.push is None:
        parser.error("--public says who sees what --push uploads; name the model with --push OWNER/NAME")
    return _export(options)


def _export(options: argparse.Namespace) -> int:
    from mm_rec.inference.export import compare_own, export
    from mm_rec.storage.hub.upload import require_login, upload_folder

    if options.push is not None:
        require_login(options.push)
    if options.evaluation is not None and options.adapter is not None:
        raise UserError("--evaluation tells nothing of a model with an --adapter; leave one of them out")

    def card(loaded: Loaded) -> str:
        from mm_rec.evaluation.model_card import write_card
        from mm_rec.evaluation.results_file import find_results

        folder, adapted = options.evaluation or EVALUATION, options.adapter is not None
        results = None
        if not adapted:
            results = find_results(folder, loaded.sha256, required=options.evaluation is not None)
        return write_card(loaded, options.push or options.output.name, results, adapted=adapted)

    missing = None
    try:
        from mm_rec.hf.compare import compare
    except MissingPackageError as error:
        missing, compare = error, compare_own
    for line in export(options.model, options.output, compare, options.domain, options.adapter, card):
        if missing is None:
            print(translate("the same in transformers: {line}", line=line))
        else:
            print(translate("the same here: {line}", line=line))
    if missing is not None:
        print(translate("not tried in transformers: {missing}", missing=missing))
    print(translate("exported to {output}", output=options.output))
    if options.push is not None:
        print(translate(upload_folder(options.output, options.push, public=options.public)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
