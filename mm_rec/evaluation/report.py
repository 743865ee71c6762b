"""What was measured of a model as one page: HTML with its pictures inside, and the numbers as JSON beside it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mm_rec.evaluation.recall import Recall
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
        bits_per_byte: of each set of documents, by who read them (the name of an expert, or ``fused``).
        associative_recall, passkey: by distance.
        tasks: numbers of each task of lm-eval.
        conversation: what the model said when asked.
    """

    model: dict[str, str]
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    associative_recall: list[Recall] = field(default_factory=list)
    passkey: list[Recall] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    conversation: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        recall = {name: [one._asdict() for one in getattr(self, name)] for name in ("associative_recall", "passkey")}
        return {**asdict(self), **recall}


def write_report(folder: Path, measured: Measurements) -> Path:
    """Write ``report.html`` and ``results.json`` into ``folder``, which is made if missing; returns the page.

    Raises:
        StorageError: if they can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(measured.as_json(), indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / "results.json", numbers.encode("utf-8", "replace"))
    page = folder / "report.html"
    write_atomic(page, _page(measured).encode("utf-8", "replace"))
    return page


def _page(measured: Measurements) -> str:
    sections = [
        _table("", {name: [value] for name, value in measured.model.items()}),
        *_bits_per_byte(measured.bits_per_byte),
        *_recall(
            "Associative recall",
            "Eight pairs of random tokens, filler, then each key: is its value the likeliest of the eight (MQAR)?",
            measured.associative_recall,
        ),
        *_recall(
            "Pass key",
            "A number said at the start of a long text: is it likelier at its end than nine others?",
            measured.passkey,
        ),
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


def _bits_per_byte(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not scores:
        return []
    readers = list(next(iter(scores.values())))
    rows = {name: [f"{one[reader]:.4f}" for reader in readers] for name, one in scores.items()}
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
    note = "Held-out documents, each read from its start to its end with the state carried. Lower is better."
    return [
        _heading("Bits per byte", note), _table("documents", rows, readers), _picture(figure, "bits per byte by reader")
    ]  # fmt: skip


def _recall(title: str, note: str, scores: Sequence[Recall]) -> list[str]:
    if not scores:
        return []
    rows = {f"{one.distance:,}": [f"{one.accuracy:.1%}", f"{one.chance:.1%}", str(one.answers)] for one in scores}
    figure, axes = _figure()
    places = range(len(scores))  # distances grow by factors and may start at 0
    axes.plot(places, [one.accuracy for one in scores], "o-", color=COLOURS[0], linewidth=2, label="right answers")
    axes.plot(places, [one.chance for one in scores], "--", color="#57606a", label="by chance")
    axes.set_xticks(places, list(rows), fontsize=11)
    axes.set_xlabel("tokens between what is said and the question", fontsize=12)
    axes.set_ylabel("share of right answers", fontsize=12)
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside upper right", fontsize=11, ncols=2)
    return [
        _heading(title, note), _table("tokens between", rows, ["right", "by chance", "answers"]),
        _picture(figure, f"{title.lower()} by distance"),
    ]  # fmt: skip


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
