"""The picture of a run: training loss and validation, drawn from its metrics file."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mm_rec.storage.files import write_atomic
from mm_rec.storage.run_folder import read_metrics
from mm_rec.training.validations import Validations

__all__ = ["draw_losses"]

Points = list[tuple[int, float]]

COLOURS = {"text": "#1f6fb4", "code": "#d9730d", "mixed": "#3a923a"}
OTHER_COLOURS = ("#8c564b", "#7f3fbf", "#17808c")


def draw_losses(metrics: Path, picture: Path, title: str, bytes_per_token: Mapping[str, float]) -> None:
    """Draw ``metrics.jsonl`` into a PNG: training and validation by step, both in bits per byte.

    Args:
        metrics: lines with ``step`` and ``losses`` (nats a token), or with ``valid`` (and ``valid_by_expert`` where
            experts are fused): each a number by domain.
        picture: PNG to replace.
        title: above the picture.
        bytes_per_token: of the training data, by domain.
    """
    train: dict[str, Points] = defaultdict(list)
    valid: dict[str, Points] = defaultdict(list)
    by_expert: dict[str, Points] = defaultdict(list)
    validations = Validations()
    for record in read_metrics(metrics):
        for domain, loss in record.get("losses", {}).items():
            train[domain].append((record["step"], loss / (bytes_per_token[domain] * math.log(2))))
        for domain, score in record.get("valid", {}).items():
            valid[domain].append((record["step"], score))
        for domain, score in record.get("valid_by_expert", {}).items():
            by_expert[domain].append((record["step"], score))
        if "valid" in record:
            validations.add(record["step"], record["valid"])

    figure = Figure(figsize=(9.6, 7.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    axes = figure.subplots()
    _draw_train(axes, train)
    _draw_valid(axes, valid, by_expert)
    if validations.best_step is not None:
        label = f"best by validation: step {validations.best_step}"
        axes.axvline(validations.best_step, color="#57606a", linestyle="dotted", linewidth=1.5, label=label)
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel("bits per byte (fewer are better)", fontsize=12)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    if train or valid:
        axes.legend(fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(picture, buffer.getvalue())


def _colour(name: str, names: list[str]) -> str:
    return COLOURS.get(name, OTHER_COLOURS[sorted(names).index(name) % len(OTHER_COLOURS)])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential average over about a twentieth of the points, without the bias of its start."""
    keep = 1 - 1 / max(len(values) / 20, 5)
    average = weight = 0.0
    out = np.empty_like(values)
    for index, value in enumerate(values):
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out[index] = average / weight
    return out


def _draw_train(axes: Axes, series: dict[str, Points]) -> None:
    for name, points in sorted(series.items()):
        steps, losses = np.array(points, dtype=float).T
        colour = _colour(name, list(series))
        smoothed = _smooth(losses)
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smoothed, color=colour, linewidth=2, label=f"{name}, training: {smoothed[-1]:.3f}")


def _draw_valid(axes: Axes, series: dict[str, Points], by_expert: dict[str, Points]) -> None:
    for name, points in sorted(series.items()):
        steps, scores = np.array(points, dtype=float).T
        colour = _colour(name, list(series))
        label = f"{name}, validation: {scores[-1]:.3f}"
        axes.plot(steps, scores, color=colour, marker="o", markersize=6, linestyle="dashed", linewidth=1.5, label=label)
        if name in by_expert:
            steps, scores = np.array(by_expert[name], dtype=float).T
            label = f"{name}, validation by its own expert: {scores[-1]:.3f}"
            axes.plot(steps, scores, color=colour, linestyle="dashdot", linewidth=1.2, label=label)
