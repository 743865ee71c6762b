"""The picture of a run's losses."""

import json
from pathlib import Path

from PIL import Image

from mm_rec.training.plots import draw_losses


def test_the_picture_shows_both_domains(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = []
    for step in range(1, 300):
        lines.append({"step": step, "loss": 6.0, "losses": {"text" if step % 2 else "code": 7 - step**0.3}})
        if step % 50 == 0:
            lines.append({"step": step, "valid": {"text": 2.5 - step / 1000, "code": 2.2 - step / 900}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "stage1: runs/stage1")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (960, 720)
        colours = {colour[:3] for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert {(0x1F, 0x6F, 0xB4), (0xD9, 0x73, 0x0D)} <= colours


def test_a_run_without_steps_has_an_empty_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "nothing yet")
    assert (tmp_path / "loss.png").stat().st_size > 1000
