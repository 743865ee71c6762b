"""What a training run shows: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mm_rec.program import say
from mm_rec.storage.files import format_bytes
from mm_rec.translation import Translatable, translate

__all__ = ["Meter", "ProgressLine", "StepReport", "describe_seconds"]

WINDOW = 20
"""Steps over which the shown loss and speed are averaged."""
PLAIN_INTERVAL_SECONDS = 10.0


def describe_seconds(seconds: float) -> str:
    """A duration for people.

    >>> describe_seconds(8.04), describe_seconds(754), describe_seconds(11_100)
    ('8.0 s', '12:34', '3:05:00')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step as the progress line shows it; ``seconds`` is its own time, without saves and the like."""

    step: int
    loss: float
    bits_per_byte: float
    grad_norm: float
    rate: float
    tokens: int
    seconds: float


class Meter:
    """CPU use of this process since the last reading, in percent of its threads, and its memory."""

    def __init__(self, threads: int) -> None:
        self._process = psutil.Process()
        self._threads = threads
        self._process.cpu_percent()

    def read(self) -> tuple[float, int]:
        """CPU use in percent (all threads busy is 100) and resident bytes."""
        return self._process.cpu_percent() / self._threads, self._process.memory_info().rss


class ProgressLine:
    """The line of a run. Messages scroll above it.

    Attributes:
        steps: how many there are to be in all; may change on the way.
    """

    def __init__(self, console: Console, steps: int, first_step: int, meter: Meter) -> None:
        self._console = console
        self.steps = steps
        self._first_step = first_step
        self._meter = meter
        self._recent: deque[StepReport] = deque(maxlen=WINDOW)
        self._start = time.monotonic()
        self._last_plain = -PLAIN_INTERVAL_SECONDS
        self._live: Live | None = None

    @contextmanager
    def running(self) -> Iterator[ProgressLine]:
        """While the context lasts the line is live, if the console is a terminal."""
        self._start = time.monotonic()
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, refresh_per_second=4, transient=False) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def message(self, text: str) -> None:
        """Print a line or more above the live line."""
        say(self._console, text)

    def update(self, report: StepReport, seconds_left: float | None = None) -> tuple[float, int]:
        """Show a step; returns what the meter read.

        Args:
            report: the step.
            seconds_left: of the run; None if that follows from its speed so far.
        """
        if seconds_left is None:
            done = report.step - self._first_step + 1
            seconds_left = (time.monotonic() - self._start) / done * max(0, self.steps - report.step)
        self._recent.append(report)
        cpu, memory = self._meter.read()
        if self._live is not None:
            self._live.update(self._row(report, seconds_left, cpu, memory))
            return cpu, memory
        now = time.monotonic()
        if report.step in (self._first_step, self.steps) or now - self._last_plain >= PLAIN_INTERVAL_SECONDS:
            self._last_plain = now
            self.message(
                Translatable(
                    "step {step:>6}/{steps}  {figures}",
                    step=report.step,
                    steps=self.steps,
                    figures=self._figures(report, seconds_left, cpu, memory),
                )
            )
        return cpu, memory

    def _figures(self, report: StepReport, seconds_left: float, cpu: float, memory: int) -> Translatable:
        count = len(self._recent)
        seconds = sum(one.seconds for one in self._recent)
        return Translatable(
            "loss {loss:.3f}  {bits:.3f} bits/byte  {speed:,.0f} tokens/s  left {left}  CPU {cpu:.0f}%  "
            "memory {memory}  grad {norm:.2f}  lr {rate:.1e}",
            loss=sum(one.loss for one in self._recent) / count,
            bits=sum(one.bits_per_byte for one in self._recent) / count,
            speed=sum(one.tokens for one in self._recent) / max(seconds, 1e-9),
            left=describe_seconds(max(0.0, seconds_left)),
            cpu=cpu,
            memory=format_bytes(memory),
            norm=report.grad_norm,
            rate=report.rate,
        )

    def _row(self, report: StepReport, seconds_left: float, cpu: float, memory: int) -> Table:
        grid = Table.grid(padding=(0, 1))
        figures = translate(self._figures(report, seconds_left, cpu, memory))
        grid.add_row(
            Text(f"{report.step}/{self.steps}", style="bold"),
            ProgressBar(total=self.steps, completed=report.step, width=16),
            Text(figures),
        )
        return grid
