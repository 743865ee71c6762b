"""The picture of a run's losses."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mm_rec.training import plots
from mm_rec.training.plots import draw_losses


def test_the_picture_shows_both_domains(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = []
    for step in range(1, 300):
        lines.append({"step": step, "loss": 6.0, "losses": {"text" if step % 2 else "code": 7 - step**0.3}})
        if step % 50 == 0:
            lines.append({"step": step, "valid": {"text": 2.5 - step / 1000, "code": 2.2 - step / 900}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "stage1: runs/stage1", {"text": 4.0, "code": 3.0})
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (960, 720)
        colours = {colour[:3] for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert {(0x1F, 0x6F, 0xB4), (0xD9, 0x73, 0x0D)} <= colours


def test_a_run_without_steps_has_an_empty_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "nothing yet", {})
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_training_and_validation_have_one_unit_and_one_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "losses": {"text": 4 * math.log(2) * bits}} for step, bits in ((1, 3.0), (2, 2.5))]
    lines += [{"step": step, "valid": {"text": score}} for step, score in ((0, 8.0), (1, 2.75), (2, 2.8))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "FigureCanvasAgg", drawn.append)
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run", {"text": 4.0})
    [axes] = drawn[0].axes
    found = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}
    assert next(values for name, values in found.items() if name.startswith("_")) == pytest.approx([3.0, 2.5])
    assert found["text, validation: 2.800"] == [8.0, 2.75, 2.8]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "best by validation: step 1"] == [1]
    assert "bits per byte" in axes.get_ylabel()
