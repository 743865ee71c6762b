"""Train on the CPU. The same command again goes on with a run that was stopped."""

from __future__ import annotations

from mm_rec.program import run_program
from mm_rec.scripts import train_command

DEFAULTS = {"device": "cpu"}


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments and train; see :mod:`mm_rec.scripts.train_command`."""
    return train_command.main(arguments, prog, description=__doc__, defaults=DEFAULTS)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
