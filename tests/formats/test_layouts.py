"""A format whose layout changes has to raise its version: the layout of each version is written down in layouts/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layout import layout

from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_recall import add_recall_rows
from mm_rec.data.synthetic import write_synthetic
from mm_rec.formats import VERSIONS

LAYOUTS = Path(__file__).parent / "layouts"
OF_B411FA1 = {"model": 1, "training": 1, "session": 1, "documents": 3, "conversations": 1, "token store": 1}


def example(kind: str, runs: Path, step: str, made: Path, prepared: Path) -> Path:
    """A file or folder of the format: a checkpoint of ``step`` in ``runs``, or what lies in the other folders."""
    (conversations,) = (store.parent for store in prepared.glob("*/chat-train"))
    (documents,) = (store.parent for store in made.glob("data/prepared/*/text-train"))
    return {
        "model": made / "exported",
        "training": runs / "stage2" / "checkpoints" / step,
        "session": made / "session.safetensors",
        "documents": documents,
        "conversations": conversations,
        "token store": conversations / "chat-train",
    }[kind]


def written_down(kind: str, version: int) -> Any:
    path = LAYOUTS / f"{kind.replace(' ', '_')}-{version}.json"
    assert path.exists(), f"the layout of {kind} format {version} is to be written down, see layout.py"
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", OF_B411FA1)
def test_the_first_layouts_are_those_of_b411fa1(written: Path, kind: str) -> None:
    path = example(kind, written / "stopped", "step_000004", written, written / "stopped" / "prepared")
    assert layout(kind, path) == written_down(kind, OF_B411FA1[kind])


@pytest.mark.parametrize("kind", OF_B411FA1)
def test_another_layout_needs_another_version(continued: Path, kind: str) -> None:
    new = continued / "new"
    found = layout(kind, example(kind, continued / "stopped", "step_000007", new, new / "prepared"))
    expected = written_down(kind, VERSIONS[kind])
    assert found == expected, f"raise the version of {kind} in mm_rec/formats.py and write its layout down"


def test_rows_that_train_recall_have_the_layout_of_their_version(tmp_path: Path) -> None:
    write_synthetic(tmp_path, 12)
    rows = add_recall_rows(prepare(tmp_path, 320, filters=False), 0.1).recall["text"].path.parent
    expected = written_down("recall rows", VERSIONS["recall rows"])
    assert layout("recall rows", rows) == expected, "raise the version of recall rows and write its layout down"
