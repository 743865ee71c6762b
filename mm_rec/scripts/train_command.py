"""Train one stage or all of them. The same command again goes on with a run that was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_rec.options import add_arguments, from_arguments
from mm_rec.program import Parser, run_program, say
from mm_rec.stages import PRETRAINING, STAGES
from mm_rec.training.settings import TrainSettings
from mm_rec.translation import Translatable, join_texts

EPILOG = """
examples:
  {prog} --stage stage1 --data_dir ./data --checkpoint_dir ./checkpoints
  {prog} --minutes 30 --data_dir ./data         as much as can be learned in half an hour
  {prog} --stage all --download_data
  {prog} --stage all --text_dir ./documents      on documents of your own alone, of any kind
  {prog} --stage all --domain law=./law --domain medicine=./medicine
  {prog} --use_synthetic --max_samples 10        a quick test of the machinery
  {prog} --config run.yaml --max_steps 2000      a settings file; flags win over it

A settings file holds the names below, and what differs by stage:
  preset: small
  max_steps: 400
  stages: {{stage2: {{max_steps: 100}}}}

MM_REC_MAX_STEPS=20 in the environment stops every stage after 20 steps.
"""


def main(
    arguments: list[str] | None = None,
    prog: str | None = None,
    *,
    description: str | None = __doc__,
    defaults: Mapping[str, Any] | None = None,
    samples: Mapping[str, int] | None = None,
) -> int:
    """Parse arguments and train.

    Args:
        arguments: those of the process if None.
        prog: name of the program, for its help.
        description: for its help.
        defaults: settings of this program that differ from the usual ones.
        samples: how many documents to download by domain; None for the usual number.
    """
    parser = Parser(prog=prog, description=description)
    stages = [
        Translatable("  {name:8}{summary}", name=name, summary=Translatable(STAGES[name].summary))
        for name in PRETRAINING
    ]
    parser.epilog = join_texts("\n", [Translatable("stages:"), *stages, Translatable(EPILOG, prog=parser.prog)])
    add_arguments(parser, TrainSettings, defaults, without=("lora", "lora_alpha"))
    settings = from_arguments(TrainSettings, parser.parse_args(arguments), defaults)

    return train(settings, samples or {})


def train(settings: TrainSettings, samples: Mapping[str, int]) -> int:
    """Get the data and train the stages; returns the exit code.

    Args:
        settings: the settings of the command.
        samples: how many documents to download by domain if that is asked for; a domain left out takes the default.
    """
    from mm_rec import processes
    from mm_rec.data.download_data import Request
    from mm_rec.machine.signals import SignalGuard
    from mm_rec.training.check_settings import check_settings
    from mm_rec.training.load_data import load_data
    from mm_rec.training.minutes import choose_preset
    from mm_rec.training.run_stages import train_stages

    with SignalGuard() as guard, processes.process_group(settings.device):
        check_settings(settings, settings.stage_names())
        console = processes.make_console()
        settings = choose_preset(settings, console)
        path = train_stages(settings, load_data(settings, console, Request(dict(samples))), guard, console)
        run = path.parent.parent
        say(
            console,
            Translatable(
                '\nloss picture: {picture}\nsamples: {samples}\ntry it: mm-rec generate --model {run} --prompt "The "',
                picture=run / "loss.png",
                samples=run / "samples",
                run=run,
            ),
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
