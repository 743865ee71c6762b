import io

import pytest
from rich.console import Console

from mm_rec.training.console import Meter, ProgressLine, StepReport


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


def test_what_is_left_is_never_less_than_nothing() -> None:
    output = io.StringIO()
    progress = ProgressLine(Console(file=output, width=200, _environ={}), 2, 3, Meter(1))
    with progress.running():
        progress.update(report(3))
    assert "left 0.0 s" in output.getvalue()
