"""The data that training settings name: made up, downloaded if asked for and missing, or what is there; prepared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from mm_rec import processes
from mm_rec.config import DOMAINS, PRESETS
from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.reading import read_options
from mm_rec.data.download_data import Request, download
from mm_rec.data.prepare import prepare
from mm_rec.data.prepared import Prepared
from mm_rec.data.synthetic import DEFAULT_SAMPLES, write_synthetic
from mm_rec.program import say
from mm_rec.training.settings import TrainSettings
from mm_rec.translation import Translatable

__all__ = ["load_data"]


def load_data(settings: TrainSettings, console: Console, request: Request | None = None) -> Prepared:
    """Returns the data that ``settings`` name, ready to be trained on.

    Args:
        settings: the settings of the command.
        console: where to print.
        request: what to download if that is asked for and nothing is there; None for the default sources.

    Raises:
        UserError: if there is no data, too little, or a file that cannot be used.
    """
    tell = functools.partial(say, console)
    folder = settings.data_dir / "synthetic" if settings.use_synthetic else settings.data_dir
    folders = settings.domain_folders()
    with processes.rank_zero_first():
        if settings.use_synthetic:
            write_synthetic(folder, settings.max_samples or DEFAULT_SAMPLES)
        elif settings.download_data:
            wanted = dataclasses.replace(request or Request({}), language=settings.language)
            _download_missing(folder, settings.max_samples, wanted, tell)
    return prepare(
        folder,
        settings.vocab_size or PRESETS[settings.preset_name].vocab_size,
        max_samples=settings.max_samples,
        filters=not settings.use_synthetic,
        options=read_options(settings.encoding, settings.columns, settings.skip_bad),
        folders=folders or None,
        cache=settings.checkpoint_dir / "prepared",
        skip=[settings.checkpoint_dir],
        name_left_out=settings.list,
        progress=tell,
    )


def _download_missing(folder: Path, max_samples: int | None, request: Request, tell: Callable[[str], None]) -> None:
    """Download the domains that have no data file yet; without a network the builtin data take their place."""
    there = {name: (folder / name).is_dir() and bool(find_documents(folder / name).files) for name in DOMAINS}
    if all(there.values()):
        tell(Translatable("the data in {folder} is there already", folder=folder))
        return
    samples = request.samples if max_samples is None else dict.fromkeys(DOMAINS, max_samples)
    wanted = dataclasses.replace(request, samples=samples, text=not there["text"], code=not there["code"])
    download(folder, wanted, on_unreachable="builtin", tell=tell)
