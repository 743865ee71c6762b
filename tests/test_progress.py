import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mm_rec.plots import draw_losses
from mm_rec.progress import Meter, ProgressLine, StepReport


def report(step: int) -> StepReport:
    return StepReport(step, 5.0 - step / 10, 2.0, 0.5, 1e-3, 1024, 0.5)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_line_says_what_is_promised(terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, _environ={})
    progress = ProgressLine(console, 3, 1, Meter(1))
    with progress.running():
        for step in (1, 2, 3):
            cpu, memory = progress.update(report(step))
            progress.message(f"[text] sample {step}")
    text = output.getvalue()
    assert cpu >= 0
    assert memory > 0
    for words in (
        "3/3",
        "loss 4.800",
        "bits/byte",
        "2,048 tokens/s",
        "left",
        "CPU",
        "memory",
        "grad 0.50",
        "lr 1.0e-03",
    ):
        assert words in text, words
    assert "[text] sample 2" in text  # not taken for markup
    assert ("\x1b" in text) == terminal


def test_without_a_terminal_lines_are_rare() -> None:
    output = io.StringIO()
    progress = ProgressLine(Console(file=output, width=200), 500, 1, Meter(1))
    with progress.running():
        for step in range(1, 501):
            progress.update(report(step))
    assert len(output.getvalue().splitlines()) < 20


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
