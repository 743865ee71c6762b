"""The size of the model for a time: measured once, kept, and the user's own word before it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.training import minutes
from mm_rec.training.minutes import CHOICES, choose_preset
from mm_rec.training.settings import TrainSettings

SMALL = ModelConfig.preset("small")


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Tokens a second by preset, in place of a measurement; may be changed."""
    chosen = {"small": 12_000.0, "100m": 2_700.0}

    def measured(config: ModelConfig, *_: object) -> float:
        return chosen["small" if config == SMALL else "100m"]

    monkeypatch.setattr(minutes, "_tokens_per_second", measured)
    return chosen


def choose(folder: Path, output: io.StringIO | None = None, **changes: object) -> str | None:
    values = {"minutes": 10.0, "device": "cpu", "precision": "fp32", "threads": 1, "checkpoint_dir": folder, **changes}
    return choose_preset(TrainSettings(**values), Console(file=output or io.StringIO(), width=200)).preset


def test_a_short_time_takes_a_small_model_and_a_long_one_a_large(speeds: dict[str, float], tmp_path: Path) -> None:
    output = io.StringIO()
    assert choose(tmp_path, output) == "small"
    assert "small     12,000 tokens/s, 6.8M tokens in stage1: about 1.71 bits per byte" in output.getvalue()
    assert "<- chosen" in output.getvalue()
    assert choose(tmp_path, minutes=1000.0) == "100m"
    speeds["100m"] = 10_000.0
    assert choose(tmp_path / "fast") == "100m"


def test_another_speed_means_the_same_run(speeds: dict[str, float], tmp_path: Path) -> None:
    assert choose(tmp_path) == "small"
    speeds["100m"] = 50_000.0
    assert choose(tmp_path) == "small"
    assert choose(tmp_path, minutes=11.0) == "100m"
    assert choose(tmp_path, fresh=True) == "100m"
    assert choose(tmp_path) == "100m"  # the run that was begun last


def test_what_the_user_names_is_not_chosen(speeds: dict[str, float], tmp_path: Path) -> None:
    assert choose(tmp_path, preset="tiny") == "tiny"
    assert choose(tmp_path, d_model=128) is None
    assert choose(tmp_path, minutes=None) is None
    assert not (tmp_path / CHOICES).exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"preset": "huge", "asked": {}}]', "{}5"])
def test_a_damaged_file_of_choices_is_refused(speeds: dict[str, float], tmp_path: Path, content: str) -> None:
    (tmp_path / CHOICES).write_text(content)
    with pytest.raises(UserError, match=r"minutes\.json is damaged; remove it"):
        choose(tmp_path)


def test_the_speed_is_that_of_training_steps() -> None:
    config = ModelConfig.preset("tiny")
    assert minutes._tokens_per_second(config, "fp32", minutes.select_device("cpu"), (1, 32)) > 0
