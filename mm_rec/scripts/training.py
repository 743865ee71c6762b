"""What all training commands do once their settings are known: data, then stages."""

from __future__ import annotations

from rich.console import Console

from mm_rec.config import ModelConfig
from mm_rec.data.prepare import Prepared, prepare
from mm_rec.data.synthetic import DEFAULT_SAMPLES, write_synthetic
from mm_rec.launch import train_stages
from mm_rec.settings import TrainSettings
from mm_rec.signals import SignalGuard

__all__ = ["load_data", "train"]


def train(settings: TrainSettings) -> int:
    """Get the data, train the stages; returns the exit code."""
    console = Console()
    with SignalGuard() as guard:
        train_stages(settings, load_data(settings, console), guard, console)
    return 0


def load_data(settings: TrainSettings, console: Console) -> Prepared:
    """The data that ``settings`` name, prepared: made up, downloaded if asked for and missing, or what is there."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    folder = settings.data_dir
    if settings.use_synthetic:
        folder = folder / "synthetic"
        write_synthetic(folder, settings.max_samples or DEFAULT_SAMPLES)
    return prepare(
        folder,
        ModelConfig.preset(settings.preset).vocab_size,
        max_samples=settings.max_samples,
        filters=not settings.use_synthetic,
        skip_bad=settings.skip_bad,
        progress=say,
    )
