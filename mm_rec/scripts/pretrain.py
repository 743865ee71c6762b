"""Pre-train on WikiText-103 and Python code: all three stages. Data that is missing is downloaded first.

Without a network it trains on real text and code of this machine's own Python installation. The same command
again goes on with a run that was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder of this script is on the path, the package is not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mm_rec.program import run_program
from mm_rec.scripts import train_command

DEFAULTS = {
    "stage": "all",
    "data_dir": Path("data/pretrain"),
    "checkpoint_dir": Path("checkpoints_pretrain"),
    "download_data": True,
}
SAMPLES = {"text": 100_000, "code": 10_000}


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments and train; see :mod:`mm_rec.scripts.train_command`."""
    return train_command.main(arguments, prog, description=__doc__, defaults=DEFAULTS, samples=SAMPLES)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
