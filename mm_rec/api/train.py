"""Training from Python: :func:`mm_rec.train`, with the settings of ``mm-rec train`` as keywords."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mm_rec import processes
from mm_rec.api.documents import Texts, data_folder
from mm_rec.api.model import Model, load
from mm_rec.config import DOMAINS
from mm_rec.errors import UserError
from mm_rec.machine.signals import Interrupted, SignalGuard
from mm_rec.options import from_values
from mm_rec.storage.run_folder import METRICS, read_metrics
from mm_rec.training.check_settings import check_settings
from mm_rec.training.load_data import load_data
from mm_rec.training.minutes import choose_preset
from mm_rec.training.ranks import broadcast_path
from mm_rec.training.run_stages import train_stages
from mm_rec.training.settings import TrainSettings

__all__ = ["TrainedRun", "train"]

_DATA_SETTINGS = ("data_dir", "text_dir", "code_dir", "domain", "use_synthetic", "download_data")


class TrainedRun:
    """A run that has come to its end, as :func:`train` returns it. A notebook shows it as the picture of its loss.

    Attributes:
        folder: the run folder, with its records, samples, picture and checkpoints.
        checkpoint: the folder of its checkpoint that is best by validation, as a rule the last.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint.resolve()
        self.folder = self.checkpoint.parent.parent
        self._model: Model | None = None

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.folder)!r})"

    @property
    def model(self) -> Model:
        """The trained model, loaded when it is first asked for."""
        if self._model is None:
            self._model = load(self.checkpoint)
        return self._model

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of the run, one dictionary for each line of ``metrics.jsonl``.

        A training step has ``step``, ``loss`` (nats a token), ``bits_per_byte``, ``grad_norm``, ``rate`` and
        ``tokens`` (read so far); a validation has ``step`` and ``valid`` (bits per byte by domain). So the losses are
        ``[one["loss"] for one in run.metrics if "loss" in one]``.
        """
        return list(read_metrics(self.folder / METRICS))

    def _repr_png_(self) -> bytes | None:
        picture = self.folder / "loss.png"
        return picture.read_bytes() if picture.exists() else None


def train(data: Texts | Mapping[str, Texts] | None = None, *, quiet: bool = False, **settings: Any) -> TrainedRun:
    """Train a model as ``mm-rec train`` does. The same call again goes on with a run that was stopped.

    Args:
        data: what to train on: a data folder (with folders ``text`` and ``code``, or files of text); a file; documents
            as strings; or by domain any of the last two and folders, as in ``{"text": "book.txt", "code": programs}``
            or ``{"law": "law/", "medicine": "medicine/"}``. Each domain gets an expert of its own.
            None takes what the settings name: ``data_dir``, ``text_dir``, ``domain``, ``use_synthetic`` and the like.
        quiet: print nothing.
        settings: the settings of ``mm-rec train`` by name, such as ``minutes=10``, ``preset="small"``,
            ``max_steps=200``, ``stage="stage1"``, ``checkpoint_dir="checkpoints"``.

    Raises:
        UserError: if a setting is unknown, or something does not fit: the data, the memory, the disk, an earlier run.
        TypeError: if ``data`` is neither paths nor documents.
        KeyboardInterrupt: after Ctrl-C, when the step under way is done and saved; a second one does not wait.
        SystemExit: after SIGTERM, with everything saved.

    Example:
        >>> import mm_rec
        >>> run = mm_rec.train(use_synthetic=True, preset="tiny", max_steps=2, quiet=True)  # doctest: +SKIP
        >>> run.metrics[-1]["step"]  # doctest: +SKIP
        2
    """
    chosen = from_values(TrainSettings, settings)
    others = [name for name in _DATA_SETTINGS if settings.get(name)]
    if data is not None and others:
        raise UserError(f"data and {others[0]} both say what to train on; leave one of them out")
    try:
        with SignalGuard(ends_process=False) as guard, processes.process_group(chosen.device, lasting=True):
            console = Console(quiet=True) if quiet else processes.make_console()
            check_settings(chosen, chosen.stage_names())
            if data is not None:
                folder = data_folder(data, chosen.checkpoint_dir / "data") if processes.is_rank_zero() else Path()
                chosen = dataclasses.replace(chosen, data_dir=broadcast_path(folder))
                if isinstance(data, Mapping) and not set(data) <= set(DOMAINS):
                    chosen = dataclasses.replace(chosen, domain={name: chosen.data_dir / name for name in data})
            chosen = choose_preset(chosen, console)
            checkpoint = train_stages(chosen, load_data(chosen, console), guard, console)
    except Interrupted as stop:
        if stop.exit_code == 128 + signal.SIGINT:
            raise KeyboardInterrupt(str(stop)) from None
        raise SystemExit(stop.exit_code) from None
    return TrainedRun(checkpoint)
