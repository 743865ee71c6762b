"""What all training commands do once their settings are known: data, then stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from mm_rec import processes
from mm_rec.config import ModelConfig
from mm_rec.data.download_data import Request, download
from mm_rec.data.files import find_files
from mm_rec.data.prepare import DOMAINS, Prepared, prepare
from mm_rec.data.synthetic import DEFAULT_SAMPLES, write_synthetic
from mm_rec.program import say
from mm_rec.run_stages import train_stages
from mm_rec.settings import TrainSettings
from mm_rec.signals import SignalGuard

__all__ = ["load_data", "train"]


def train(settings: TrainSettings, request: Request | None = None) -> int:
    """Get the data, train the stages; returns the exit code.

    Args:
        settings: of the command.
        request: what to download if that is asked for and nothing is there; None for the default sources.
    """
    with SignalGuard() as guard, processes.process_group(settings.device):
        console = processes.make_console()
        path = train_stages(settings, load_data(settings, console, request), guard, console)
        run = path.parent.parent
        say(
            console,
            f"\nloss picture: {run / 'loss.png'}\nsamples: {run / 'samples'}\n"
            f'try it: mm-rec generate --model {run} --prompt "The "',
        )
    return 0


def load_data(settings: TrainSettings, console: Console, request: Request | None = None) -> Prepared:
    """The data that ``settings`` name, prepared: made up, downloaded if asked for and missing, or what is there."""
    tell = functools.partial(say, console)
    folder = settings.data_dir / "synthetic" if settings.use_synthetic else settings.data_dir
    with processes.rank_zero_first():
        if settings.use_synthetic:
            write_synthetic(folder, settings.max_samples or DEFAULT_SAMPLES)
        elif settings.download_data:
            _download_missing(folder, settings.max_samples, request or Request({}), tell)
    return prepare(
        folder,
        settings.vocab_size or ModelConfig.preset(settings.preset).vocab_size,
        max_samples=settings.max_samples,
        filters=not settings.use_synthetic,
        skip_bad=settings.skip_bad,
        progress=tell,
    )


def _download_missing(folder: Path, max_samples: int | None, request: Request, tell: Callable[[str], None]) -> None:
    """Download the domains that have no data file yet; without a network the builtin data stand in."""
    there = {name: (folder / name).is_dir() and bool(find_files(folder / name)) for name in DOMAINS}
    if all(there.values()):
        tell(f"the data in {folder} is there already")
        return
    samples = request.samples if max_samples is None else dict.fromkeys(DOMAINS, max_samples)
    wanted = dataclasses.replace(request, samples=samples, text=not there["text"], code=not there["code"])
    download(folder, wanted, on_unreachable="builtin", tell=tell)
