"""The program ``mm-rec``: one table of subcommands, each imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from mm_rec.errors import UserError, find_missing_package
from mm_rec.program import run_program
from mm_rec.translation import translate

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    """A subcommand: the module whose ``main(arguments, prog)`` runs it, and one line about it."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("mm_rec.scripts.demo_command", "all of it once, in 20 minutes: data, training, answers"),
    "data": Command("mm_rec.data.download_data", "download text and code, or take what this machine has"),
    "tokenizer": Command("mm_rec.scripts.tokenizer_command", "train a tokenizer, or see how one cuts a text"),
    "train": Command("mm_rec.scripts.train_command", "train one stage or all, and go on with a stopped run"),
    "finetune": Command("mm_rec.scripts.finetune_command", "teach a trained model to follow instructions, or to chat"),
    "pipeline": Command(
        "mm_rec.scripts.pipeline_command", "everything in one: train all stages, then instruct, then chat"
    ),
    "generate": Command("mm_rec.scripts.generate_command", "continue a text"),
    "chat": Command("mm_rec.scripts.chat_command", "talk with a model that remembers in a file of constant size"),
    "eval": Command("mm_rec.scripts.eval_command", "measure a model and write a report page"),
    "export": Command("mm_rec.scripts.export_command", "write a folder for transformers, and compare what it loads"),
    "serve": Command("mm_rec.scripts.serve_command", "serve a model over HTTP, with a chat page"),
    "doctor": Command("mm_rec.scripts.doctor_command", "check this machine and a run folder"),
    "bench": Command("mm_rec.scripts.bench_command", "measure the speed of training on this machine"),
}

HELP = """usage: mm-rec COMMAND [OPTIONS]

A small language model with a memory of fixed size, trained on the machine you have.

{commands}

Each explains itself: mm-rec COMMAND --help

A first model in one command: mm-rec demo. Step by step:

  mm-rec data --output_dir ./data --text_samples 500 --code_samples 500
  mm-rec train --stage stage1 --data_dir ./data --checkpoint_dir ./checkpoints
  mm-rec generate --model ./checkpoints --prompt "The "
"""


def main(arguments: list[str] | None = None) -> int:
    """Run ``mm-rec`` with these arguments (those of the process if None); returns the exit code."""
    return run_program(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        commands = "\n".join(f"  {name:{width}}  {translate(command.summary)}" for name, command in COMMANDS.items())
        sys.stdout.write(translate(HELP, commands=commands))
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        from mm_rec import __version__

        sys.stdout.write(f"mm-rec {__version__}\n")
        return 0
    if name not in COMMANDS:
        raise UserError(
            "there is no command {name!r}; there are {commands}", name=name[:80], commands=", ".join(COMMANDS)
        )
    try:
        module = importlib.import_module(COMMANDS[name].module)
        return int(module.main(rest, prog=f"mm-rec {name}"))
    except ModuleNotFoundError as error:
        raise find_missing_package(error, f"mm-rec {name}") or error from None


if __name__ == "__main__":
    raise SystemExit(main())
