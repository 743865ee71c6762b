"""What was measured of a model as one page: HTML with its pictures inside, and the numbers as JSON beside it."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mm_rec.evaluation.bits_per_byte import position_bounds
from mm_rec.evaluation.recall import Needles
from mm_rec.evaluation.results_file import RESULTS
from mm_rec.storage.files import write_atomic

__all__ = ["Measurements", "write_report"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #d6dae0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
p.note { color: #57606a; } pre { background: #f4f6f8; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
"""
COLOURS = ("#1f6fb4", "#d9730d", "#3a923a", "#8c564b", "#7f3fbf", "#17808c")


@dataclass
class Measurements:
    """All that was measured; what is empty was not.

    Attributes:
        model: facts about the model, in words, by name.
        origin: of each set of documents, whether it was held out or how much of it was seen in training.
        bits_per_byte: of each set of documents, by who read them (the name of an expert, or ``fused``).
        by_position: of each set of documents, by who read them, bits per byte by the place in a document, for the
            ranges of :func:`mm_rec.evaluation.bits_per_byte.position_bounds`; None where there is nothing.
        needles: what was hidden and asked for.
        tasks: numbers of each task of lm-eval.
        conversation: what the model said when asked.
    """

    model: dict[str, str]
    origin: dict[str, str] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    by_position: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    needles: list[Needles] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    conversation: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "needles": [one._asdict() for one in self.needles]}


def write_report(folder: Path, measured: Measurements) -> Path:
    """Write ``report.html`` and ``results.json`` into ``folder``, which is made if missing; returns the page.

    Raises:
        StorageError: if they can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(measured.as_json(), indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / RESULTS, numbers.encode("utf-8", "replace"))
    page = folder / "report.html"
    write_atomic(page, _page(measured).encode("utf-8", "replace"))
    return page


def _page(measured: Measurements) -> str:
    sections = [
        _table("", {name: [value] for name, value in measured.model.items()}),
        *_bits_per_byte(measured.bits_per_byte, measured.origin),
        *_by_position(measured.by_position),
        *_needles(measured.needles),
    ]
    if measured.tasks:
        sections.append(_heading("Tasks of the LM Evaluation Harness"))
        for task, numbers in measured.tasks.items():
            sections.append(_table(task, {name: [f"{value:.4f}"] for name, value in numbers.items()}, [""]))
    if measured.conversation:
        sections += [_heading("A conversation"), f"<pre>{html.escape(measured.conversation)}</pre>"]
    title = html.escape(f"MM-Rec: {measured.model.get('checkpoint', '')}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _bits_per_byte(scores: Mapping[str, Mapping[str, float]], origin: Mapping[str, str]) -> list[str]:
    if not scores:
        return []
    readers = list(next(iter(scores.values())))
    rows = {name: [*(f"{one[reader]:.4f}" for reader in readers), origin.get(name, "")] for name, one in scores.items()}
    figure, axes = _figure()
    width = 0.8 / len(readers)
    for index, reader in enumerate(readers):
        places = [place + (index - (len(readers) - 1) / 2) * width for place in range(len(scores))]
        bars = axes.bar(
            places, [one[reader] for one in scores.values()], width * 0.94, color=COLOURS[index], label=reader
        )
        axes.bar_label(bars, fmt="%.3f", fontsize=10, padding=2)
    axes.set_xticks(range(len(scores)), list(scores), fontsize=12)
    axes.set_ylabel("bits per byte", fontsize=12)
    axes.set_ylim(top=1.15 * max(value for one in scores.values() for value in one.values()))
    figure.legend(title="read by", loc="outside upper right", fontsize=11, ncols=len(readers))
    note = (
        "How many bits the model needs, on average, to tell each byte of a text: lower is better, and a model that "
        "knows nothing needs 8. Each document is read from its start to its end with the state carried."
    )
    return [
        _heading("Bits per byte", note),
        _table("documents", rows, [*readers, "where from"]),
        _picture(figure, "bits per byte by reader"),
    ]


def _by_position(scores: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[str]:
    if not scores:
        return []
    note = "The same by the place in a document: what is far from its beginning can be told from more that was read."
    sections = [_heading("Bits per byte by position", note)]
    figure, axes = _figure()
    longest = max(len(values) for one in scores.values() for values in one.values())
    names = _ranges(longest)
    for index, (name, readers) in enumerate(scores.items()):
        rows = {reader: ["" if one is None else f"{one:.4f}" for one in values] for reader, values in readers.items()}
        count = max(map(len, readers.values()))
        sections.append(_table(name, rows, names[:count]))
        best = min(readers, key=lambda reader: sum(one or 0.0 for one in readers[reader]))
        values = [float("nan") if one is None else one for one in readers[best]]
        axes.plot(
            range(len(values)), values, "o-", color=COLOURS[index % len(COLOURS)], label=f"{name}, read by {best}"
        )
    axes.set_xticks(range(longest), names, fontsize=10, rotation=30)
    axes.set_xlabel("place in the document (tokens)", fontsize=12)
    axes.set_ylabel("bits per byte", fontsize=12)
    figure.legend(loc="outside upper right", fontsize=11, ncols=2)
    return [*sections, _picture(figure, "bits per byte by position")]


def _ranges(count: int) -> list[str]:
    bounds = position_bounds(count)
    return [f"{low:,} to {high:,}" for low, high in itertools.pairwise(bounds)]


def _needles(found: Sequence[Needles]) -> list[str]:
    if not found:
        return []
    kinds = list(dict.fromkeys(one.kind for one in found))
    distances = sorted({one.distance for one in found})
    cells = {(one.kind, one.distance): one for one in found}
    shares = {
        kind: [_share(cells[kind, distance]) if (kind, distance) in cells else "" for distance in distances]
        for kind in kinds
    }
    figure, axes = _figure()
    for index, kind in enumerate(kinds):
        row = [one for one in found if one.kind == kind]
        spread = [[one.accuracy - one.low for one in row], [one.high - one.accuracy for one in row]]
        places = [distances.index(one.distance) + 0.03 * (index - (len(kinds) - 1) / 2) for one in row]
        axes.errorbar(
            places, [one.accuracy for one in row], spread, fmt="o-", capsize=3, color=COLOURS[index], label=kind
        )
    chance = found[0].chance
    axes.axhline(chance, linestyle="--", color="#57606a", label="by chance")
    axes.set_xticks(range(len(distances)), [f"{distance:,}" for distance in distances], fontsize=11)
    axes.set_xlabel("tokens between what is said and the question", fontsize=12)
    axes.set_ylabel("share of right answers", fontsize=12)
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside upper right", fontsize=11, ncols=3)
    note = (
        f"Something said once in a long text and asked for so many tokens later: right if it is likelier than "
        f"{round(1 / chance) - 1} others of its kind, which all occur in the text ({chance:.0%} by chance). With the "
        f"95% interval of {found[0].trials} trials; `free` is the share whose likeliest text begins with the answer."
    )
    head = [f"{distance:,} tokens" for distance in distances]
    return [_heading("Needles", note), _table("", shares, head), _picture(figure, "needles by distance")]


def _share(one: Needles) -> str:
    return f"{one.accuracy:.1%} ({one.low:.0%} to {one.high:.0%}), free {one.free / one.trials:.0%}"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _picture(figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{content}"></p>'


def _heading(title: str, note: str = "") -> str:
    return f"<h2>{html.escape(title)}</h2>" + (f'\n<p class="note">{html.escape(note)}</p>' if note else "")


def _table(corner: str, rows: Mapping[str, Sequence[str]], columns: Sequence[str] = ()) -> str:
    """Rows by the name in their first cell, under a line of column names if there are some."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = [line([corner, *columns], "th")] if corner or columns else []
    return "\n".join(["<table>", *head, *(line([name, *cells], "td") for name, cells in rows.items()), "</table>"])
