"""The picture of recall: right answers by distance, of models from scratch and of trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#8c564b", "#1f6fb4", "#d9730d", "#3a923a", "#7f3fbf")
WINDOW = 128


def best_run(result: dict[str, Any]) -> dict[str, Any]:
    """The run whose worst distance is best."""
    return max(result["runs"], key=lambda run: min(part["accuracy"] for part in run["by_distance"]))


def draw(results: Sequence[dict[str, Any]], picture: Path) -> None:
    """A panel for each MQAR task and for each kind of needle, with a curve for each model."""
    tasks = sorted({(one["settings"]["tokens"], one["settings"]["pairs"]) for one in results if "runs" in one})
    trained = [one for one in results if "needles" in one]
    kinds = list(dict.fromkeys(cell["kind"] for one in trained for cell in one["needles"]))
    labels = list(dict.fromkeys(one["label"] for one in results))
    colour = {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}
    count = len(tasks) + len(kinds)
    figure = Figure(figsize=(1 + 3.2 * count, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.atleast_1d(figure.subplots(1, count, sharey=True)))
    for (tokens, pairs), axes in zip(tasks, panels, strict=False):
        for one in results:
            if "runs" not in one or (one["settings"]["tokens"], one["settings"]["pairs"]) != (tokens, pairs):
                continue
            parts = [part for part in best_run(one)["by_distance"] if part["answers"]]
            shares = [part["accuracy"] for part in parts]
            axes.plot(range(len(parts)), shares, "o-", color=colour[one["label"]], linewidth=2, label=one["label"])
            axes.set_xticks(range(len(parts)), [f"< {part['to']:,}" for part in parts], fontsize=11)
        axes.set_title(f"{pairs} pairs in {tokens:,} tokens, from scratch", fontsize=12)
        axes.set_xlabel("tokens between pair and question", fontsize=12)
        axes.axvline(np.log2(WINDOW / 64) + 0.5, color="#57606a", linestyle=":", label="beyond the window")
    for kind, axes in zip(kinds, panels[len(tasks) :], strict=True):
        draw_needles(axes, kind, trained, colour)
    panels[0].set_ylabel("right answers", fontsize=12)
    for axes in panels:
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), fontsize=11, loc="outside lower center", ncols=3)
    figure.savefig(picture)


def draw_needles(axes: Axes, kind: str, trained: Sequence[dict[str, Any]], colour: dict[str, str]) -> None:
    """The needles of one kind, with their intervals."""
    distances = sorted({cell["distance"] for one in trained for cell in one["needles"]})
    for one in trained:
        row = [cell for cell in one["needles"] if cell["kind"] == kind]
        places = [distances.index(cell["distance"]) for cell in row]
        shares = np.array([cell["right"] / cell["trials"] for cell in row])
        axes.plot(places, shares, "o-", color=colour[one["label"]], linewidth=2, label=one["label"])
        axes.fill_between(
            places,
            [cell["low"] for cell in row],
            [cell["high"] for cell in row],
            color=colour[one["label"]],
            alpha=0.15,
            linewidth=0,
        )
    axes.axhline(trained[0]["needles"][0]["chance"], linestyle="--", color="#57606a", label="by chance")
    axes.set_xticks(range(len(distances)), [f"{distance:,}" for distance in distances], fontsize=11)
    axes.set_title(f"needle: {kind}", fontsize=12)
    axes.set_xlabel("tokens between needle and question", fontsize=12)
