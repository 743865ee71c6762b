"""Which size of model learns most in a given time on this machine.

Each size takes a few steps on made-up tokens, and the fit of :mod:`mm_rec.training.scaling` says what it would know at
the end. What was chosen is kept beside the runs: the same command means the same run, whatever the speed is then.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console

from mm_rec import processes
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.errors import UserError
from mm_rec.machine.device import apply_precision, select_device
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.program import say
from mm_rec.regular_file import read_regular
from mm_rec.stages import STAGES
from mm_rec.storage.files import reporting_errors, write_atomic
from mm_rec.training.estimate import count_parameters, training_bytes, with_margin
from mm_rec.training.runtime import choose_runtime, memory_of_process
from mm_rec.training.scaling import FITS
from mm_rec.training.settings import TrainSettings, share_of_time
from mm_rec.translation import Translatable

__all__ = ["CHOICES", "choose_preset"]

Settings = TypeVar("Settings", bound=TrainSettings)

CHOICES = "minutes.json"
"""In the folder of runs: the sizes that were chosen for a time, with what was asked."""
MEASURED_STEPS = 3
TRAINING_SHARE = 0.95
"""Share of the time that is spent in steps; the rest goes to saves and validation."""


class _Candidate(NamedTuple):
    preset: str
    tokens_per_second: float
    tokens: float
    bits: tuple[float, float]


def choose_preset(settings: Settings, console: Console) -> Settings:
    """Returns the settings with a preset that fits the time, where there is a time and no preset.

    Raises:
        UserError: if no preset fits into memory, or what was chosen before cannot be read.
    """
    if settings.minutes is None or settings.preset is not None or settings.model_shape():
        return settings
    preset = _choose(settings, console) if processes.is_rank_zero() else None
    return dataclasses.replace(settings, preset=processes.broadcast_json(preset))


def _choose(settings: TrainSettings, console: Console) -> str:
    names = ("minutes", "stage", "batch_size", "seq_len", "accumulation", "device", "precision", "threads")
    asked = {name: getattr(settings, name) for name in names}
    path = settings.checkpoint_dir / CHOICES
    choices = _read(path)
    for choice in choices:
        if choice["asked"] == asked and not settings.fresh:
            return str(choice["preset"])
    candidates = _measure(settings)
    best = min(candidates, key=lambda one: sum(one.bits))
    _tell(settings, candidates, best, console)
    kept = [choice for choice in choices if choice["asked"] != asked]
    with reporting_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps([*kept, {"asked": asked, "preset": best.preset}], indent=1) + "\n").encode())
    return best.preset


def _read(path: Path) -> list[dict[str, Any]]:
    """The choices so far; none where there is no file."""
    try:
        content = json.loads(read_regular(path))
        known = all(one["preset"] in PRESETS and isinstance(one["asked"], dict) for one in content)
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise UserError(
            "{path} is damaged; remove it, and the size of the model is chosen anew, or name a --preset", path=path
        )
    return list(content)


def _measure(settings: TrainSettings) -> list[_Candidate]:
    """What each preset would learn in the time, of those that fit into memory."""
    device = select_device(settings.device)
    stage = settings.stage_names()[0]
    one = settings.for_stage(stage)
    runtime = choose_runtime(one, device, {})
    sizes = STAGES[stage].sizes(device.type)
    shape = one.batch_size or sizes.batch_size, one.seq_len or sizes.seq_len
    minutes = share_of_time(settings.minutes or 0.0, (stage,), settings.stage_names())
    available = memory_of_process(device)
    candidates = []
    for preset, fit in FITS.items():
        config = ModelConfig.preset(preset)
        if with_margin(training_bytes(count_parameters(config), runtime.precision), 0) > available:
            continue
        speed = _tokens_per_second(config, runtime.precision, device, shape)
        tokens = 60 * minutes * TRAINING_SHARE * speed
        candidates.append(_Candidate(preset, speed, tokens, fit.bits_per_byte(tokens)))
    if not candidates:
        raise UserError("no preset fits into the memory that is free; free some, or name your own sizes by --d_model")
    return candidates


def _tokens_per_second(config: ModelConfig, precision: str, device: torch.device, shape: tuple[int, int]) -> float:
    """Tokens a second of training steps of ``shape`` (rows, tokens of a row), the median of a few."""
    model = MMRecModel(config)
    apply_precision(model, precision)
    model.to(device)
    optimizer = AdamW(model.named_parameters())
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    for _ in range(MEASURED_STEPS + 1):
        start = time.monotonic()
        output, _ = model(tokens, None, config.experts[0], targets=tokens)
        output.loss.backward()
        float(optimizer.step(0.0, 1.0))
        seconds.append(time.monotonic() - start)
    return tokens.numel() / statistics.median(seconds[1:])


def _tell(settings: TrainSettings, candidates: list[_Candidate], best: _Candidate, console: Console) -> None:
    """Print what was measured, what is to be expected and what more time would bring."""
    say(console, Translatable("{minutes:g} minutes on this machine, by preset:", minutes=settings.minutes))
    for one in candidates:
        text, code = one.bits
        line = Translatable(
            "  {preset:6} {speed:>9,.0f} tokens/s, {tokens:,.1f}M tokens in stage1: about {text:.2f} bits per byte of "
            "English books and {code:.2f} of Python code",
            preset=one.preset,
            speed=one.tokens_per_second,
            tokens=one.tokens / 1e6,
            text=text,
            code=code,
        )
        say(console, Translatable("{line}  <- chosen", line=line) if one is best else line)
    less_text, less_code = FITS[best.preset].per_doubling
    say(
        console,
        Translatable(
            "  twice the time would take about {less_text:.2f} and {less_code:.2f} off, given new data to read",
            less_text=less_text,
            less_code=less_code,
        ),
    )
