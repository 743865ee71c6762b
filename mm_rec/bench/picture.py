"""The roofline: operations a second by operations a byte, under what the machine's products and copies allow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mm_rec.storage.files import write_atomic

__all__ = ["Point", "draw_roofline"]

COLOURS = {"kernel": "#1f6fb4", "training": "#d9730d", "peer": "#8c564b"}


class Point(NamedTuple):
    """Something measured: ``kind`` is one of ``COLOURS``; operations and bytes of a call, and what it took."""

    label: str
    kind: str
    flop: float
    size: float
    seconds: float


def draw_roofline(points: Sequence[Point], matrix_rate: float, copy_rate: float, picture: Path, title: str) -> None:
    """Draw a PNG.

    Args:
        points: with operations; at least one.
        matrix_rate: operations a second of the machine's matrix products.
        copy_rate: bytes a second of a large copy.
        picture: PNG to replace.
        title: above the picture.
    """
    figure = Figure(figsize=(11.2, 5.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=13)
    intensities = [point.flop / point.size for point in points]
    ridge = matrix_rate / copy_rate
    x = np.geomspace(min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3, 200)
    label = f"products {matrix_rate / 1e12:.2f} TFLOP/s, copy {copy_rate / 1e9:.0f} GB/s"
    axes.loglog(x, np.minimum(matrix_rate, x * copy_rate) / 1e9, color="#444444", linewidth=2, label=label)
    for number, point in enumerate(sorted(points, key=lambda point: point.seconds / point.flop), start=1):
        place = (point.flop / point.size, point.flop / point.seconds / 1e9)
        axes.scatter(*place, color=COLOURS[point.kind], s=36, zorder=3, label=f"{number}  {point.label}")
        axes.annotate(str(number), place, fontsize=9, xytext=(5, 4), textcoords="offset points")
    axes.set_xlabel("operations a byte", fontsize=12)
    axes.set_ylabel("GFLOP/s", fontsize=12)
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, not powers of ten
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}" if axis is axes.yaxis else NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(picture, buffer.getvalue())
